#include "llama-turbo-attn.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "llama-turbo-cache.h"
#include "llama-turbo.h"

#include <map>
#include <set>
#include <stdexcept>
#include <utility>

//
// tensors
//

llama_turbo_calibrated::llama_turbo_calibrated(const llama_turbo_calibration & calibration,
                                               const llama_model &             model,
                                               const std::vector<uint32_t> &   layers) :
    digest(calibration.digest) {
    std::set<ggml_backend_buffer_type_t> bufts;
    for (uint32_t il : layers) {
        if (calibration.layers.count(il) > 0) {
            by_number[il];
            bufts.insert(ggml_backend_dev_buffer_type(model.dev_layer(il)));
        }
    }
    for (ggml_backend_buffer_type_t buft : bufts) {
        allocate(calibration, model, buft);
    }
}

static std::vector<float> inverse(std::vector<float> values) {
    for (float & value : values) {
        value = 1.0f / value;
    }

    return values;
}

void llama_turbo_calibrated::allocate(const llama_turbo_calibration & calibration,
                                      const llama_model &             model,
                                      ggml_backend_buffer_type_t      buft) {
    ggml_context_ptr ctx = llama_turbo_tensors(7 * by_number.size());

    std::vector<std::pair<ggml_tensor *, std::vector<float>>> contents;

    const auto add = [&](const char * name, uint32_t il, const std::vector<float> & values, bool for_queries) {
        ggml_tensor * tensor = nullptr;
        if (!values.empty()) {
            const int64_t n_head_kv = model.hparams.n_head_kv(il);
            const int64_t n_embd    = values.size() / n_head_kv;

            tensor = for_queries ? ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd, 1, n_head_kv) :
                                   ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_head_kv);
            ggml_format_name(tensor, "turbo_%s_l%u", name, il);
            contents.emplace_back(tensor, values);
        }
        return tensor;
    };

    for (auto & [il, layer] : by_number) {
        if (ggml_backend_dev_buffer_type(model.dev_layer(il)) != buft) {
            continue;
        }
        const llama_turbo_calibration_layer & values = calibration.layers.at(il);

        layer.k_mean    = add("k_mean", il, values.k_mean, false);
        layer.k_scale   = add("k_scale", il, values.k_scale, false);
        layer.q_scale   = add("q_scale", il, inverse(values.k_scale), true);
        layer.v_mean    = add("v_mean", il, values.v_mean, false);
        layer.v_scale   = add("v_scale", il, values.v_scale, false);
        layer.out_scale = add("out_scale", il, inverse(values.v_scale), true);
        layer.out_mean  = add("out_mean", il, values.v_mean, true);
    }

    ggml_backend_buffer_ptr buffer = llama_turbo_allocate(model, ctx.get(), buft, "calibration");
    if (!model.hparams.no_alloc) {
        for (const auto & [tensor, values] : contents) {
            ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
        }
    }

    buffers.emplace_back(std::move(ctx), std::move(buffer));
}

//
// graph
//

ggml_tensor * llama_turbo_calibrated_layer::store_k(ggml_context * ctx, ggml_tensor * k) const {
    k = k_mean ? ggml_sub(ctx, k, k_mean) : k;
    return k_scale ? ggml_mul(ctx, k, k_scale) : k;
}

ggml_tensor * llama_turbo_calibrated_layer::restore_k(ggml_context * ctx, ggml_tensor * k) const {
    k = k_scale ? ggml_div(ctx, k, k_scale) : k;
    return k_mean ? ggml_add(ctx, k, k_mean) : k;
}

ggml_tensor * llama_turbo_calibrated_layer::store_v(ggml_context * ctx, ggml_tensor * v) const {
    v = v_mean ? ggml_sub(ctx, v, v_mean) : v;
    return v_scale ? ggml_mul(ctx, v, v_scale) : v;
}

// The query heads [n_embd_head, n_head, n_tokens] of each KV head [n_embd_head, n_group, n_head_kv, n_tokens].
static ggml_tensor * group_query_heads(ggml_context * ctx, ggml_tensor * cur, int64_t n_head_kv) {
    const int64_t n_group = cur->ne[1] / n_head_kv;

    return ggml_view_4d(ctx, cur, cur->ne[0], n_group, n_head_kv, cur->ne[2], cur->nb[1], cur->nb[1] * n_group,
                        cur->nb[2], 0);
}

static ggml_tensor * scale_query_heads(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * scale) {
    ggml_tensor * scaled = ggml_mul(ctx, group_query_heads(ctx, cur, scale->ne[2]), scale);

    return ggml_reshape_3d(ctx, scaled, cur->ne[0], cur->ne[1], cur->ne[2]);
}

ggml_tensor * llama_turbo_calibrated_layer::restore_out(ggml_context * ctx, ggml_tensor * out) const {
    const ggml_tensor * any = out_scale ? out_scale : out_mean;
    if (!any) {
        return out;
    }
    const int64_t n_embd_head = any->ne[0];

    ggml_tensor * heads = ggml_reshape_3d(ctx, out, n_embd_head, out->ne[0] / n_embd_head, out->ne[1]);
    heads               = group_query_heads(ctx, heads, any->ne[2]);
    heads               = out_scale ? ggml_mul(ctx, heads, out_scale) : heads;
    heads               = out_mean ? ggml_add(ctx, heads, out_mean) : heads;

    return ggml_reshape_2d(ctx, heads, out->ne[0], out->ne[1]);
}

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

// ggml_prec_set_acc() was ggml_mul_mat_set_prec() in older upstreams
template <typename T>
static auto add_up_in_f32(T * cur, int) -> decltype(ggml_prec_set_acc(cur, GGML_PREC_F32), void()) {
    ggml_prec_set_acc(cur, GGML_PREC_F32);
}

template <typename T> static void add_up_in_f32(T * cur, long) {
    ggml_mul_mat_set_prec(cur, GGML_PREC_F32);
}

// The end of upstream's build_attn(): the output projection.
static ggml_tensor * project(const llm_graph_context & graph,
                             ggml_tensor *             wo,
                             ggml_tensor *             wo_b,
                             ggml_tensor *             wo_s,
                             ggml_tensor *             cur) {
    if (wo && (graph.arch == LLM_ARCH_GLM4 || graph.arch == LLM_ARCH_GLM4_MOE || graph.arch == LLM_ARCH_JAIS2)) {
        cur = graph.build_lora_mm(wo, cur);
        add_up_in_f32(cur, 0);
        cur = wo_s ? ggml_mul(graph.ctx0, cur, wo_s) : cur;
    } else if (wo) {
        cur = graph.build_lora_mm(wo, cur, wo_s);
    }

    return wo_b ? ggml_add(graph.ctx0, cur, wo_b) : cur;
}

//
// exact sink and tail
//

namespace {

class exact_input : public llm_graph_input_i {
  public:
    exact_input(ggml_context * ctx, const llama_kv_cache_context & mctx, ggml_tensor * packed_mask) :
        kv(llama_turbo_cache::cache_of(mctx)),
        mctx(&mctx) {
        if (packed_mask->type != GGML_TYPE_F16) {
            throw std::runtime_error("an exact sink and tail need flash attention: use -fa on");
        }
        const llama_turbo_exact & exact           = llama_turbo_cache::exact_of(mctx);
        const int64_t             n_tokens        = packed_mask->ne[1];
        const int64_t             n_stream        = packed_mask->ne[3];
        const bool                is_copied_first = llama_turbo_cache::is_copied_first(mctx, n_tokens, n_stream);
        const int64_t             n_keys          = is_copied_first ? exact.n_rows : exact.n_keys(n_tokens);
        const int64_t             n_copied        = exact.n_copied(n_tokens) * n_stream;

        tensors             = {};
        tensors.packed_mask = packed_mask;
        tensors.mask        = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_keys, n_tokens, 1, n_stream);
        tensors.rows        = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_copied);
        if (!is_copied_first) {
            tensors.copied   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_copied);
            tensors.attended = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (n_keys - exact.n_rows) * n_stream);
        }
        for (ggml_tensor * tensor : { tensors.mask, tensors.rows, tensors.copied, tensors.attended }) {
            if (tensor) {
                ggml_set_input(tensor);
            }
        }
    }

    void set_input(const llama_ubatch * ubatch) override {
        llama_turbo_cache::set_exact_input(*mctx, *ubatch, tensors);
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = llama_turbo_cache::find_context(params.mctx, kv);
        return mctx && tensors.mask->ne[1] * tensors.mask->ne[3] == params.ubatch.n_tokens;
    }

    llama_turbo_exact_input tensors;

    std::map<const ggml_tensor *, ggml_tensor *> keys;  // by copies: what attention takes

  private:
    const llama_kv_cache &         kv;
    const llama_kv_cache_context * mctx;
};

}  // namespace

static exact_input & exact_input_of(const llm_graph_context & graph, const layer_inputs & in) {
    for (const auto & input : graph.res->inputs) {
        auto * found = dynamic_cast<exact_input *>(input.get());
        if (found && found->tensors.packed_mask == in.kq_mask) {
            return *found;
        }
    }
    auto input = std::make_unique<exact_input>(graph.ctx0, in.mctx, in.kq_mask);

    return *static_cast<exact_input *>(graph.res->add_input(std::move(input)));
}

// copies: [n_embd_gqa, n_rows, n_stream]; cur: [n_embd_gqa, n_copied * n_stream]
static void store(const llm_graph_context & graph, ggml_tensor * copies, ggml_tensor * cur, ggml_tensor * rows) {
    copies = ggml_reshape_2d(graph.ctx0, copies, copies->ne[0], copies->ne[1] * copies->ne[2]);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, copies, cur, rows));
}

// copies: [n_embd_head, n_head_kv, n_rows, n_stream]; cur: [n_embd_gqa, n_tokens], of which the attended ones come behind
static ggml_tensor * append(ggml_context * ctx, ggml_tensor * copies, ggml_tensor * cur, ggml_tensor * attended) {
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
                                exact_input &             input,
                                ggml_tensor *             copies,
                                ggml_tensor *             view,
                                ggml_tensor *             cur) {
    if (cur) {
        GGML_ASSERT(cur->nb[1] == ggml_row_size(cur->type, cur->ne[0]));
        ggml_tensor * cur_2d = ggml_view_2d(graph.ctx0, cur, copies->ne[0], cur->ne[2], cur->nb[2], 0);

        const llama_turbo_exact_input & in = input.tensors;
        if (!in.attended) {
            store(graph, copies, cur_2d, in.rows);
        } else {
            view = append(graph.ctx0, view, cur_2d, in.attended);
            ggml_build_forward_expand(graph.gf, view);  // before rows are written
            store(graph, copies, ggml_get_rows(graph.ctx0, cur_2d, in.copied), in.rows);
        }
        input.keys[copies] = ggml_permute(graph.ctx0, view, 0, 2, 1, 3);
        ggml_build_forward_expand(graph.gf, input.keys[copies]);
    }

    return input.keys.at(copies);
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
static thread_local bool is_nested = false;

struct nested_scope {
    nested_scope() { is_nested = true; }

    ~nested_scope() { is_nested = false; }
};

template <typename input> bool llama_turbo_attends(input * inp, int il) {
    if (is_nested) {
        return false;
    }
    const layer_inputs in = inputs_of(inp, il);

    return llama_turbo_cache::calibrated_layer(in.mctx, il) || llama_turbo_cache::exact_layer(in.mctx, il);
}

// build_attn() without the output projection, and with K and V that have copies.
template <typename input>
static ggml_tensor * attend(const llm_graph_context & graph,
                            input *                   inp,
                            ggml_tensor *             q,
                            ggml_tensor *             k,
                            ggml_tensor *             v,
                            ggml_tensor *             kq_b,
                            ggml_tensor *             sinks,
                            ggml_tensor *             v_mla,
                            float                     kq_scale,
                            int                       il) {
    const auto build = [&] {
        const nested_scope scope;
        return graph.build_attn(inp, nullptr, nullptr, nullptr, q, k, v, kq_b, sinks, v_mla, kq_scale, il);
    };

    const layer_inputs in = inputs_of(inp, il);

    const llama_turbo_exact::layer * layer = llama_turbo_cache::exact_layer(in.mctx, il);
    if (!layer) {
        return build();
    }

    // copies are rotated like the cache, since Q is; upstream's own rotation is left out
    ggml_tensor * k_rot = std::exchange(in.k_rot, nullptr);
    ggml_tensor * v_rot = std::exchange(in.v_rot, nullptr);

    q = k_rot ? llama_turbo_rotate(graph.ctx0, q, k_rot) : q;
    k = k && k_rot ? llama_turbo_rotate(graph.ctx0, k, k_rot) : k;
    v = v && v_rot ? llama_turbo_rotate(graph.ctx0, v, v_rot) : v;

    exact_input & exact         = exact_input_of(graph, in);
    const auto [view_k, view_v] = llama_turbo_cache::exact_views(graph.ctx0, in.mctx, il);

    ggml_tensor * keys   = exact_keys(graph, exact, layer->k, view_k, k);
    ggml_tensor * values = exact_keys(graph, exact, layer->v, view_v, v);
    ggml_tensor * cur    = build();
    ggml_turbo_flash_attn_add_segment(find_flash_attn(cur), keys, values, exact.tensors.mask);

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

    const llama_turbo_calibrated_layer * found = llama_turbo_cache::calibrated_layer(inputs_of(inp, il).mctx, il);
    const llama_turbo_calibrated_layer & layer = found ? *found : none;

    ggml_context * ctx = graph.ctx0;

    // without k and v, the layer attends what another one has stored
    q = layer.q_scale ? scale_query_heads(ctx, q, layer.q_scale) : q;
    k = k ? layer.store_k(ctx, k) : k;
    v = v ? layer.store_v(ctx, v) : v;

    ggml_tensor * cur = attend(graph, inp, q, k, v, kq_b, sinks, v_mla, kq_scale, il);
    cur               = layer.restore_out(ctx, cur);
    if (found) {
        found->is_built = true;
    }

    return project(graph, wo, wo_b, wo_s, cur);
}

#define INSTANTIATE(input)                                                                                          \
    template bool          llama_turbo_attends(input *, int);                                                       \
    template ggml_tensor * llama_turbo_build_attn(const llm_graph_context &, input *, ggml_tensor *, ggml_tensor *, \
                                                  ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *,       \
                                                  ggml_tensor *, ggml_tensor *, ggml_tensor *, float, int)

INSTANTIATE(llm_graph_input_attn_kv);
INSTANTIATE(llm_graph_input_attn_kv_iswa);
