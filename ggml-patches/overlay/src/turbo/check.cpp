#include "check.h"

#include "advice.h"
#include "auto-calibration.h"
#include "calibrate.h"
#include "draft.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "memory.h"
#include "model.h"
#include "settings.h"

#include <stdexcept>
#include <string>

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

// Ops of a layer that its device has to do, as they are in the graph, without memory.
struct layer_ops {
    ggml_context_ptr ctx = llama_turbo_tensors(32);

    ggml_tensor * store(ggml_type type, int64_t n_embd) const {
        ggml_tensor * cache = ggml_new_tensor_2d(ctx.get(), type, n_embd, 256);
        ggml_tensor * rows  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, 1);
        ggml_tensor * idxs  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);

        return ggml_set_rows(ctx.get(), cache, rows, idxs);
    }

    ggml_tensor * view(ggml_type type) const {
        return ggml_view_1d(ctx.get(), ggml_new_tensor_1d(ctx.get(), type, 256), 256, 0);
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

// A second segment of keys is an extension of an operation that all know, and backends that don't look at it say yes. So one whose
// supports_op is right about our operations says so by a function of its own.
static bool knows_our_ops(ggml_backend_dev_t dev) {
    using supports_t = bool (*)();

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (!reg) {
        return false;  // the meta device of -sm tensor
    }
    const supports_t supports = (supports_t) ggml_backend_reg_get_proc_address(reg, "ggml_turbo_ops");

    return supports && supports();
}

// What to do about a device that can't. Upstream aborts where -nkvo meets -sm tensor, whose meta device has no registry.
static const char * other_place(ggml_backend_dev_t dev) {
    return ggml_backend_dev_backend_reg(dev) ? "keep the cache in host memory with -nkvo, use -ngl 0" : "use -sm layer";
}

// What a layer needs of its device.
struct layer_needs {
    uint32_t  il;
    ggml_type type_k;
    ggml_type type_v;
    bool      flash_attn;
    bool      decays;
};

// Whether the device can keep K, or V.
static bool check_storage(ggml_backend_dev_t dev, const layer_needs & layer, ggml_type type, int64_t n_embd) {
    const layer_ops ops;
    if (!ggml_backend_dev_supports_op(dev, ops.store(type, n_embd))) {
        LLAMA_LOG_ERROR("%s: device %s can't store cache type %s of layer %u: %s, or another cache type\n", __func__,
                        ggml_backend_dev_name(dev), ggml_type_name(type), layer.il, other_place(dev));
        return false;
    }
    if (layer.decays && ggml_turbo_decays(type) &&
        !(knows_our_ops(dev) && ggml_backend_dev_supports_op(dev, ops.decay(type, n_embd)))) {
        LLAMA_LOG_ERROR(
            "%s: device %s can't do temporal decay of cache type %s in layer %u: %s, or leave "
            "TURBO_CACHE_DECAY and --cache-decay out\n",
            __func__, ggml_backend_dev_name(dev), ggml_type_name(type), layer.il, other_place(dev));
        return false;
    }

    return true;
}

static bool check_attention(ggml_backend_dev_t dev, const llama_hparams & hparams, const layer_needs & layer) {
    const uint32_t n_embd_head_k = hparams.n_embd_head_k(layer.il);
    const uint32_t n_embd_head_v = hparams.n_embd_head_v(layer.il);

    const layer_ops ops;
    if (layer.flash_attn && !ggml_backend_dev_supports_op(
                                dev, ops.attend(hparams, layer.il, layer.type_k, layer.type_v, /*exact =*/false))) {
        LLAMA_LOG_ERROR(
            "%s: device %s has no flash attention for K in %s, V in %s and the head sizes %u/%u of layer %u: %s, or "
            "other cache types\n",
            __func__, ggml_backend_dev_name(dev), ggml_type_name(layer.type_k), ggml_type_name(layer.type_v),
            n_embd_head_k, n_embd_head_v, layer.il, other_place(dev));
        return false;
    }

    return true;
}

static bool check_devices(const llama_model & model, const llama_turbo_settings & settings, bool flash_attn) {
    const llama_hparams & hparams = model.hparams;
    for (size_t i = 0; i < settings.layers.size(); ++i) {
        const uint32_t il = settings.layers[i];

        layer_needs layer;
        layer.il         = il;
        layer.type_k     = settings.types_k[i];
        layer.type_v     = settings.types_v[i];
        layer.flash_attn = flash_attn;
        layer.decays     = settings.decay.cold > 0 && !hparams.is_swa(il);

        ggml_backend_dev_t dev = model.dev_layer(il);
        if (!check_storage(dev, layer, layer.type_k, hparams.n_embd_k_gqa(il)) ||
            !check_storage(dev, layer, layer.type_v, hparams.n_embd_v_gqa(il)) ||
            !check_attention(dev, hparams, layer)) {
            return false;
        }
    }

    return true;
}

// Wherever layers and cache are, the part of a graph that a device gets can have views of the cache. All devices take views of any type,
// but for those behind a server that does not know the type.
static bool check_views(const llama_model & model, const llama_turbo_settings & settings) {
    for (const auto & device : model.devices) {
        for (const auto * types : { &settings.types_k, &settings.types_v }) {
            for (ggml_type type : *types) {
                const layer_ops ops;
                if (!ggml_backend_dev_supports_op(device.dev, ops.view(type))) {
                    LLAMA_LOG_ERROR(
                        "%s: device %s (%s) does not know cache type %s: start ggml-rpc-server of this patched build "
                        "there, leave it out of --rpc, or use -ctk f16 -ctv f16\n",
                        __func__, ggml_backend_dev_name(device.dev), ggml_backend_dev_description(device.dev),
                        ggml_type_name(type));
                    return false;
                }
            }
        }
    }

    return true;
}

// Biases of scores by position, as T5 has them, leave no room for flash attention.
static bool has_position_bias(const llama_model & model) {
    return model.arch == LLM_ARCH_T5;
}

// Why there can't be an exact sink and tail, "" if there can, and what else than leaving them out helps.
struct no_exact {
    std::string  why;
    const char * cure = "";
};

static no_exact why_not_exact(const llama_model &          model,
                              const llama_turbo_settings & settings,
                              const llama_context_params & params) {
    if (const char * why = llama_turbo_cant_attend(model)) {
        return { why };
    }
    if (has_position_bias(model)) {
        return { "its scores have biases by position" };
    }
    for (const auto & device : model.devices) {
        if (!knows_our_ops(device.dev)) {  // the scheduler may give it attention, wherever the cache is
            return { format("device %s can't attend them", ggml_backend_dev_name(device.dev)),
                     ", or use no such device (-dev none)" };
        }
    }
    for (size_t i = 0; i < settings.layers.size() && params.offload_kqv; ++i) {
        const uint32_t  il     = settings.layers[i];
        const ggml_type type_k = settings.types_k[i];
        const ggml_type type_v = settings.types_v[i];

        ggml_backend_dev_t dev = model.dev_layer(il);
        const layer_ops    ops;
        if (!knows_our_ops(dev) ||
            !ggml_backend_dev_supports_op(dev, ops.attend(model.hparams, il, type_k, type_v, /*exact =*/true))) {
            return { format("device %s can't attend them beside K in %s, V in %s and the head sizes %u/%u of layer %u",
                            ggml_backend_dev_name(dev), ggml_type_name(type_k), ggml_type_name(type_v),
                            model.hparams.n_embd_head_k(il), model.hparams.n_embd_head_v(il), il),
                     ", or keep the cache in host memory with -nkvo" };
        }
    }

    return {};
}

static bool check_exact(const llama_model &          model,
                        llama_turbo_settings &       settings,
                        const llama_context_params & params) {
    const auto [why, cure] = why_not_exact(model, settings, params);
    if (why.empty()) {
        return true;
    }
    if (settings.exact_by_default) {
        settings.exact         = {};
        settings.why_not_exact = why;
        return true;
    }
    LLAMA_LOG_ERROR("%s: this model can't have an exact sink and tail: %s: leave out --cache-sink and --cache-tail%s\n",
                    __func__, why.c_str(), cure);

    return false;
}

// Without flash attention V has to be turned over, which a turbo type can't be.
static bool check_position_bias(const llama_model & model, const llama_turbo_settings & settings) {
    for (ggml_type type : settings.types_v) {
        if (has_position_bias(model) && ggml_is_turbo(type)) {
            LLAMA_LOG_ERROR(
                "%s: V cache type %s needs flash attention, which this architecture does not support: use -ctv f16\n",
                __func__, ggml_type_name(type));
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

    return settings.exact ? "an exact sink and tail (--cache-sink, --cache-tail)" : "";
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

static bool check_settings(const llama_model & model, llama_turbo_settings & settings, llama_context_params & params) {
    const bool turbo = ggml_is_turbo(params.type_k) || ggml_is_turbo(params.type_v);
    if (!turbo && !settings.by_layer && !settings.exact) {
        return true;  // upstream's own checks
    }

    if (!check_views(model, settings) || (settings.exact && !check_exact(model, settings, params))) {
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

    return check_position_bias(model, settings) && (!flash_attn || check_flash_attn(model, what, params)) &&
           check_head_sizes(model.hparams, settings) &&
           (!params.offload_kqv || check_devices(model, settings, flash_attn));
}

static void calibrate(llama_model & model, const llama_context_params & params, llama_turbo_settings & settings) {
    std::string & why    = settings.why_not_calibrated;
    settings.calibration = llama_turbo_auto_calibration(model, params, settings.layers, why);
    if (!why.empty()) {
        LLAMA_LOG_WARN("%s: the KV cache is not calibrated, and loses more: %s\n", __func__, why.c_str());
    }
}

bool llama_turbo_check_context(llama_model & model, llama_context_params & params) {
    llama_turbo_settings settings;
    if (llama_turbo_is_observing()) {
        settings.observes = true;
        llama_turbo_use_settings(std::move(settings));
        return true;
    }
    try {
        settings = llama_turbo_read_settings(model, params);
        if (params.ctx_other == LLAMA_TURBO_DRAFT) {
            params.ctx_other = nullptr;
        }
        if (!check_settings(model, settings, params)) {
            return false;
        }
    } catch (const std::invalid_argument & error) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
    if (settings.calibrates) {
        calibrate(model, params, settings);
    }
    llama_turbo_advise(model, settings);
    llama_turbo_use_settings(std::move(settings));

    return true;
}
