#include "rope-mean.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
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

llama_turbo_rope_mean llama_turbo_mean_over_positions(const llama_turbo_rope & rope, int64_t n) {
    llama_turbo_rope_mean res;
    if (!rope.is_known) {
        return res;
    }
    const int64_t n_rot = n_turned(rope);

    res.pairs_neighbours = pairs_neighbours(rope);
    res.turn.resize(n_rot / 2, 0.0);

    turned_block block(rope);
    double       weights = 0.0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const float * values = block.at(first);
        if (first == 0) {
            res.size = values[0];  // of a pair that is not turned yet
        }
        for (int64_t p = first; p < std::min(first + BLOCK, n); ++p, values += n_rot) {
            const double weight = 1.0 / std::max(p, FEW) - 1.0 / n;
            for (int64_t i = 0; i < n_rot / 2; ++i) {
                const int64_t x = res.pairs_neighbours ? 2 * i : i;
                const int64_t y = res.pairs_neighbours ? x + 1 : x + n_rot / 2;
                res.turn[i] += weight * std::complex<double>(values[x], values[y]);
            }
            weights += weight;
        }
    }
    for (auto & value : res.turn) {
        value /= weights;
    }

    return res;
}
