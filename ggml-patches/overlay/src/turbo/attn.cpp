#include "attn.h"

#include "compat.h"
#include "exact-input.h"
#include "llama-graph.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"
#include "parts.h"
#include "rotation.h"

#include <stdexcept>
#include <utility>

// What upstream's inputs of attention hold for a layer.
struct layer_inputs {
    const llama_kv_cache_context & mctx;

    ggml_tensor *  kq_mask;
    ggml_tensor *& k_rot;
    ggml_tensor *& v_rot;
};

static layer_inputs inputs_of(llm_graph_input_attn_kv * inp, int) {
    return { *inp->mctx, inp->self_kq_mask, inp->self_k_rot, inp->self_v_rot };
}

static layer_inputs inputs_of(llm_graph_input_attn_kv_iswa * inp, int il) {
    if (inp->hparams.is_swa(il)) {
        return { *inp->mctx->get_swa(), inp->self_kq_mask_swa, inp->self_k_rot_swa, inp->self_v_rot_swa };
    }
    return { *inp->mctx->get_base(), inp->self_kq_mask, inp->self_k_rot, inp->self_v_rot };
}

// The end of upstream's build_attn(): the output projection.
static ggml_tensor * project_output(const llm_graph_context & graph,
                                    ggml_tensor *             wo,
                                    ggml_tensor *             wo_b,
                                    ggml_tensor *             wo_s,
                                    ggml_tensor *             cur) {
    if (wo && (graph.arch == LLM_ARCH_GLM4 || graph.arch == LLM_ARCH_GLM4_MOE || graph.arch == LLM_ARCH_JAIS2)) {
        cur = graph.build_lora_mm(wo, cur);
        llama_turbo_add_up_in_f32(cur, 0);
        cur = wo_s ? ggml_mul(graph.ctx0, cur, wo_s) : cur;
    } else if (wo) {
        cur = graph.build_lora_mm(wo, cur, wo_s);
    }

    return wo_b ? ggml_add(graph.ctx0, cur, wo_b) : cur;
}

//
// exact sink and tail
//

// copies: [n_embd_gqa, n_rows, n_stream]; cur: [n_embd_gqa, n_copied * n_stream]
static void store_copies(const llm_graph_context & graph, ggml_tensor * copies, ggml_tensor * cur, ggml_tensor * rows) {
    copies = ggml_reshape_2d(graph.ctx0, copies, copies->ne[0], copies->ne[1] * copies->ne[2]);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, copies, cur, rows));
}

// copies: [n_embd_head, n_head_kv, n_rows, n_stream]; cur: [n_embd_gqa, n_tokens], of which the attended ones come behind
static ggml_tensor * append_tokens(ggml_context * ctx,
                                   ggml_tensor *  copies,
                                   ggml_tensor *  cur,
                                   ggml_tensor *  attended) {
    const int64_t n_stream = copies->ne[3];

    // gathered up to n_keys: padding takes 5 % of the time of a prompt on a CPU
    cur = ggml_cast(ctx, ggml_get_rows(ctx, cur, attended), copies->type);
    cur = ggml_reshape_4d(ctx, cur, copies->ne[0], copies->ne[1], attended->ne[0] / n_stream, n_stream);

    return ggml_concat(ctx, copies, cur, 2);
}

// What attention takes of a layer in f16, [n_embd_head, n_keys, n_head_kv, n_stream], and writes the copies of cur.
//   view: of copies, [n_embd_head, n_head_kv, n_rows, n_stream]
//   cur:  [n_embd_head, n_head_kv, n_tokens]; nullptr: the layer attends what another one has written
static ggml_tensor * exact_keys(const llm_graph_context & graph,
                                llama_turbo_exact_input & in,
                                ggml_tensor *             copies,
                                ggml_tensor *             view,
                                ggml_tensor *             cur) {
    if (cur) {
        GGML_ASSERT(cur->nb[1] == ggml_row_size(cur->type, cur->ne[0]));
        ggml_tensor * cur_2d = ggml_view_2d(graph.ctx0, cur, copies->ne[0], cur->ne[2], cur->nb[2], 0);

        if (!in.attended) {
            store_copies(graph, copies, cur_2d, in.rows);
        } else {
            view = append_tokens(graph.ctx0, view, cur_2d, in.attended);
            ggml_build_forward_expand(graph.gf, view);  // before rows are written
            store_copies(graph, copies, ggml_get_rows(graph.ctx0, cur_2d, in.copied), in.rows);
        }
        in.keys[copies] = ggml_permute(graph.ctx0, view, 0, 2, 1, 3);
        ggml_build_forward_expand(graph.gf, in.keys[copies]);
    }

    return in.keys.at(copies);
}

static ggml_tensor * find_flash_attn(ggml_tensor * cur) {
    while (cur->op == GGML_OP_RESHAPE || cur->op == GGML_OP_VIEW || cur->op == GGML_OP_CONT) {
        cur = cur->src[0];
    }
    if (cur->op != GGML_OP_FLASH_ATTN_EXT) {
        throw std::runtime_error(
            "an exact sink and tail need flash attention in every layer: leave out --cache-sink and --cache-tail");
    }

    return cur;
}

//
// attention
//

// in llama_turbo_build_attn(), which calls build_attn() again
static thread_local bool is_in_build_attn = false;

struct build_attn_scope {
    build_attn_scope() { is_in_build_attn = true; }

    ~build_attn_scope() { is_in_build_attn = false; }
};

template <typename input> bool llama_turbo_attends(input * inp, int il) {
    if (is_in_build_attn) {
        return false;
    }
    const layer_inputs in = inputs_of(inp, il);

    return llama_turbo_calibrated_layer_of(in.mctx, il) || llama_turbo_exact_layer_of(in.mctx, il) ||
           llama_turbo_observed_layer_of(in.mctx, il).first;
}

// build_attn() without the output projection, and with K and V that have copies.
//   is_rotated: q and k are
template <typename input>
static ggml_tensor * attend_all(const llm_graph_context & graph,
                                input *                   inp,
                                bool                      is_rotated,
                                ggml_tensor *             q,
                                ggml_tensor *             k,
                                ggml_tensor *             v,
                                ggml_tensor *             kq_b,
                                ggml_tensor *             sinks,
                                ggml_tensor *             v_mla,
                                float                     kq_scale,
                                int                       il) {
    const auto build = [&] {
        const build_attn_scope scope;
        return graph.build_attn(inp, nullptr, nullptr, nullptr, q, k, v, kq_b, sinks, v_mla, kq_scale, il);
    };

    const layer_inputs in    = inputs_of(inp, il);
    ggml_tensor *      k_rot = std::exchange(in.k_rot, nullptr);

    if (k_rot && !is_rotated) {
        q = llama_turbo_rotate(graph.ctx0, q, k_rot);
        k = k ? llama_turbo_rotate(graph.ctx0, k, k_rot) : k;
    }

    const llama_turbo_exact::layer * layer = llama_turbo_exact_layer_of(in.mctx, il);
    if (!layer) {
        ggml_tensor * cur = build();
        in.k_rot          = k_rot;
        return cur;
    }

    // copies are rotated like the cache, since Q is; upstream's own rotation is left out
    ggml_tensor * v_rot = std::exchange(in.v_rot, nullptr);

    v = v && v_rot ? llama_turbo_rotate(graph.ctx0, v, v_rot) : v;

    llama_turbo_exact_input & exact = llama_turbo_exact_input_of(graph, in.mctx, in.kq_mask);
    const auto [view_k, view_v]     = llama_turbo_exact_views(graph.ctx0, in.mctx, il);

    ggml_tensor * keys   = exact_keys(graph, exact, layer->k, view_k, k);
    ggml_tensor * values = exact_keys(graph, exact, layer->v, view_v, v);
    ggml_tensor * cur    = build();
    // the graph has attention's node already: an input that it gets now would be unknown to the scheduler, and be put on the device
    ggml_build_forward_expand(graph.gf, exact.mask);
    ggml_turbo_flash_attn_add_segment(find_flash_attn(cur), keys, values, exact.mask);

    in.k_rot        = k_rot;
    in.v_rot        = v_rot;
    layer->is_built = true;

    return v_rot ? llama_turbo_rotate(graph.ctx0, cur, v_rot) : cur;
}

template <typename input>
ggml_tensor * llama_turbo_build_attn(const llm_graph_context & graph,
                                     input *                   inp,
                                     ggml_tensor *             wo,
                                     ggml_tensor *             wo_b,
                                     ggml_tensor *             wo_s,
                                     ggml_tensor *             q,
                                     ggml_tensor *             k,
                                     ggml_tensor *             v,
                                     ggml_tensor *             kq_b,
                                     ggml_tensor *             sinks,
                                     ggml_tensor *             v_mla,
                                     float                     kq_scale,
                                     int                       il) {
    static const llama_turbo_calibrated_layer none;

    const llama_turbo_calibrated_layer * found = llama_turbo_calibrated_layer_of(inputs_of(inp, il).mctx, il);
    const llama_turbo_calibrated_layer & layer = found ? *found : none;

    ggml_context * ctx = graph.ctx0;

    // without k and v, the layer attends what another one has stored
    q = layer.map_q(ctx, q);
    k = k ? layer.store_k(ctx, k) : k;
    v = v ? layer.store_v(ctx, v) : v;

    ggml_tensor * cur = attend_all(graph, inp, layer.k_map != nullptr, q, k, v, kq_b, sinks, v_mla, kq_scale, il);
    cur               = layer.restore_out(ctx, cur);
    if (found) {
        found->is_built = true;
    }
    const auto [observed, number] = llama_turbo_observed_layer_of(inputs_of(inp, il).mctx, il);
    if (observed && k && v) {
        observed->build(graph, number, q, k, v, cur, wo);
    }

    return project_output(graph, wo, wo_b, wo_s, cur);
}

#define TURBO_INSTANTIATE(input)                                                                                    \
    template bool          llama_turbo_attends(input *, int);                                                       \
    template ggml_tensor * llama_turbo_build_attn(const llm_graph_context &, input *, ggml_tensor *, ggml_tensor *, \
                                                  ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *,       \
                                                  ggml_tensor *, ggml_tensor *, ggml_tensor *, float, int)

TURBO_INSTANTIATE(llm_graph_input_attn_kv);
TURBO_INSTANTIATE(llm_graph_input_attn_kv_iswa);

#undef TURBO_INSTANTIATE
