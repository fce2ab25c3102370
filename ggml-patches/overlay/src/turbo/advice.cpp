#include "advice.h"

#include "ggml-backend.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>

// K of so many bits loses little on any model.
static constexpr double MANY_BITS = 8.0;

// Root mean square of the biases of a layer's K. What they are added to is about 1, since it comes from a norm.
static constexpr double LARGE_BIAS = 4.0;

// Largest weight of a norm of K, over the root mean square of all.
static constexpr double LARGE_NORM = 6.0;

// Distance of a token's K from the mean, over that of others.
static constexpr double LARGE_DISTANCE = 2.0;

static bool has_few_bits(ggml_type type) {
    return ggml_is_quantized(type) && 8.0 * ggml_type_size(type) / ggml_blck_size(type) < MANY_BITS;
}

// The part of a small tensor of the model that belongs to K; empty: there is no such tensor.
static std::vector<float> values_of_k(const llama_model & model, uint32_t il, const char * name) {
    const std::string   full   = format("blk.%u.%s", il, name);
    const ggml_tensor * tensor = model.get_tensor(full.c_str());
    if (!tensor || tensor->type != GGML_TYPE_F32) {
        return {};
    }
    std::vector<float> res(ggml_nelements(tensor));
    ggml_backend_tensor_get(tensor, res.data(), 0, ggml_nbytes(tensor));

    const size_t n_q = (size_t) model.hparams.n_head(il) * model.hparams.n_embd_head_k(il);
    const size_t n_k = model.hparams.n_embd_k_gqa(il);
    if (res.size() > n_q + n_k) {  // Q, K and V in one
        res = { res.begin() + n_q, res.begin() + n_q + n_k };
    }

    return res;
}

static double rms_of(const std::vector<float> & values) {
    double sum = 0.0;
    for (float value : values) {
        sum += value * value;
    }

    return values.empty() ? 0.0 : std::sqrt(sum / values.size());
}

static double max_of(const std::vector<float> & values) {
    double res = 0.0;
    for (float value : values) {
        res = std::max<double>(res, std::fabs(value));
    }

    return res;
}

// What makes K of a layer hard to quantize; "": nothing that the weights show.
static std::string what_ruins(const llama_model & model, uint32_t il) {
    for (const char * name : { "attn_k.bias", "attn_qkv.bias" }) {
        const std::vector<float> bias = values_of_k(model, il, name);
        if (rms_of(bias) > LARGE_BIAS) {
            return format("biases of K of up to %.0f in layer %u", max_of(bias), il);
        }
    }
    const std::vector<float> norm = values_of_k(model, il, "attn_k_norm.weight");
    if (max_of(norm) > LARGE_NORM * rms_of(norm)) {
        return format("a weight of %.0f in the norm of K in layer %u", max_of(norm), il);
    }

    return "";
}

static void advise_calibration(const llama_model & model, const llama_turbo_settings & settings) {
    for (size_t i = 0; i < settings.layers.size(); ++i) {
        const std::string what = has_few_bits(settings.types_k[i]) ? what_ruins(model, settings.layers[i]) : "";
        if (!what.empty()) {
            // llama-cli shows errors only, and wrong answers are one
            LLAMA_LOG_ERROR(
                "%s: this model has %s: K in %s is likely to ruin its answers: use --cache-calibration auto, or -ctk "
                "q8_0\n",
                "llama_turbo_cache", what.c_str(), ggml_type_name(settings.types_k[i]));
            return;
        }
    }
}

static void advise_sink(const llama_turbo_settings & settings) {
    const llama_turbo_calibration & calibration = *settings.calibration;
    if (calibration.sink_distance > LARGE_DISTANCE && settings.exact.sink <= calibration.sink) {
        LLAMA_LOG_WARN(
            "%s: token %u of a sequence is an attention sink of this model (its K lies %.1f times as far from the mean "
            "as that of "
            "others), and a calibration costs quality there: use --cache-sink 4\n",
            "llama_turbo_cache", calibration.sink, calibration.sink_distance);
    }
}

void llama_turbo_advise(const llama_model & model, const llama_turbo_settings & settings) {
    if (model.hparams.no_alloc) {
        return;
    }
    if (settings.calibration) {
        advise_sink(settings);
    } else {
        advise_calibration(model, settings);
    }
}
