#include "log.h"

#include "compat.h"
#include "llama-impl.h"
#include "parts.h"

#include <string>
#include <utility>
#include <vector>

// Of K, or of V.
struct cache_side {
    double                 n_bits   = 0.0;
    double                 n_values = 0.0;
    std::vector<uint32_t>  ordinals;  // of layers, among those that have a KV cache
    std::vector<ggml_type> types;

    void add(const ggml_tensor * tensor, uint32_t ordinal) {
        n_bits += 8.0 * ggml_nbytes(tensor);
        n_values += ggml_nelements(tensor);
        ordinals.push_back(ordinal);
        types.push_back(tensor->type);
    }

    double bits() const { return n_values > 0.0 ? n_bits / n_values : 0.0; }
};

static std::string cache_spec(const llama_turbo_parts & parts,
                              const cache_side &        k,
                              const cache_side &        v,
                              ggml_type                 type_k,
                              ggml_type                 type_v) {
    const llama_turbo_settings & settings = parts.settings;

    std::string res = ggml_type_name(type_k);
    if (type_v != type_k) {
        res += std::string("/") + ggml_type_name(type_v);
    }
    if (settings.by_layer) {
        res += " k=" + llama_turbo_format_layers(k.ordinals, k.types);
        res += v.types.empty() ? "" : " v=" + llama_turbo_format_layers(v.ordinals, v.types);
    }
    if (parts.decay) {
        res += format(" decay=%d,%d,%d", settings.decay.hot, settings.decay.warm, settings.decay.cold);
    }
    if (parts.calibrated) {
        res += format(" cal=%08x", parts.calibrated->digest);
    }
    if (parts.exact && settings.exact.sink > 0) {
        res += format(" sink=%u", settings.exact.sink);
    }
    if (parts.exact && settings.exact.tail > 0) {
        res += format(" tail=%u", settings.exact.tail);
    }

    return res;
}

static std::string calibrated_layers(const llama_turbo_parts & parts, size_t n_layers) {
    size_t n_k_mean  = 0;
    size_t n_k_scale = 0;
    size_t n_v_mean  = 0;
    size_t n_v_scale = 0;
    for (const auto & [il, layer] : parts.calibrated_layers) {
        n_k_mean += layer->k_mean != nullptr;
        n_k_scale += layer->k_scale != nullptr || layer->k_map != nullptr;
        n_v_mean += layer->v_mean != nullptr;
        n_v_scale += layer->v_scale != nullptr;
    }

    return format(" | calibrated K %zu %zu V %zu %zu of %zu", n_k_mean, n_k_scale, n_v_mean, n_v_scale, n_layers);
}

static std::string decaying_layers(const llama_turbo_decay & decay, bool has_window) {
    if (decay.any()) {
        return format(" | decaying %zu/%zu", decay.n_layers_k(), decay.n_layers_v());
    }

    return has_window ? " | no decay: sliding window" : " | no decay: no layer of a type that decays";
}

static std::string exact_copies(const llama_turbo_exact & exact, uint32_t n_stream) {
    size_t n_bytes = 0;
    for (const auto & [il, layer] : exact.layers) {
        n_bytes += ggml_nbytes(layer.k) + ggml_nbytes(layer.v);
    }

    return format(" | copies %u rows in %u streams, %.2f MiB", exact.n_rows, n_stream, n_bytes / 1024.0 / 1024.0);
}

void llama_turbo_log_cache(const llama_kv_cache & kv, ggml_type type_k, ggml_type type_v) {
    static const llama_turbo_parts none{ llama_turbo_settings{} };

    const llama_turbo_parts * found      = llama_turbo_access::parts(kv);
    const llama_turbo_parts & parts      = found ? *found : none;
    const bool                has_window = llama_turbo_access::has_window(kv);
    const auto &              layers     = llama_turbo_access::layers(kv);

    cache_side k;
    cache_side v;
    for (const auto & layer : layers) {
        k.add(layer.k, parts.settings.index_of(layer.il));
        if (layer.v) {
            v.add(layer.v, parts.settings.index_of(layer.il));
        }
    }

    std::string text = cache_spec(parts, k, v, type_k, type_v);
    text += format(" | rotated %d/%d", llama_turbo_access::rot_k(kv, 0) != 0 || parts.maps_rotate_k,
                   llama_turbo_access::rot_v(kv, 0) != 0);
    text += format(" | bits %.3f/%.3f", k.bits(), v.bits());
    text += parts.calibrated ? calibrated_layers(parts, layers.size()) : "";
    text += parts.decay ? decaying_layers(*parts.decay, has_window) : "";
    text += parts.exact ? exact_copies(*parts.exact, llama_turbo_access::n_stream(kv)) : "";

    text += parts.settings.why_not_calibrated.empty() ? "" : " | no calibration: " + parts.settings.why_not_calibrated;
    text += parts.settings.why_not_exact.empty() ? "" : " | no exact tokens: " + parts.settings.why_not_exact;

    if (parts.decay && !parts.decay->any() && !has_window) {
        LLAMA_LOG_WARN("llama_turbo_cache: %s\n", text.c_str());  // decay was asked for, and there is none
    } else {
        LLAMA_LOG_INFO("llama_turbo_cache: %s\n", text.c_str());
    }
}
