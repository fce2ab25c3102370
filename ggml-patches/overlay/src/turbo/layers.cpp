#include "layers.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

static std::vector<std::string> split_text(const std::string & text, char separator) {
    std::vector<std::string> parts;
    size_t                   begin = 0;
    for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + 1) {
        parts.push_back(text.substr(begin, end - begin));
    }
    parts.push_back(text.substr(begin));

    return parts;
}

// Reads a decimal integer from *text on and moves *text behind it.
static bool read_int(const char *& text, int & value) {
    const char * digits = text + (*text == '-');
    const char * end    = digits;
    while (*end >= '0' && *end <= '9') {
        ++end;
    }
    if (end == digits || end - digits > 6) {
        return false;
    }
    value = atoi(text);
    text  = end;

    return true;
}

//
// maps
//

static const ggml_type cache_types[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,   GGML_TYPE_Q8_0, GGML_TYPE_Q5_1,
    GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_0, GGML_TURBO_TYPES,
};

static ggml_type parse_type(const std::string & name, const std::string & where) {
    std::string known;
    for (ggml_type type : cache_types) {
        if (name == ggml_type_name(type)) {
            return type;
        }
        known += std::string(known.empty() ? "" : ", ") + ggml_type_name(type);
    }

    throw std::invalid_argument(where + ": '" + name + "' is no cache type; known: " + known);
}

struct layer_range {
    int first;
    int last;  // inclusive
};

static layer_range parse_range(const std::string & text, const std::string & where) {
    const char * pos   = text.c_str();
    layer_range  range = { 0, 0 };

    bool ok    = read_int(pos, range.first);
    range.last = range.first;
    if (ok && *pos == '-') {
        ok = read_int(++pos, range.last);
    }
    if (!ok || *pos != '\0') {
        throw std::invalid_argument(where + ": '" + text + "' is no layer N, no range N-M and not *");
    }

    return range;
}

// Layers counted from the start. The result may lie beyond 0 .. n_layer - 1 if clip is set.
static layer_range resolve_range(const layer_range & range, int n_layer, bool clip, const std::string & where) {
    layer_range res = range;
    for (int * layer : { &res.first, &res.last }) {
        const int named = *layer;
        *layer          = named < 0 ? n_layer + named : named;
        if (!clip && (*layer < 0 || *layer >= n_layer)) {
            throw std::invalid_argument(where + ": layer " + std::to_string(named) + " does not exist, the model has " +
                                        std::to_string(n_layer) + " layers with a KV cache");
        }
    }
    if (!clip && res.first > res.last) {
        throw std::invalid_argument(where + ": range " + std::to_string(range.first) + "-" +
                                    std::to_string(range.last) + " ends before it begins");
    }

    return res;
}

std::vector<ggml_type> llama_turbo_parse_layers(const std::string & map,
                                                uint32_t            n_layer,
                                                ggml_type           rest,
                                                const char *        what,
                                                bool                clip) {
    std::vector<ggml_type> types(n_layer, GGML_TYPE_COUNT);

    for (const std::string & item : split_text(map, ';')) {
        const std::string where = std::string(what) + ", '" + item + "'";
        const size_t      colon = item.find(':');
        if (colon == std::string::npos) {
            throw std::invalid_argument(where + ": not of the form LAYERS:TYPE");
        }

        const ggml_type type = parse_type(item.substr(colon + 1), where);
        for (const std::string & layers : split_text(item.substr(0, colon), ',')) {
            const layer_range range = layers == "*" ? layer_range{ 0, (int) n_layer - 1 } :
                                                      resolve_range(parse_range(layers, where), n_layer, clip, where);
            for (int i = 0; i < (int) n_layer; ++i) {
                if (i >= range.first && i <= range.last && types[i] == GGML_TYPE_COUNT) {
                    types[i] = type;
                }
            }
        }
    }

    for (ggml_type & type : types) {
        type = type == GGML_TYPE_COUNT ? rest : type;
    }

    return types;
}

std::string llama_turbo_format_layers(const std::vector<uint32_t> & layers, const std::vector<ggml_type> & types) {
    std::string res;
    for (size_t i = 0, end; i < types.size(); i = end) {
        for (end = i + 1; end < types.size() && types[end] == types[i] && layers[end] == layers[end - 1] + 1;) {
            ++end;
        }
        res += (i > 0 ? ";" : "") + std::to_string(layers[i]);
        res += (end > i + 1 ? "-" + std::to_string(layers[end - 1]) : "") + ":" + ggml_type_name(types[i]);
    }

    return res;
}

//
// modes
//

const llama_turbo_layer_mode * llama_turbo_parse_mode(const std::string & text) {
    static const llama_turbo_layer_mode modes[] = {
        { 1, "0-3,-4--1:q8_0", "0-3,-4--1:q8_0"            },
        { 2, "-8--1:q8_0",     "-8--1:q8_0"                },
        { 5, "",               "0-1,-2--1:turbo4;*:turbo2" },
        { 6, "",               "-8--1:turbo4;*:turbo2"     },
        { 7, "",               "0-1,-2--1:q8_0;*:turbo2"   },
    };

    if (text.empty() || text == "0") {
        return nullptr;
    }
    for (const llama_turbo_layer_mode & mode : modes) {
        if (text == std::to_string(mode.mode)) {
            return &mode;
        }
    }

    throw std::invalid_argument("layer-adaptive mode '" + text + "' is not one of 1, 2, 5, 6, 7 (0: none)");
}

//
// decay
//

llama_turbo_decay_shares llama_turbo_parse_decay(const std::string & text) {
    if (text.empty() || text == "off") {
        return {};
    }
    if (text == "conservative") {
        return { 25, 40, 35 };
    }
    if (text == "balanced") {
        return { 15, 35, 50 };
    }
    if (text == "aggressive") {
        return { 5, 25, 70 };
    }

    llama_turbo_decay_shares shares;
    const char *             pos = text.c_str();

    const bool ok = read_int(pos, shares.hot) && *pos++ == ',' && read_int(pos, shares.warm) && *pos++ == ',' &&
                    read_int(pos, shares.cold) && *pos == '\0' && shares.hot >= 0 && shares.warm >= 0 &&
                    shares.cold >= 0;
    if (!ok) {
        throw std::invalid_argument(
            "decay '" + text + "' is not conservative, balanced, aggressive, off or three percentages HOT,WARM,COLD");
    }
    const int sum = shares.hot + shares.warm + shares.cold;
    if (sum != 100) {
        throw std::invalid_argument("decay '" + text + "': the percentages add up to " + std::to_string(sum) +
                                    ", not to 100");
    }

    return shares;
}
