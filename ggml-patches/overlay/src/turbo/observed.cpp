#include "observed.h"

#include "ggml-backend.h"
#include "llama-graph.h"
#include "llama-model.h"
#include "memory.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>

static constexpr int64_t PROBES_AT_ONCE = 512;

// Projections of a layer: what they cost must be little beside the tokens that are read.
static constexpr int64_t PROBES = 2048;

//
// tensors
//

llama_turbo_observed::llama_turbo_observed(const llama_model & model, const std::vector<uint32_t> & layers) {
    std::set<ggml_backend_buffer_type_t> bufts;
    for (uint32_t il : layers) {
        by_number[il];
        bufts.insert(ggml_backend_dev_buffer_type(model.dev_layer(il)));
    }
    for (ggml_backend_buffer_type_t buft : bufts) {
        allocate(model, buft);
    }
}

// Unit vectors of all query heads of a KV head, with signs that depend on the channel and the head.
static std::vector<float> probe_values(int64_t n_embd_head, int64_t n_head, int64_t n_head_kv) {
    const int64_t n_group = n_head / n_head_kv;

    std::vector<float> res(n_embd_head * n_head * n_embd_head * n_head_kv, 0.0f);
    for (int64_t h = 0; h < n_head; ++h) {
        for (int64_t i = 0; i < n_embd_head; ++i) {
            const uint32_t hash   = (uint32_t) (h * n_embd_head + i) * 2654435761u;
            const int64_t  column = h / n_group * n_embd_head + i;

            res[column * n_embd_head * n_head + h * n_embd_head + i] = hash >> 16 & 1 ? 1.0f : -1.0f;
        }
    }

    return res;
}

// 1 where a channel belongs to a query head of the part, 0 elsewhere.
static std::vector<float> part_values(int64_t n_embd_head, int64_t n_head, int64_t n_head_kv, int64_t n_parts) {
    const int64_t n_group = n_head / n_head_kv;
    const int64_t n_embd  = n_embd_head * n_head;

    std::vector<float> res(n_embd * n_parts);
    for (int64_t i = 0; i < n_embd * n_parts; ++i) {
        const int64_t h = i % n_embd / n_embd_head;

        res[i] = h % n_group % n_parts == i / n_embd ? 1.0f : 0.0f;
    }

    return res;
}

void llama_turbo_observed::allocate(const llama_model & model, ggml_backend_buffer_type_t buft) {
    ggml_context_ptr ctx = llama_turbo_tensors(10 * by_number.size());

    // by head size and numbers of heads
    std::map<std::vector<int64_t>, std::pair<ggml_tensor *, ggml_tensor *>> probes;

    for (auto & [il, layer] : by_number) {
        if (ggml_backend_dev_buffer_type(model.dev_layer(il)) != buft) {
            continue;
        }
        const int64_t n_embd_k  = model.hparams.n_embd_head_k(il);
        const int64_t n_embd_v  = model.hparams.n_embd_head_v(il);
        const int64_t n_head    = model.hparams.n_head(il);
        const int64_t n_head_kv = model.hparams.n_head_kv(il);

        const auto add = [&](int64_t ne0, int64_t ne1, int64_t ne2) {
            return ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, ne0, ne1, ne2);
        };
        layer.q_products = add(n_embd_k, n_embd_k, n_head_kv);
        layer.k_products = add(n_embd_k, n_embd_k, n_head_kv);
        layer.k_sum      = add(n_embd_k, n_head_kv, 1);
        layer.k_first    = add(n_embd_k, n_head_kv, n_first);
        layer.v_sum      = add(n_embd_v, n_head_kv, 1);
        layer.v_sq       = add(n_embd_v, n_head_kv, 1);
        layer.v_weight   = add(n_head_kv, 1, 1);
        layer.out_sq     = add(n_embd_v * n_head_kv, 1, 1);

        auto & [probe, parts] = probes[{ n_embd_v, n_head, n_head_kv }];
        if (!probe) {
            const int64_t n_probes = n_embd_v * n_head_kv;

            probe = add(n_embd_v * n_head, n_probes, 1);
            parts = add(n_embd_v * n_head, std::clamp<int64_t>(PROBES / n_probes, 1, n_head / n_head_kv), 1);
        }
        layer.probe = probe;
        layer.parts = parts;
    }

    ggml_backend_buffer_ptr buffer = llama_turbo_allocate(model, ctx.get(), buft, "sums of a calibration");
    for (const auto & [shape, tensors] : probes) {
        const auto & [probe, parts] = tensors;

        const std::vector<float> values = probe_values(shape[0], shape[1], shape[2]);
        ggml_backend_tensor_set(probe, values.data(), 0, ggml_nbytes(probe));
        const std::vector<float> members = part_values(shape[0], shape[1], shape[2], parts->ne[1]);
        ggml_backend_tensor_set(parts, members.data(), 0, ggml_nbytes(parts));
    }
    buffers.emplace_back(std::move(ctx), std::move(buffer));
}

//
// graph
//

namespace {

// Keeps graphs from being used again: they differ from ubatch to ubatch.
struct one_graph : llm_graph_input_i {
    void set_input(const llama_ubatch *) override {}
};

// Adds sums to a graph.
struct summing {
    const llm_graph_context & graph;

    ggml_context * ctx = graph.ctx0;

    // Tokens behind the first ones of x [n_embd, n_head, n_tokens], as [n_tokens, n_embd, n_head].
    ggml_tensor * by_channel(ggml_tensor * x) const {
        const int64_t n_first = llama_turbo_observed::n_first;
        x = ggml_view_3d(ctx, x, x->ne[0], x->ne[1], x->ne[2] - n_first, x->nb[1], x->nb[2], n_first * x->nb[2]);

        return ggml_cont(ctx, ggml_permute(ctx, x, 1, 2, 0, 3));
    }

    // Of all query heads of a KV head, as [n_tokens * n_group, n_embd, n_head_kv].
    ggml_tensor * by_group(ggml_tensor * q, int64_t n_head_kv) const {
        const int64_t n_first = llama_turbo_observed::n_first;
        const int64_t n_group = q->ne[1] / n_head_kv;

        ggml_tensor * x = ggml_view_4d(ctx, q, q->ne[0], n_group, n_head_kv, q->ne[2] - n_first, q->nb[1],
                                       q->nb[1] * n_group, q->nb[2], n_first * q->nb[2]);
        x               = ggml_cont(ctx, ggml_permute(ctx, x, 2, 1, 3, 0));

        return ggml_reshape_3d(ctx, x, x->ne[0] * x->ne[1], x->ne[2], x->ne[3]);
    }

    // Of channels, x as [n, n_embd, n_head].
    void products(ggml_tensor * x, ggml_tensor * to) const { write(ggml_mul_mat(ctx, x, x), to); }

    void write(ggml_tensor * x, ggml_tensor * to) const {
        ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, x, ggml_reshape(ctx, to, x)));
    }

    void sum(ggml_tensor * x, ggml_tensor * to) const { write(ggml_sum_rows(ctx, x), to); }

    // Squares of the weights that each token behind the first ones gets from all queries of a KV head: [n_tokens, 1, n_head_kv].
    ggml_tensor * weights(ggml_tensor * kq, int64_t n_tokens, int64_t n_head_kv) const {
        const int64_t n_first = llama_turbo_observed::n_first;
        const int64_t n_head  = kq->ne[2];

        kq = ggml_view_3d(ctx, kq, n_tokens - n_first, kq->ne[1], n_head, kq->nb[1], kq->nb[2], n_first * kq->nb[0]);
        kq = ggml_sqr(ctx, ggml_cont(ctx, ggml_permute(ctx, kq, 1, 0, 2, 3)));
        kq = ggml_reshape_3d(ctx, ggml_sum_rows(ctx, kq), n_tokens - n_first, n_head / n_head_kv, n_head_kv);
        kq = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, kq, 1, 0, 2, 3)));

        return ggml_reshape_3d(ctx, kq, n_tokens - n_first, 1, n_head_kv);
    }
};

}  // namespace

static bool only_moves(const ggml_tensor * x) {
    return x->op == GGML_OP_RESHAPE || x->op == GGML_OP_VIEW || x->op == GGML_OP_CONT || x->op == GGML_OP_PERMUTE;
}

// K or Q before RoPE, where the graph shows it.
//   ignores_scale: one number that all of x is multiplied by does not count
static ggml_tensor * before_rope(ggml_tensor * x, llama_turbo_rope & rope, bool ignores_scale) {
    ggml_tensor * cur = x;
    while ((only_moves(cur) || (ignores_scale && cur->op == GGML_OP_SCALE)) &&
           ggml_nelements(cur) == ggml_nelements(x)) {
        cur = cur->src[0];
    }
    if (cur->op != GGML_OP_ROPE || cur->view_src || !ggml_are_same_shape(cur->src[0], x)) {
        return x;  // none, or one that overwrites what it takes
    }
    static_assert(sizeof(cur->op_params) == sizeof(rope.op_params), "");
    memcpy(rope.op_params.data(), cur->op_params, sizeof(cur->op_params));
    rope.factors.resize(cur->src[2] ? cur->src[2]->ne[0] : 0);
    if (cur->src[2]) {
        ggml_backend_tensor_get(cur->src[2], rope.factors.data(), 0, ggml_nbytes(cur->src[2]));
    }
    rope.is_known = true;

    return cur->src[0];
}

static ggml_tensor * find_weights(ggml_tensor * out) {
    while (only_moves(out)) {
        out = out->src[0];
    }
    if (out->op != GGML_OP_MUL_MAT || out->src[1]->op != GGML_OP_SOFT_MAX) {
        throw std::runtime_error("a layer attends in a way that can't be observed");
    }

    return out->src[1];
}

void llama_turbo_observed::build(const llm_graph_context & graph,
                                 uint32_t                  il,
                                 ggml_tensor *             q,
                                 ggml_tensor *             k,
                                 ggml_tensor *             v,
                                 ggml_tensor *             out,
                                 ggml_tensor *             wo) const {
    const llama_turbo_observed_layer & layer = by_number.at(il);

    layer.is_built         = true;
    const int64_t n_tokens = q->ne[2];
    if (n_tokens <= n_first) {
        return;
    }
    graph.res->add_input(std::make_unique<one_graph>());

    const summing  sums{ graph };
    ggml_context * ctx = sums.ctx;

    llama_turbo_rope rope_q;
    ggml_tensor *    raw_q = before_rope(q, rope_q, /*ignores_scale =*/true);
    ggml_tensor *    raw   = before_rope(k, layer.rope, /*ignores_scale =*/false);
    ggml_tensor *    keys  = sums.by_channel(raw);
    layer.turns_q          = rope_q == layer.rope;

    sums.products(sums.by_group(raw_q, k->ne[1]), layer.q_products);
    ggml_tensor * k_sum = ggml_sum_rows(ctx, keys);
    sums.write(k_sum, layer.k_sum);
    sums.products(ggml_sub(ctx, keys, ggml_scale(ctx, k_sum, 1.0f / keys->ne[0])), layer.k_products);
    sums.write(ggml_cont(ctx, ggml_view_3d(ctx, raw, raw->ne[0], raw->ne[1], n_first, raw->nb[1], raw->nb[2], 0)),
               layer.k_first);

    ggml_tensor * weights = sums.weights(find_weights(out), n_tokens, k->ne[1]);
    ggml_tensor * values  = sums.by_channel(v);
    sums.sum(weights, layer.v_weight);
    sums.sum(ggml_mul(ctx, values, weights), layer.v_sum);
    sums.sum(ggml_mul(ctx, ggml_sqr(ctx, values), weights), layer.v_sq);

    layer.has_output = wo && wo->ne[0] == layer.probe->ne[0];
    if (!projects || !layer.has_output) {
        return;
    }
    for (int64_t i = 0; i < layer.probe->ne[1]; i += PROBES_AT_ONCE) {
        const int64_t n = std::min(PROBES_AT_ONCE, layer.probe->ne[1] - i);
        ggml_tensor * probe =
            ggml_view_2d(ctx, layer.probe, layer.probe->ne[0], n, layer.probe->nb[1], i * layer.probe->nb[1]);
        ggml_tensor * norms = nullptr;
        for (int64_t part = 0; part < layer.parts->ne[1]; ++part) {
            ggml_tensor * members = ggml_view_1d(ctx, layer.parts, layer.parts->ne[0], part * layer.parts->nb[1]);
            ggml_tensor * columns = ggml_mul_mat(ctx, wo, ggml_mul(ctx, probe, members));
            ggml_tensor * squares = ggml_sum_rows(ctx, ggml_sqr(ctx, columns));
            norms                 = norms ? ggml_add(ctx, norms, squares) : squares;
        }
        ggml_build_forward_expand(
            graph.gf, ggml_cpy(ctx, norms, ggml_view_2d(ctx, layer.out_sq, 1, n, sizeof(float), i * sizeof(float))));
    }
}

uint32_t llama_turbo_observed::n_nodes() const {
    static constexpr uint32_t SUMS  = 64;
    static constexpr uint32_t PROBE = 4;
    static constexpr uint32_t PART  = 6;

    uint32_t res = 0;
    for (const auto & [il, layer] : by_number) {
        res += SUMS + (PROBE + PART * layer.parts->ne[1]) * (layer.probe->ne[1] / PROBES_AT_ONCE + 1);
    }

    return res;
}
