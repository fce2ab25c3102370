#include "calibrated.h"

#include "ggml-backend.h"
#include "llama-model.h"
#include "memory.h"
#include "rotation.h"

#include <set>

//
// tensors
//

llama_turbo_calibrated::llama_turbo_calibrated(const llama_turbo_calibration & calibration,
                                               const llama_model &             model,
                                               const std::vector<uint32_t> &   layers,
                                               bool                            is_rotated) :
    digest(calibration.digest()) {
    std::set<ggml_backend_buffer_type_t> bufts;
    for (uint32_t il : layers) {
        if (calibration.layers.count(il) > 0) {
            by_number[il];
            bufts.insert(ggml_backend_dev_buffer_type(model.dev_layer(il)));
        }
    }
    for (ggml_backend_buffer_type_t buft : bufts) {
        allocate(calibration, model, buft, is_rotated);
    }
}

static std::vector<float> inverse_of(std::vector<float> values) {
    for (float & value : values) {
        value = 1.0f / value;
    }

    return values;
}

void llama_turbo_calibrated::allocate(const llama_turbo_calibration & calibration,
                                      const llama_model &             model,
                                      ggml_backend_buffer_type_t      buft,
                                      bool                            is_rotated) {
    ggml_context_ptr ctx = llama_turbo_tensors(9 * by_number.size());

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

    const auto add_map = [&](const char * name, uint32_t il, std::vector<float> values) {
        ggml_tensor * tensor = nullptr;
        if (!values.empty()) {
            const int64_t n = model.hparams.n_embd_head_k(il);
            if (is_rotated) {
                llama_turbo_rotate_rows(values, n);
            }
            tensor = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n, n, model.hparams.n_head_kv(il));
            ggml_format_name(tensor, "turbo_%s_l%u", name, il);
            contents.emplace_back(tensor, std::move(values));
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
        layer.k_map     = add_map("k_map", il, values.k_map);
        layer.q_map     = add_map("q_map", il, values.q_map);
        layer.q_scale   = add("q_scale", il, inverse_of(values.k_scale), true);
        layer.v_mean    = add("v_mean", il, values.v_mean, false);
        layer.v_scale   = add("v_scale", il, values.v_scale, false);
        layer.out_scale = add("out_scale", il, inverse_of(values.v_scale), true);
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

// Heads [n_embd_head, n_head, n_tokens], each multiplied by the matrix of its KV head. They are never laid out for a product of matrices, which
// is faster for one token of many heads, and adds up in another order than that of several tokens: drafts would be verified with other bits.
static ggml_tensor * map_heads(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * map) {
    ggml_tensor * res = ggml_permute(ctx, ggml_mul_mat(ctx, map, ggml_permute(ctx, cur, 0, 2, 1, 3)), 0, 2, 1, 3);
    res               = ggml_is_contiguous(res) ? res : ggml_cont(ctx, res);

    return ggml_reshape_3d(ctx, res, cur->ne[0], cur->ne[1], cur->ne[2]);
}

ggml_tensor * llama_turbo_calibrated_layer::store_k(ggml_context * ctx, ggml_tensor * k) const {
    k = k_mean ? ggml_sub(ctx, k, k_mean) : k;
    k = k_map ? map_heads(ctx, k, k_map) : k;
    return k_scale ? ggml_mul(ctx, k, k_scale) : k;
}

ggml_tensor * llama_turbo_calibrated_layer::restore_k(ggml_context * ctx, ggml_tensor * k) const {
    k = k_map ? map_heads(ctx, k, ggml_cont(ctx, ggml_transpose(ctx, q_map))) : k;
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

ggml_tensor * llama_turbo_calibrated_layer::map_q(ggml_context * ctx, ggml_tensor * q) const {
    q = q_map ? map_heads(ctx, q, q_map) : q;
    return q_scale ? scale_query_heads(ctx, q, q_scale) : q;
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
