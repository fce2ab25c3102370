#include "llama-turbo.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-turbo-cache.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

// upstream rotates head sizes that are multiples of this, ours is the rest
static constexpr int64_t UPSTREAM_GROUP_MIN = 64;

static bool env_is_set(const char * name) {
    const char * value = getenv(name);
    return value && atoi(value) != 0;
}

//
// memory
//

ggml_context_ptr llama_turbo_tensors(size_t n) {
    const ggml_init_params params = {
        /*.mem_size   =*/n * ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };

    return ggml_context_ptr{ ggml_init(params) };
}

ggml_backend_buffer_ptr llama_turbo_allocate(const llama_model &        model,
                                             ggml_context *             tensors,
                                             ggml_backend_buffer_type_t buft,
                                             const char *               what) {
    ggml_backend_buffer_ptr res;
    if (model.hparams.no_alloc) {
        res.reset(ggml_backend_buft_alloc_buffer(buft, /*size =*/0));
        for (ggml_tensor * t = ggml_get_first_tensor(tensors); t; t = ggml_get_next_tensor(tensors, t)) {
            t->buffer = res.get();  // so that the scheduler does not allocate it
        }
    } else {
        res.reset(ggml_backend_alloc_ctx_tensors_from_buft(tensors, buft));
    }
    if (!res) {
        throw std::runtime_error(std::string("failed to allocate the ") + what + " of the KV cache");
    }

    return res;
}

//
// context check
//

// Whether every layer's head size can be cut into blocks of its type.
static bool check_head_sizes(const llama_hparams & hparams, const llama_turbo_settings & settings) {
    for (size_t i = 0; i < settings.layers.size(); ++i) {
        const uint32_t il = settings.layers[i];
        for (bool is_k : { true, false }) {
            const ggml_type type        = is_k ? settings.types_k[i] : settings.types_v[i];
            const uint32_t  blck_size   = ggml_blck_size(type);
            const uint32_t  n_embd_head = is_k ? hparams.n_embd_head_k(il) : hparams.n_embd_head_v(il);
            if (n_embd_head % blck_size != 0) {
                LLAMA_LOG_ERROR(
                    "%s: %s cache type %s needs a head size that is a multiple of %u, but layer %u has %u: use -ct%s "
                    "f16 or bf16\n",
                    __func__, is_k ? "K" : "V", ggml_type_name(type), blck_size, il, n_embd_head, is_k ? "k" : "v");
                return false;
            }
        }
    }

    return true;
}

bool llama_turbo_has_latent_attention(const llama_model & model) {
    // by name: not all supported upstreams have an enumerator for DeepSeek-V4
    return model.hparams.is_mla() || model.hparams.n_lora_kv > 0 ||
           std::string(llm_arch_name(model.arch)) == "deepseek4";
}

// Ops of a layer that its device has to do, as they are in the graph, without memory.
struct layer_ops {
    ggml_context_ptr ctx;

    layer_ops() {
        const ggml_init_params params = {
            /*.mem_size   =*/32 * ggml_tensor_overhead(),
            /*.mem_buffer =*/nullptr,
            /*.no_alloc   =*/true,
        };
        ctx.reset(ggml_init(params));
    }

    ggml_tensor * store(ggml_type type, int64_t n_embd) const {
        ggml_tensor * cache = ggml_new_tensor_2d(ctx.get(), type, n_embd, 256);
        ggml_tensor * rows  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, 1);
        ggml_tensor * idxs  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);

        return ggml_set_rows(ctx.get(), cache, rows, idxs);
    }

    ggml_tensor * decay(ggml_type type, int64_t n_embd) const {
        return ggml_turbo_decay(ctx.get(), ggml_new_tensor_2d(ctx.get(), type, n_embd, 256));
    }

    ggml_tensor * attend(const llama_hparams & hparams,
                         uint32_t              il,
                         ggml_type             type_k,
                         ggml_type             type_v,
                         bool                  exact) const {
        const int64_t n_head_kv = hparams.n_head_kv(il);

        const auto rows = [&](ggml_type type, int64_t n_embd_head) {
            return ggml_new_tensor_3d(ctx.get(), type, n_embd_head, 256, n_head_kv);
        };
        const auto mask = [&] {
            return ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 256, 64);
        };

        ggml_tensor * q =
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, hparams.n_head(il));

        const int64_t n_embd_head_k = hparams.n_embd_head_k(il);
        const int64_t n_embd_head_v = hparams.n_embd_head_v(il);

        const float softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;

        ggml_tensor * op = ggml_flash_attn_ext(ctx.get(), q, rows(type_k, n_embd_head_k), rows(type_v, n_embd_head_v),
                                               mask(), 1.0f, hparams.f_max_alibi_bias, softcap);
        if (exact) {
            ggml_turbo_flash_attn_add_segment(op, rows(GGML_TYPE_F16, n_embd_head_k),
                                              rows(GGML_TYPE_F16, n_embd_head_v), mask());
        }
        return op;
    }
};

// Decay is a custom operation, and a second segment of keys an extension of one that all know. Backends that forward operations, such as
// RPC, say yes to the first, and those that don't look to the second; so the ones that know both are named.
static bool knows_our_ops(ggml_backend_dev_t dev) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (!reg) {
        return false;  // the meta device of -sm tensor
    }
    const std::string name = ggml_backend_reg_name(reg);

    return name == "CPU" || name == "CUDA" || name == "ROCm";
}

// flash_attn, decays, exact: whether the layer needs it
static bool check_device(const llama_model & model,
                         uint32_t            il,
                         ggml_type           type_k,
                         ggml_type           type_v,
                         bool                flash_attn,
                         bool                decays,
                         bool                exact) {
    const llama_hparams & hparams = model.hparams;
    const layer_ops       ops;

    ggml_backend_dev_t dev = model.dev_layer(il);

    const std::pair<ggml_type, int64_t> caches[] = {
        { type_k, hparams.n_embd_k_gqa(il) },
        { type_v, hparams.n_embd_v_gqa(il) },
    };
    for (const auto & [type, n_embd] : caches) {
        if (!ggml_backend_dev_supports_op(dev, ops.store(type, n_embd))) {
            LLAMA_LOG_ERROR(
                "%s: device %s can't store cache type %s of layer %u: keep the cache in host memory with -nkvo, or "
                "use -ngl 0\n",
                __func__, ggml_backend_dev_name(dev), ggml_type_name(type), il);
            return false;
        }
        if (decays && ggml_turbo_decays(type) &&
            !(knows_our_ops(dev) && ggml_backend_dev_supports_op(dev, ops.decay(type, n_embd)))) {
            LLAMA_LOG_ERROR(
                "%s: device %s can't do temporal decay of cache type %s in layer %u: leave TURBO_DECAY and "
                "--cache-decay out, keep the cache in host memory with -nkvo, or use -ngl 0\n",
                __func__, ggml_backend_dev_name(dev), ggml_type_name(type), il);
            return false;
        }
    }

    if (exact && !(knows_our_ops(dev) &&
                   ggml_backend_dev_supports_op(dev, ops.attend(hparams, il, type_k, type_v, /*exact =*/true)))) {
        LLAMA_LOG_ERROR(
            "%s: device %s can't attend an exact sink and tail beside K in %s, V in %s and the head sizes %u/%u of "
            "layer "
            "%u: leave out --cache-sink and --cache-tail, or keep the cache in host memory with -nkvo\n",
            __func__, ggml_backend_dev_name(dev), ggml_type_name(type_k), ggml_type_name(type_v),
            hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), il);
        return false;
    }
    if (flash_attn && !ggml_backend_dev_supports_op(dev, ops.attend(hparams, il, type_k, type_v, /*exact =*/false))) {
        LLAMA_LOG_ERROR(
            "%s: device %s has no flash attention for K in %s, V in %s and the head sizes %u/%u of layer %u: keep "
            "the cache in host memory with -nkvo, use -ngl 0, or other cache types\n",
            __func__, ggml_backend_dev_name(dev), ggml_type_name(type_k), ggml_type_name(type_v),
            hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), il);
        return false;
    }

    return true;
}

static bool check_devices(const llama_model & model, const llama_turbo_settings & settings, bool flash_attn) {
    for (size_t i = 0; i < settings.layers.size(); ++i) {
        const bool decays = settings.decay.cold > 0 && !model.hparams.is_swa(settings.layers[i]);
        if (!check_device(model, settings.layers[i], settings.types_k[i], settings.types_v[i], flash_attn, decays,
                          (bool) settings.exact)) {
            return false;
        }
    }

    return true;
}

// The scheduler may give attention to any device of the model, wherever the cache is.
static bool check_exact(const llama_model & model) {
    if (const char * why = llama_turbo_cant_attend(model)) {
        LLAMA_LOG_ERROR(
            "%s: this model can't have an exact sink and tail: %s: leave out --cache-sink and --cache-tail\n", __func__,
            why);
        return false;
    }
    for (const auto & device : model.devices) {
        if (!knows_our_ops(device.dev)) {
            LLAMA_LOG_ERROR(
                "%s: device %s can't attend an exact sink and tail: leave out --cache-sink and --cache-tail, or use "
                "--device none\n",
                __func__, ggml_backend_dev_name(device.dev));
            return false;
        }
    }

    return true;
}

// What needs flash attention: turbo types, V in any quantized type, an exact sink and tail. "": nothing.
static std::string what_needs_flash_attn(const llama_turbo_settings & settings, const llama_context_params & params) {
    const auto cache_type = [](ggml_type type) {
        return std::string("cache type ") + ggml_type_name(type);
    };
    for (ggml_type type : { params.type_k, params.type_v }) {
        if (ggml_is_turbo(type)) {
            return cache_type(type);
        }
    }
    for (size_t i = 0; i < settings.layers.size(); ++i) {
        if (ggml_is_turbo(settings.types_k[i])) {
            return cache_type(settings.types_k[i]);
        }
        if (ggml_is_quantized(settings.types_v[i])) {
            return cache_type(settings.types_v[i]);
        }
    }

    return settings.exact ? "a window of exact tokens (--cache-sink, --cache-tail)" : "";
}

static bool check_flash_attn(const llama_model & model, const std::string & what, llama_context_params & params) {
    if (model.arch == LLM_ARCH_GROK) {
        LLAMA_LOG_ERROR(
            "%s: %s needs flash attention, which this architecture does not support: use -ctk f16 -ctv f16, without "
            "--cache-sink and --cache-tail\n",
            __func__, what.c_str());
        return false;
    }

    if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        LLAMA_LOG_ERROR("%s: %s needs flash attention, which was switched off: use -fa auto or -fa on\n", __func__,
                        what.c_str());
        return false;
    }

    if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
        LLAMA_LOG_INFO("%s: enabling flash_attn since it is required for %s\n", __func__, what.c_str());
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    }

    return true;
}

static bool check_settings(const llama_model &          model,
                           const llama_turbo_settings & settings,
                           llama_context_params &       params) {
    const bool turbo = ggml_is_turbo(params.type_k) || ggml_is_turbo(params.type_v);
    if (!turbo && !settings.by_layer && !settings.exact) {
        return true;  // upstream's own checks
    }

    if (settings.exact && !check_exact(model)) {
        return false;
    }
    if (llama_turbo_has_latent_attention(model)) {
        LLAMA_LOG_ERROR(
            "%s: turbo cache types and cache types by layer do not support models with multi-head latent attention "
            "yet: use -ctk f16 or q8_0\n",
            __func__);
        return false;
    }

    const std::string what       = what_needs_flash_attn(settings, params);
    const bool        flash_attn = !what.empty();

    return (!flash_attn || check_flash_attn(model, what, params)) && check_head_sizes(model.hparams, settings) &&
           (!params.offload_kqv || check_devices(model, settings, flash_attn));
}

bool llama_turbo_check_context(const llama_model & model, llama_context_params & params) {
    try {
        llama_turbo_settings settings = llama_turbo_read_settings(model, params);
        if (!check_settings(model, settings, params)) {
            return false;
        }
        llama_turbo_use_settings(std::move(settings));
    } catch (const std::invalid_argument & error) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }

    return true;
}

//
// rotation
//

static int64_t rotation_group(int64_t n_embd_head, int64_t group_max) {
    int64_t group = 1;
    while (group < group_max && n_embd_head % (2 * group) == 0) {
        group *= 2;
    }

    return group;
}

int64_t llama_turbo_rotation_group(int64_t n_embd_head) {
    return rotation_group(n_embd_head, 128);
}

bool llama_turbo_rotates(ggml_type type) {
    return ggml_is_turbo(type) || (type == GGML_TYPE_F32 && env_is_set("LLAMA_TURBO_ROTATE_F32"));
}

// Sylvester's construction: H[i][j] = (-1)^popcount(i & j) / sqrt(n)
static std::vector<float> hadamard_matrix(int64_t n) {
    std::vector<float> res(n * n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            bool odd = false;
            for (int64_t bits = i & j; bits != 0; bits &= bits - 1) {
                odd = !odd;
            }
            res[i * n + j] = (odd ? -1.0f : 1.0f) / sqrtf(n);
        }
    }

    return res;
}

template <typename T>
void llama_turbo_init_rotation(ggml_type                                         type_k,
                               ggml_type                                         type_v,
                               int32_t                                           n_embd_head_k,
                               int32_t                                           n_embd_head_v,
                               T &                                               rot_k,
                               T &                                               rot_v,
                               std::unordered_map<int64_t, std::vector<float>> & hadamard,
                               bool                                              is_mixed) {
    if (env_is_set("LLAMA_ATTN_ROT_DISABLE")) {
        return;
    }

    const auto init = [&](ggml_type type, int32_t n_embd_head, T & rot, int64_t group_max) {
        const int64_t group = n_embd_head > 0 ? rotation_group(n_embd_head, group_max) : 0;
        if (is_mixed && group >= UPSTREAM_GROUP_MIN && ggml_is_quantized(type)) {
            rot = group;
        }
        if (!llama_turbo_rotates(type) || n_embd_head == 0) {
            return;
        }
        if (n_embd_head < 0) {
            throw std::runtime_error(std::string("cache type ") + ggml_type_name(type) +
                                     " does not support layers of different head sizes in one cache: use q8_0 or f16");
        }
        rot = group;
        if (group < UPSTREAM_GROUP_MIN && hadamard.count(group) == 0) {
            hadamard[group] = hadamard_matrix(group);
        }
    };

    init(type_k, n_embd_head_k, rot_k, n_embd_head_k);
    init(type_v, n_embd_head_v, rot_v, UPSTREAM_GROUP_MIN);
}

template void llama_turbo_init_rotation(ggml_type,
                                        ggml_type,
                                        int32_t,
                                        int32_t,
                                        bool &,
                                        bool &,
                                        std::unordered_map<int64_t, std::vector<float>> &,
                                        bool);
template void llama_turbo_init_rotation(ggml_type,
                                        ggml_type,
                                        int32_t,
                                        int32_t,
                                        uint32_t &,
                                        uint32_t &,
                                        std::unordered_map<int64_t, std::vector<float>> &,
                                        bool);

ggml_tensor * llama_turbo_build_rot(ggml_context * ctx, int32_t n_embd_head, const char * name) {
    if (n_embd_head % UPSTREAM_GROUP_MIN == 0) {
        return nullptr;
    }

    const int64_t group = llama_turbo_rotation_group(n_embd_head);

    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, group, group);
    ggml_set_input(res);
    ggml_set_name(res, name);

    return res;
}

//
// K-shift
//

// Head size of a view of the cache [n_rot, n_head_kv, n_cells], whose rows may be a part of the head.
static int64_t n_embd_head_of(const ggml_tensor * cur) {
    return cur->nb[1] / ggml_type_size(cur->type) * ggml_blck_size(cur->type);
}

// llama-impl.h has the same since 0.3.34 only
ggml_tensor * llama_turbo_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
    const int64_t n = rot->ne[0];

    ggml_tensor * groups = ggml_is_contiguous(cur) ? ggml_reshape_2d(ctx, cur, n, ggml_nelements(cur) / n) :
                                                     ggml_cont_2d(ctx, cur, n, ggml_nelements(cur) / n);

    ggml_tensor * res = ggml_mul_mat(ctx, rot, groups);
    ggml_mul_mat_set_hint(res, GGML_HINT_SRC0_IS_HADAMARD);

    return ggml_reshape_3d(ctx, res, cur->ne[0], cur->ne[1], cur->ne[2]);
}

bool llama_turbo_shifts(const ggml_tensor * cur, const ggml_tensor * rot, bool is_mixed) {
    if (llama_turbo_rotates(cur->type) || cur->type == GGML_TYPE_BF16) {
        return true;
    }
    if (is_mixed && rot && !ggml_is_quantized(cur->type)) {
        return true;
    }

    const bool is_whole_head = cur->ne[0] == n_embd_head_of(cur);
    return ggml_is_quantized(cur->type) && cur->view_offs == 0 && (!rot || !is_whole_head);
}

ggml_tensor * llama_turbo_build_shift(ggml_context *                                      ctx,
                                      ggml_tensor *                                       cur,
                                      ggml_tensor *                                       rot,
                                      const std::function<ggml_tensor *(ggml_tensor *)> & rope) {
    // models with RoPE at the end of the head are refused by llama_turbo_check_context
    GGML_ASSERT(cur->view_offs == 0);

    // the rotation mixes the whole head, so all of it is decoded, also where RoPE covers only its beginning
    ggml_tensor * k =
        ggml_view_3d(ctx, cur->view_src, n_embd_head_of(cur), cur->ne[1], cur->ne[2], cur->nb[1], cur->nb[2], 0);

    ggml_tensor * res = ggml_cast(ctx, k, GGML_TYPE_F32);
    if (rot) {
        res = llama_turbo_rotate(ctx, res, rot);
    }
    res = rope(res);
    if (rot) {
        res = llama_turbo_rotate(ctx, res, rot);
    }

    return ggml_cpy(ctx, res, k);
}
