#pragma once

// The types of each layer of a KV cache, in the log and in the saved state.

#include "test-turbo-device.h"
#include "test-turbo-session.h"
#include "test-turbo-state.h"

using types_t = std::vector<ggml_type>;

inline const ggml_type BASE = GGML_TYPE_F16;  // layers that a map leaves out

inline setup by_layer(const std::string & layers_k, const std::string & layers_v = "") {
    setup s{ BASE, BASE };
    s.layers_k = layers_k;
    s.layers_v = layers_v;
    return s;
}

// "LAYERS:TYPE", as an item of a map.
inline std::string item(const std::string & layers, ggml_type type) {
    return layers + ":" + ggml_type_name(type);
}

inline logits_t run(const setup & s) {
    return prompt_and_generate(session::make(s));
}

//
// types of each layer, in the log and in the state
//

// Types of the layers of one cache, by their number among all layers with a cache, as the log names them.
struct logged_types {
    std::map<int, std::string> types;
    double                     n_bits = 0.0;
};

// "0:q8_0;1-2:turbo3", up to a space
inline std::map<int, std::string> parse_map(const char * map) {
    std::map<int, std::string> res;
    for (bool more = true; more;) {
        char      type[32] = "";
        char *    end      = nullptr;
        const int first    = strtol(map, &end, 10);
        const int last     = *end == '-' ? strtol(end + 1, &end, 10) : first;
        int       n        = 0;
        if (sscanf(end, ":%31[^; ]%n", type, &n) != 1) {
            printf("FAIL not understood: %s\n", map);
            exit(1);
        }
        for (int i = first; i <= last; ++i) {
            res[i] = type;
        }
        more = end[n] == ';';
        map  = end + n + 1;
    }
    return res;
}

// One entry per cache of the session made last that has types by layer.
inline std::vector<logged_types> logged(bool is_k) {
    const std::string lines = cache_lines();

    std::vector<logged_types> res;
    for (size_t begin = 0, end; begin < lines.size(); begin = end + 1) {
        end                    = lines.find('\n', begin);
        const std::string line = lines.substr(begin, end - begin);
        const size_t      map  = line.find(is_k ? " k=" : " v=");
        const size_t      bits = line.find(" | bits ");
        double            n_bits_k;
        double            n_bits_v;
        if (map != std::string::npos && bits != std::string::npos &&
            sscanf(line.c_str() + bits, " | bits %lf/%lf", &n_bits_k, &n_bits_v) == 2) {
            res.push_back({ parse_map(line.c_str() + map + 3), is_k ? n_bits_k : n_bits_v });
        }
    }
    return res;
}

// Values of a row of K or V, the same in all layers of our models.
inline int64_t n_values(bool is_k) {
    const session one = session::make({ GGML_TYPE_F16, GGML_TYPE_F16 });
    one.decode(text(1));
    const saved_state    state  = read_state(one);
    const saved_stream & stream = state.caches[0][0];
    return (is_k ? stream.k : stream.v)[0].row_size / sizeof(ggml_fp16_t);
}

inline int n_kv_layers() {
    const session one = session::make({ GGML_TYPE_F16, GGML_TYPE_F16 });
    one.decode(text(1));
    int n = 0;
    for (const auto & cache : read_state(one).caches) {
        n += (int) cache[0].k.size();
    }
    return n;
}

// What the log says of each layer is what the map says, and what the cache has.
inline void check_side(const saved_state & state, bool is_k, const types_t & expected) {
    const std::vector<logged_types> caches = logged(is_k);

    bool                       log_ok   = caches.size() == state.caches.size();
    bool                       state_ok = log_ok;
    bool                       bits_ok  = log_ok;
    std::map<int, std::string> seen;
    for (size_t c = 0; log_ok && c < caches.size(); ++c) {
        const saved_stream &              stream  = state.caches[c][0];
        const std::vector<saved_tensor> & tensors = is_k ? stream.k : stream.v;

        double n_bits = 0.0;
        size_t i      = 0;
        for (const auto & [layer, name] : caches[c].types) {
            log_ok   = log_ok && seen.insert({ layer, name }).second;  // each layer is in one cache
            state_ok = state_ok && i < tensors.size() && name == ggml_type_name(tensors[i].type) &&
                       tensors[i].row_size == ggml_row_size(tensors[i].type, n_values(is_k));
            n_bits += i < tensors.size() ? 8.0 * tensors[i].row_size / n_values(is_k) : 0.0;
            ++i;
        }
        state_ok = state_ok && i == tensors.size();
        bits_ok  = bits_ok && std::fabs(caches[c].n_bits - n_bits / std::max<size_t>(i, 1)) < 0.001;
    }
    log_ok = log_ok && seen.size() == expected.size();
    for (int i = 0; log_ok && i < (int) expected.size(); ++i) {
        log_ok = seen[i] == ggml_type_name(expected[i]);
    }

    const std::string side = is_k ? "K" : "V";
    check("... the log has the " + side + " types", log_ok);
    check("... the cache has them, and rows of their size", state_ok);
    check("... bits per value", bits_ok);
}

inline void check_types(const std::string & what, const setup & s, const types_t & k, const types_t & v) {
    printf("     %s\n", what.c_str());

    const session one = session::make(s);
    one.decode(text(8));
    const saved_state state = read_state(one);
    const std::string log   = log_text;
    for (bool is_k : { true, false }) {
        log_text = log;
        check_side(state, is_k, is_k ? k : v);
    }
}

//
// scenarios in test-turbo-layers-contexts.cpp
//

void test_errors(const setup & types);
void test_flash_attn(const setup & types);
void test_head_size(const setup & types);
void test_contexts(const setup & types);
void test_device(const setup & types);
