#include "settings.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "model.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

static std::string env_text(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

// The value of a variable, or where it is not set (set to nothing: none) of the one that had its part in the last release. It warns for each
// context: programs make their first one without a log, to measure memory.
static std::string env_text(const char * name, const char * old_name) {
    const std::string old_text = env_text(old_name);
    if (getenv(name) || old_text.empty()) {
        return env_text(name);
    }
    LLAMA_LOG_WARN("llama_turbo_cache: %s is now %s; the old name will go with the next release\n", old_name, name);

    return old_text;
}

// rest: where it is not set
static uint32_t env_tokens(const char * name, const char * option, uint32_t rest) {
    static constexpr uint32_t MAX_TOKENS = 1 << 24;

    const std::string text = env_text(name);
    if (text.size() > 8 || text.find_first_not_of("0123456789") != std::string::npos ||
        (!text.empty() && std::stoul(text) > MAX_TOKENS)) {
        throw std::invalid_argument(std::string(option) + " " + text + ": not a number of tokens from 0 to " +
                                    std::to_string(MAX_TOKENS));
    }

    return text.empty() ? rest : std::stoul(text);
}

static std::vector<ggml_type> parse_side(const std::string & map,
                                         const char *        what,
                                         size_t              n_layer,
                                         ggml_type           rest,
                                         bool                clip) {
    return map.empty() ? std::vector<ggml_type>(n_layer, rest) :
                         llama_turbo_parse_layers(map, n_layer, rest, what, clip);
}

static void read_types(llama_turbo_settings & settings, const llama_context_params & params, bool is_alone) {
    std::string map_k;
    std::string map_v;

    const llama_turbo_layer_mode * mode = nullptr;
    if (is_alone) {
        map_k = env_text("TURBO_CACHE_TYPE_K_LAYERS");
        map_v = env_text("TURBO_CACHE_TYPE_V_LAYERS");
        mode  = llama_turbo_parse_mode(env_text("TURBO_CACHE_LAYER_ADAPTIVE", "TURBO_LAYER_ADAPTIVE"));
    }
    if (mode) {
        if (!map_k.empty() || !map_v.empty()) {
            throw std::invalid_argument("a layer-adaptive mode and cache types by layer can't be used together");
        }
        map_k = mode->map_k;
        map_v = mode->map_v;
    }
    const size_t n_layer = settings.layers.size();

    settings.by_layer = !map_k.empty() || !map_v.empty();
    settings.types_k  = parse_side(map_k, "K cache types by layer", n_layer, params.type_k, mode != nullptr);
    settings.types_v  = parse_side(map_v, "V cache types by layer", n_layer, params.type_v, mode != nullptr);
}

//
// defaults
//

static bool has_turbo_type(const llama_turbo_settings & settings) {
    const auto any_of = [](const std::vector<ggml_type> & types) {
        return std::any_of(types.begin(), types.end(), ggml_is_turbo);
    };

    return any_of(settings.types_k) || any_of(settings.types_v);
}

// Most of what a tail gains comes from few tokens. Of short sequences it is a small part, too, so that copies never outweigh the cache.
static llama_turbo_exact_sizes default_exact_sizes(const llama_model & model, const llama_context_params & params) {
    static constexpr uint32_t SINK = 4;
    static constexpr uint32_t TAIL = 64;
    static constexpr uint32_t PART = 16;  // of a sequence
    static constexpr uint32_t STEP = 4;

    const uint32_t n_ctx = params.n_ctx > 0 ? params.n_ctx : model.hparams.n_ctx_train;
    const uint32_t n_seq = n_ctx / std::max(1u, params.n_seq_max);

    return { SINK, std::min(TAIL, n_seq / PART / STEP * STEP) };
}

static void read_exact_sizes(llama_turbo_settings &       settings,
                             const llama_model &          model,
                             const llama_context_params & params,
                             bool                         by_default) {
    const llama_turbo_exact_sizes rest = by_default ? default_exact_sizes(model, params) : llama_turbo_exact_sizes{};

    settings.exact.sink = env_tokens("TURBO_CACHE_SINK", "--cache-sink", rest.sink);
    settings.exact.tail = env_tokens("TURBO_CACHE_TAIL", "--cache-tail", rest.tail);

    // switching one of them off asks for nothing
    const bool asks_for_sink  = !env_text("TURBO_CACHE_SINK").empty() && settings.exact.sink > 0;
    const bool asks_for_tail  = !env_text("TURBO_CACHE_TAIL").empty() && settings.exact.tail > 0;
    settings.exact_by_default = !asks_for_sink && !asks_for_tail;
}

static void read_calibration(llama_turbo_settings & settings, const llama_model & model, bool by_default) {
    const std::string text = env_text("TURBO_CACHE_CALIBRATION", "TURBO_CALIBRATION");

    settings.calibrates = text == "auto" || (text.empty() && by_default);
    if (!settings.calibrates && !text.empty() && text != "none") {
        settings.calibration = llama_turbo_load_calibration(text, model, settings.layers);
    }
}

llama_turbo_settings llama_turbo_read_settings(const llama_model & model, const llama_context_params & params) {
    const bool is_alone = !params.ctx_other;

    llama_turbo_settings res;
    res.layers = llama_turbo_layers_with_kv(model);
    read_types(res, params, is_alone);
    if (is_alone) {
        const bool by_default = has_turbo_type(res) && llama_turbo_has_kv_cache(model);

        res.decay = llama_turbo_parse_decay(env_text("TURBO_CACHE_DECAY", "TURBO_DECAY"));
        read_exact_sizes(res, model, params, by_default);
        read_calibration(res, model, by_default);
    }

    return res;
}

size_t llama_turbo_settings::index_of(uint32_t il) const {
    return std::find(layers.begin(), layers.end(), il) - layers.begin();
}

std::pair<ggml_type, ggml_type> llama_turbo_settings::types_of(uint32_t il, ggml_type type_k, ggml_type type_v) const {
    const size_t i = index_of(il);
    if (!by_layer || i == layers.size()) {
        return { type_k, type_v };
    }

    return { types_k[i], types_v[i] };
}

static thread_local llama_turbo_settings settings_in_use;

void llama_turbo_use_settings(llama_turbo_settings settings) {
    settings_in_use = std::move(settings);
}

const llama_turbo_settings & llama_turbo_settings_in_use() {
    return settings_in_use;
}
