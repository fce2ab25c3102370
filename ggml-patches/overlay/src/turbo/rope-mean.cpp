#include "rope-mean.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

static constexpr int64_t FEW   = 256;
static constexpr int64_t BLOCK = 1024;  // positions at once

static int rope_mode(const llama_turbo_rope & rope) {
    return rope.op_params[2];
}

static int64_t n_turned(const llama_turbo_rope & rope) {
    return rope.op_params[1];
}

static bool pairs_neighbours(const llama_turbo_rope & rope) {
    return rope_mode(rope) == GGML_ROPE_TYPE_NORMAL;
}

namespace {

// The unit vector of each pair, turned by RoPE to a block of positions, on the CPU.
class turned_block {
  public:
    explicit turned_block(const llama_turbo_rope & rope) : is_multi(rope_mode(rope) & GGML_ROPE_TYPE_MROPE) {
        const int64_t n_rot = n_turned(rope);

        backend.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        ctx.reset(ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc =*/true }));
        if (!backend || !ctx) {
            throw std::runtime_error("no CPU backend");
        }

        ggml_tensor * unit = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_rot, 1, BLOCK);
        ggml_tensor * factors =
            rope.factors.empty() ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, rope.factors.size());
        pos    = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, is_multi ? 4 * BLOCK : BLOCK);
        turned = is_multi ? ggml_rope_multi(ctx.get(), unit, pos, factors, n_rot, sections, rope_mode(rope), 0, 0, 0, 0,
                                            0, 0, 0) :
                            ggml_rope_ext(ctx.get(), unit, pos, factors, n_rot, rope_mode(rope), 0, 0, 0, 0, 0, 0, 0);
        memcpy(turned->op_params, rope.op_params.data(), sizeof(turned->op_params));
        graph = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, turned);
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
        if (!buffer) {
            throw std::runtime_error("out of memory");
        }

        std::vector<float> units(n_rot * BLOCK);
        for (size_t i = 0; i < units.size(); ++i) {
            const int64_t channel = i % n_rot;
            units[i]              = pairs_neighbours(rope) ? channel % 2 == 0 : channel < n_rot / 2;
        }
        ggml_backend_tensor_set(unit, units.data(), 0, ggml_nbytes(unit));
        if (factors) {
            ggml_backend_tensor_set(factors, rope.factors.data(), 0, ggml_nbytes(factors));
        }
    }

    // [BLOCK][n_rot]
    const float * at(int64_t first) {
        std::vector<int32_t> positions(pos->ne[0], 0);
        for (int64_t i = 0; i < (is_multi ? 3 : 1) * BLOCK; ++i) {
            positions[i] = first + i % BLOCK;  // of a text, three of four are the same
        }
        ggml_backend_tensor_set(pos, positions.data(), 0, ggml_nbytes(pos));
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("failed to compute RoPE");
        }

        return (const float *) turned->data;
    }

  private:
    const bool is_multi;

    int sections[4] = {};

    ggml_backend_ptr        backend;
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           pos    = nullptr;
    ggml_tensor *           turned = nullptr;
    ggml_cgraph *           graph  = nullptr;
};

}  // namespace

// Channels that are not turned are taken for pairs of neighbours.
void llama_turbo_rope_mean::set_pairs(bool are_neighbours, int64_t n_rot, int64_t n_embd_head) {
    for (int64_t i = 0; i < n_embd_head / 2; ++i) {
        const bool is_half_apart = !are_neighbours && i < n_rot / 2;
        pairs.emplace_back(is_half_apart ? i : 2 * i, is_half_apart ? i + n_rot / 2 : 2 * i + 1);
    }
}

llama_turbo_rope_mean::llama_turbo_rope_mean(const llama_turbo_rope & rope, int64_t n_embd_head, int64_t n) {
    if (!rope.is_known) {
        return;
    }
    const int64_t n_rot = n_turned(rope);
    set_pairs(pairs_neighbours(rope), n_rot, n_embd_head);

    turned_block        block(rope);
    double              weights = 0.0;
    std::vector<double> vector(n_rot, 0.0);
    std::vector<double> matrix(n_rot * n_rot, 0.0);  // below its diagonal
    std::vector<float>  sums(n_rot * n_rot);
    for (int64_t first = 0; first < n; first += BLOCK) {
        const float * values = block.at(first);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t p = first; p < std::min(first + BLOCK, n); ++p, values += n_rot) {
            const double weight = 1.0 / std::max(p, FEW) - 1.0 / n;
            for (int64_t i = 0; i < n_rot; ++i) {
                const float weighted = weight * values[i];
                for (int64_t j = 0; j <= i; ++j) {
                    sums[i * n_rot + j] += weighted * values[j];
                }
                vector[i] += weight * values[i];
            }
            weights += weight;
        }
        std::transform(sums.begin(), sums.end(), matrix.begin(), matrix.begin(), std::plus<double>());
    }

    unit.resize(n_embd_head, 0.0);
    for (const auto & [x, y] : pairs) {
        unit[x] = x < n_rot ? vector[x] / weights : 1.0;
        unit[y] = y < n_rot ? vector[y] / weights : 0.0;
    }
    products.resize(n_embd_head * n_embd_head);
    for (int64_t i = 0; i < n_embd_head; ++i) {
        for (int64_t j = 0; j < n_embd_head; ++j) {
            const bool are_turned = std::max(i, j) < n_rot;
            products[i * n_embd_head + j] =
                are_turned ? matrix[std::max(i, j) * n_rot + std::min(i, j)] / weights : unit[i] * unit[j];
        }
    }
}

std::vector<double> llama_turbo_rope_mean::turn(const std::vector<double> & vector) const {
    std::vector<double> res = vector;
    for (const auto & [x, y] : pairs) {
        res[x] = unit[x] * vector[x] - unit[y] * vector[y];
        res[y] = unit[y] * vector[x] + unit[x] * vector[y];
    }

    return res;
}

std::vector<double> llama_turbo_rope_mean::turn_products(const std::vector<double> & of_channels) const {
    const size_t        n   = unit.size();
    std::vector<double> res = of_channels;
    for (const auto & [ax, ay] : pairs) {
        for (const auto & [bx, by] : pairs) {
            const double xx = products[ax * n + bx], xy = products[ax * n + by];
            const double yx = products[ay * n + bx], yy = products[ay * n + by];

            const double * a_x = of_channels.data() + ax * n;
            const double * a_y = of_channels.data() + ay * n;

            // each of the two vectors is turned: (ux, uy) makes ux * x - uy * y of x, and uy * x + ux * y of y
            res[ax * n + bx] = xx * a_x[bx] - xy * a_x[by] - yx * a_y[bx] + yy * a_y[by];
            res[ax * n + by] = xy * a_x[bx] + xx * a_x[by] - yy * a_y[bx] - yx * a_y[by];
            res[ay * n + bx] = yx * a_x[bx] - yy * a_x[by] + xx * a_y[bx] - xy * a_y[by];
            res[ay * n + by] = yy * a_x[bx] + yx * a_x[by] + xy * a_y[bx] + xx * a_y[by];
        }
    }

    return res;
}

void llama_turbo_rope_mean::even_out(std::vector<double> & values) const {
    for (const auto & [x, y] : pairs) {
        values[x] = values[y] = (values[x] + values[y]) / 2;
    }
}
