#include "llama-turbo-attn.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "llama-turbo-cache.h"

#include <set>
#include <stdexcept>

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
    const ggml_init_params params = {
        /*.mem_size   =*/5 * by_number.size() * ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ggml_context_ptr ctx{ ggml_init(params) };

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
        layer.v_scale   = add("v_scale", il, values.v_scale, false);
        layer.out_scale = add("out_scale", il, inverse(values.v_scale), true);
    }

    ggml_backend_buffer_ptr buffer;
    if (model.hparams.no_alloc) {
        buffer.reset(ggml_backend_buft_alloc_buffer(buft, /*size =*/0));
        for (auto & [tensor, values] : contents) {
            tensor->buffer = buffer.get();  // so that the scheduler does not allocate it
        }
    } else {
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    }
    if (!buffer) {
        throw std::runtime_error("failed to allocate the calibration of the KV cache");
    }
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

// Multiplies all query heads of a KV head by its scale.
//   cur:   view of [n_embd_head, n_head, n_tokens]
//   scale: [n_embd_head, 1, n_head_kv]
static ggml_tensor * scale_query_heads(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * scale) {
    const int64_t n_head  = cur->ne[1];
    const int64_t n_group = n_head / scale->ne[2];

    ggml_tensor * groups = ggml_view_4d(ctx, cur, cur->ne[0], n_group, scale->ne[2], cur->ne[2], cur->nb[1],
                                        cur->nb[1] * n_group, cur->nb[2], 0);

    return ggml_reshape_3d(ctx, ggml_mul(ctx, groups, scale), cur->ne[0], n_head, cur->ne[2]);
}

static const llama_turbo_calibrated_layer * find(const llm_graph_input_attn_kv * inp, int il) {
    return llama_turbo_cache::calibrated_layer(*inp->mctx, il);
}

static const llama_turbo_calibrated_layer * find(const llm_graph_input_attn_kv_iswa * inp, int il) {
    return llama_turbo_cache::calibrated_layer(inp->hparams.is_swa(il) ? *inp->mctx->get_swa() : *inp->mctx->get_base(),
                                               il);
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

// in llama_turbo_build_attn(), which calls build_attn() again
static thread_local bool is_nested = false;

template <typename input> bool llama_turbo_is_calibrated(const input * inp, int il) {
    return !is_nested && find(inp, il);
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
    const llama_turbo_calibrated_layer & layer = *find(inp, il);

    ggml_context * ctx = graph.ctx0;

    // without k and v, the layer attends what another one has stored
    q = layer.q_scale ? scale_query_heads(ctx, q, layer.q_scale) : q;
    k = k ? layer.store_k(ctx, k) : k;
    v = v && layer.v_scale ? ggml_mul(ctx, v, layer.v_scale) : v;

    is_nested         = true;
    ggml_tensor * cur = graph.build_attn(inp, nullptr, nullptr, nullptr, q, k, v, kq_b, sinks, v_mla, kq_scale, il);
    is_nested         = false;

    if (layer.out_scale) {
        const int64_t n_embd_head = layer.out_scale->ne[0];

        ggml_tensor * heads = ggml_reshape_3d(ctx, cur, n_embd_head, cur->ne[0] / n_embd_head, cur->ne[1]);
        heads               = scale_query_heads(ctx, heads, layer.out_scale);
        cur                 = ggml_reshape_2d(ctx, heads, cur->ne[0], cur->ne[1]);
    }
    layer.is_built = true;

    return project(graph, wo, wo_b, wo_s, cur);
}

#define INSTANTIATE(input)                                                                                          \
    template bool          llama_turbo_is_calibrated(const input *, int);                                           \
    template ggml_tensor * llama_turbo_build_attn(const llm_graph_context &, input *, ggml_tensor *, ggml_tensor *, \
                                                  ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *,       \
                                                  ggml_tensor *, ggml_tensor *, ggml_tensor *, float, int)

INSTANTIATE(llm_graph_input_attn_kv);
INSTANTIATE(llm_graph_input_attn_kv_iswa);
