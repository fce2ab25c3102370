#include "settings.h"

#include "draft.h"
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

static thread_local uint32_t longest_draft = 0;

void llama_turbo_expect_drafts(unsigned n_tokens) {
    longest_draft = n_tokens;
}

// Copies may add two bits to each value of a cache, an eighth of its cells. What a stream has beyond sink and tail is in it (exact.h).
static void read_default_exact_sizes(llama_turbo_settings &       settings,
                                     const llama_model &          model,
                                     const llama_context_params & params) {
    static constexpr uint32_t SINK  = 4;
    static constexpr uint32_t TAIL  = 64;
    static constexpr uint32_t LEAST = 4;    // a shorter tail is worth nothing
    static constexpr uint32_t PAD   = 256;  // of streams

    const uint32_t n_ctx   = params.n_ctx > 0 ? params.n_ctx : model.hparams.n_ctx_train;
    const uint32_t n_part  = n_ctx / std::max(1u, params.n_seq_max);
    const uint32_t n_cells = params.kv_unified ? n_part : GGML_PAD(n_part, PAD);
    const uint32_t room    = n_cells / 8 / LEAST * LEAST;
    const uint32_t spare   = settings.exact.rewind;
    if (room < SINK + spare + LEAST) {
        settings.why_not_exact = format("%u cells for each sequence are too few", n_cells);
        return;
    }
    settings.exact.sink = SINK;
    settings.exact.tail = std::min(TAIL, room - SINK - spare);
}

static void read_exact_sizes(llama_turbo_settings &       settings,
                             const llama_model &          model,
                             const llama_context_params & params,
                             bool                         by_default) {
    const bool is_sink_set = !env_text("TURBO_CACHE_SINK").empty();
    const bool is_tail_set = !env_text("TURBO_CACHE_TAIL").empty();

    // a rejected draft, and the token before it that is decoded again
    settings.exact.rewind = std::max(settings.exact.rewind, longest_draft + 1);
    if (by_default && !(is_sink_set && is_tail_set)) {
        read_default_exact_sizes(settings, model, params);
    }
    settings.exact.sink = env_tokens("TURBO_CACHE_SINK", "--cache-sink", settings.exact.sink);
    settings.exact.tail = env_tokens("TURBO_CACHE_TAIL", "--cache-tail", settings.exact.tail);

    // switching one of them off asks for nothing
    settings.exact_by_default = !(is_sink_set && settings.exact.sink > 0) && !(is_tail_set && settings.exact.tail > 0);
    if (settings.exact || (is_sink_set && is_tail_set)) {
        settings.why_not_exact = "";
    }
}

// What does not fit a model that is loaded to measure its memory is left out. The context that is made for real says what is wrong.
template <typename read_t, typename skip_t>
static void read_unless_measured(const llama_model & model, read_t read, skip_t skip) {
    try {
        read();
    } catch (const std::invalid_argument &) {
        if (!model.hparams.no_alloc) {
            throw;
        }
        skip();
    }
}

// A file is of the target's model. So its draft has what it would have without one.
static void read_calibration(llama_turbo_settings & settings,
                             const llama_model &    model,
                             bool                   is_alone,
                             bool                   by_default) {
    const std::string text    = env_text("TURBO_CACHE_CALIBRATION", "TURBO_CALIBRATION");
    const bool        is_none = text == "none";
    const bool        is_auto = text == "auto";

    if (is_alone && !is_none && !is_auto && !text.empty()) {
        read_unless_measured(
            model, [&] { settings.calibration = llama_turbo_load_calibration(text, model, settings.layers); }, [] {});
        return;
    }
    settings.calibrates = !is_none && (by_default || (is_auto && is_alone));
}

// A model of its own, and layers of its own.
static bool is_of_draft_model(const llama_model & model, const llama_context_params & params) {
    return params.ctx_type == LLAMA_CONTEXT_TYPE_DEFAULT && !llama_turbo_needs_other(model);
}

llama_turbo_settings llama_turbo_read_settings(const llama_model & model, const llama_context_params & params) {
    const bool is_alone = !params.ctx_other && params.ctx_type != LLAMA_CONTEXT_TYPE_MTP;

    llama_turbo_settings res;
    res.layers = llama_turbo_layers_with_kv(model);
    read_unless_measured(model, [&] { read_types(res, params, is_alone); }, [&] { read_types(res, params, false); });

    const bool by_default =
        has_turbo_type(res) && llama_turbo_has_kv_cache(model) && (is_alone || is_of_draft_model(model, params));
    if (is_alone || by_default) {
        read_exact_sizes(res, model, params, by_default);
    }
    read_calibration(res, model, is_alone, by_default);
    if (is_alone) {
        res.decay = llama_turbo_parse_decay(env_text("TURBO_CACHE_DECAY", "TURBO_DECAY"));
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
