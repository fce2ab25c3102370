// KV caches with other types in other layers: what the maps and modes mean, what is refused, and what types meet in the life of a cache.
//
//   test-turbo-layers MODEL SCENARIO TYPE_K TYPE_V [-t THREADS] [-v]
//
// TYPE_K and TYPE_V are the types that the maps put into layers, of K and of V alike.

#include "test-turbo-device.h"
#include "test-turbo-session.h"
#include "test-turbo-state.h"

using types_t = std::vector<ggml_type>;

static const ggml_type BASE = GGML_TYPE_F16;  // layers that a map leaves out

static setup by_layer(const std::string & layers_k, const std::string & layers_v = "") {
    setup s{ BASE, BASE };
    s.layers_k = layers_k;
    s.layers_v = layers_v;
    return s;
}

// "LAYERS:TYPE", as an item of a map.
static std::string item(const std::string & layers, ggml_type type) {
    return layers + ":" + ggml_type_name(type);
}

static logits_t run(const setup & s) {
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

// "0:q8_0;1-2:turbo3 (4.125 bits per value)"
static logged_types parse_logged(const char * line) {
    logged_types res;
    for (bool more = true; more;) {
        char      type[32] = "";
        char *    end      = nullptr;
        const int first    = strtol(line, &end, 10);
        const int last     = *end == '-' ? strtol(end + 1, &end, 10) : first;
        int       n        = 0;
        if (sscanf(end, ":%31[^; ]%n", type, &n) != 1) {
            break;
        }
        for (int i = first; i <= last; ++i) {
            res.types[i] = type;
        }
        more = end[n] == ';';
        line = end + n + 1;
    }
    if (sscanf(line, "(%lf bits per value)\n", &res.n_bits) != 1) {
        printf("FAIL not understood: %s\n", line);
        exit(1);
    }
    return res;
}

// One entry per cache of the session made last.
static std::vector<logged_types> logged(const char * side) {
    const std::string prefix = std::string("llama_turbo_cache: ") + side + " by layer: ";

    std::vector<logged_types> res;
    for (size_t pos = 0; (pos = log_text.find(prefix, pos)) != std::string::npos;) {
        pos += prefix.size();
        res.push_back(parse_logged(log_text.c_str() + pos));
    }
    return res;
}

// Values of a row of K or V, the same in all layers of our models.
static int64_t n_values(bool is_k) {
    const session one = session::make({ GGML_TYPE_F16, GGML_TYPE_F16 });
    one.decode(text(1));
    const saved_state    state  = read_state(one);
    const saved_stream & stream = state.caches[0][0];
    return (is_k ? stream.k : stream.v)[0].row_size / sizeof(ggml_fp16_t);
}

static int n_kv_layers() {
    const session one = session::make({ GGML_TYPE_F16, GGML_TYPE_F16 });
    one.decode(text(1));
    int n = 0;
    for (const auto & cache : read_state(one).caches) {
        n += (int) cache[0].k.size();
    }
    return n;
}

// What the log says of each layer is what the map says, and what the cache has.
static void check_side(const saved_state & state, bool is_k, const types_t & expected) {
    const std::vector<logged_types> caches = logged(is_k ? "K" : "V");

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

static void check_types(const std::string & what, const setup & s, const types_t & k, const types_t & v) {
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
// maps
//

// A map for all layers is the same as the type itself.
static void test_uniform(const setup & types) {
    const types_t used = { types.type_k, types.type_v };
    for (ggml_type type : used) {
        printf("     %s\n", ggml_type_name(type));
        const std::string all = item("*", type);

        check_same("K", run({ type, BASE }), run(by_layer(all)));
        check_same("V", run({ BASE, type }), run(by_layer("", all)));
        check_same("K and V", run({ type, type }), run(by_layer(all, all)));
        check_same("all layers by their numbers", run({ type, type }),
                   run(by_layer(item("0--1", type), item("-1,0--2", type))));

        setup other_base  = by_layer(all, all);
        other_base.type_k = GGML_TYPE_TURBO2_0;
        other_base.type_v = GGML_TYPE_Q4_0;
        if (ggml_is_quantized(type)) {
            check_same("whatever the type of the rest", run({ type, type }), run(other_base));
        } else {
            check_at_most("whatever the type of the rest", nmse(run({ type, type }), run(other_base)), NMSE_BATCH);
        }
    }

    setup nothing      = types;
    nothing.layer_mode = "0";
    check_same("mode 0 is none", run(types), run(nothing));
    check("... and not in the log", !cache_line_has(" k="));
    if (types.type_k != types.type_v) {
        check_at_least("control: the types differ",
                       nmse(run({ types.type_k, types.type_k }), run({ types.type_v, types.type_v })), 1e-6);
    }
}

// Each map means what it says; the error lies between that of its types.
static void test_mixed(const setup & types) {
    const ggml_type a = types.type_k;
    const ggml_type b = types.type_v;
    const int       n = n_kv_layers();

    const auto list = [&](const char * first, const char * second) {
        return item(first, a) + ";" + item(second, b);
    };
    const auto with = [](types_t layers, int layer, ggml_type type) {
        layers[layer] = type;
        return layers;
    };
    const types_t rest(n, BASE);
    const types_t all_a(n, a);
    const types_t all_b(n, b);
    const types_t a_at_ends = with(with(all_b, 0, a), n - 1, a);

    check_types("K: a layer", by_layer(item("1", a)), with(rest, 1, a), rest);
    check_types("V: the last layer", by_layer("", item("-1", b)), rest, with(rest, n - 1, b));
    check_types("both, each its own", by_layer(item("0", a), item("1", b)), with(rest, 0, a), with(rest, 1, b));
    check_types("ends and middle", by_layer(list("0,-1", "*"), list("0--2", "-1")), a_at_ends, with(all_a, n - 1, b));
    check_types("the first item counts", by_layer(list("1", "0-1"), list("*", "*")), with(with(rest, 0, b), 1, a),
                all_a);
    check_types("a list and a range that overlap", by_layer(list("-1,-1,0", "0--1"), item("0,1-2", b)), a_at_ends,
                with(with(with(rest, 0, b), 1, b), 2, b));
    check_types("the first layer from the end", by_layer(item(std::to_string(-n), a)), with(rest, 0, a), rest);

    const logits_t expected = run(f32_setup());
    for (bool is_k : { true, false }) {
        const auto error = [&](const std::string & map) {
            return nmse(expected, run(is_k ? by_layer(map) : by_layer("", map)));
        };
        const double error_a = error(item("*", a));
        const double error_b = error(item("*", b));
        check_between(is_k ? "K: the error is between" : "V: the error is between", error(list("0-1", "*")),
                      std::min(error_a, error_b), std::max(error_a, error_b));
        check_at_least("control: these are far apart", std::max(error_a, error_b), 2.0 * std::min(error_a, error_b));
    }
}

//
// modes
//

static void test_modes(const setup & types) {
    const int n = n_kv_layers();

    // the first n_first and the last n_last layers
    const auto ends = [&](ggml_type rest, ggml_type type, int n_first, int n_last) {
        types_t res(n, rest);
        for (int i = 0; i < n; ++i) {
            if (i < n_first || i >= n - n_last) {
                res[i] = type;
            }
        }
        return res;
    };
    const ggml_type q8 = GGML_TYPE_Q8_0;
    const ggml_type t2 = GGML_TYPE_TURBO2_0;
    const ggml_type t4 = GGML_TYPE_TURBO4_0;
    const types_t   all_k(n, types.type_k);

    struct mode {
        const char * name;
        types_t      k, v;
    };

    const mode modes[] = {
        { "1", ends(types.type_k, q8, 4, 4), ends(types.type_v, q8, 4, 4) },
        { "2", ends(types.type_k, q8, 0, 8), ends(types.type_v, q8, 0, 8) },
        { "5", all_k, ends(t2, t4, 2, 2) },
        { "6", all_k, ends(t2, t4, 0, 8) },
        { "7", all_k, ends(t2, q8, 2, 2) },
    };
    for (const mode & m : modes) {
        setup s      = types;
        s.layer_mode = m.name;
        check_types(std::string("mode ") + m.name, s, m.k, m.v);
    }
}

//
// state
//

static void check_accepted(const std::string & what,
                           const setup &       s,
                           const bytes_t &     state,
                           const logits_t &    expected) {
    const session one = session::make(s);
    check(what, set_state(one, state));
    check_continues(expected, generate(one, 8, 48));
}

static void test_state(const setup & types) {
    const ggml_type   a      = types.type_k;
    const ggml_type   b      = types.type_v;
    const std::string a0     = item("0", a);
    const std::string b_rest = item("*", b);
    const std::string path = std::string("test-turbo-layers-") + ggml_type_name(a) + "-" + ggml_type_name(b) + ".state";

    const setup   own    = by_layer(a0 + ";" + b_rest, b_rest);
    const session writer = session::make(own);
    writer.decode(text(48));
    const bytes_t state     = get_state(writer);
    const bytes_t seq_state = get_seq_state(writer, 0);

    std::vector<llama_token> tokens(48, 3);
    check("state file written", llama_state_save_file(writer.ctx.get(), path.c_str(), tokens.data(), tokens.size()));
    const logits_t expected = generate(writer, 8, 48);

    check_accepted("the same map", own, state, expected);
    check_accepted("the same map in other words", by_layer(item("1--1", b) + ";" + a0, item("0", b) + ";" + b_rest),
                   state, expected);
    setup by_base  = by_layer(a0);
    by_base.type_k = b;
    by_base.type_v = b;
    check_accepted("the same types without a map for the rest", by_base, state, expected);

    const auto read_file = [&](const setup & s) {
        const session            one = session::make(s);
        std::vector<llama_token> got(tokens.size());
        size_t                   n_got = 0;
        return llama_state_load_file(one.ctx.get(), path.c_str(), got.data(), got.size(), &n_got) &&
               n_got == tokens.size();
    };
    check("state file read", read_file(own));

    const setup others[] = {
        by_layer(b_rest, b_rest), // K in one type
        by_layer(item("1", a) + ";" + b_rest, b_rest), // K in both, other layers
        by_layer(a0 + ";" + b_rest, a0 + ";" + b_rest), // V in both
        by_layer(item("*", a), b_rest),
        { BASE, BASE },
    };
    for (const setup & other : others) {
        check_refused("other types refused", other, state, seq_state);
        check("... from a file, too", !read_file(other));

        const session reverse = session::make(other);
        reverse.decode(text(48));
        check_refused("... and theirs by ours", own, get_state(reverse), get_seq_state(reverse, 0));
    }
    remove(path.c_str());
}

//
// shift
//

// Keys that are rotated, moved by a context that does not know it: RoPE in the wrong basis.
static logits_t shift_in_wrong_basis(const setup & plain) {
    const llama_pos n_past = SHIFT_PROMPT - SHIFT_GAP;

    const session writer = session::make(rotated(plain));
    writer.decode(text(SHIFT_PROMPT));

    const session mover = session::make(plain);
    set_seq_state(mover, get_seq_state(writer, 0), 0);
    shift(mover, SHIFT_KEEP, SHIFT_GAP);
    mover.decode(text(1, n_past));  // which moves the keys

    const session reader = session::make(rotated(plain));
    set_seq_state(reader, get_seq_state(mover, 0), 0);
    llama_memory_seq_rm(reader.memory(), 0, n_past, -1);
    return continue_after_shift(reader, n_past, 100);
}

// A layer that is not quantized in a cache that is rotated because of others.
static void test_shift(const setup & types) {
    GGML_UNUSED(types);

    const setup    f32      = f32_setup();
    const logits_t expected = shift_and_continue(session::make(f32), 1);
    const logits_t twice    = shift_and_continue(session::make(f32), 2);

    // bf16 has 8 bits: measured 1e-5 to 2e-4
    const std::pair<ggml_type, double> bounds[] = {
        { GGML_TYPE_F32,  NMSE_FLOAT },
        { GGML_TYPE_F16,  NMSE_HALF  },
        { GGML_TYPE_BF16, 5e-4       },
    };
    for (const auto & [type, bound] : bounds) {
        for (const char * layer : { "0", "-1" }) {
            setup s    = f32;
            s.layers_k = item(layer, type) + ";*:f32";

            const std::string what = std::string(ggml_type_name(type)) + " in layer " + layer;
            check_at_most(what + ", one shift", nmse(expected, shift_and_continue(session::make(rotated(s)), 1)),
                          bound);
            check_at_most(what + ", two shifts", nmse(twice, shift_and_continue(session::make(rotated(s)), 2)), bound);
            check("... which is rotated", is_rotated('k'));
            check_at_least("control: RoPE in the wrong basis", nmse(expected, shift_in_wrong_basis(s)), NMSE_MISTAKE);
        }
    }
}

//
// errors
//

static void check_map_refused(const std::string & map, const std::string & reason) {
    check_no_session("K '" + map + "'", by_layer(map), "K cache types by layer, '" + reason);
    check_no_session("V '" + map + "'", by_layer("", map), "V cache types by layer, '" + reason);
}

static void test_errors(const setup & types) {
    const int         n      = n_kv_layers();
    const std::string past   = std::to_string(n);
    const std::string has    = "does not exist, the model has " + past + " layers with a KV cache";
    const std::string before = std::to_string(-n - 1);

    const char * not_layers[] = { "x",   "1-",      "-",  "1-2-3", "1 ",  " 1", "",   "--1",
                                  "0x1", "9999999", "*1", "1*",    "1.0", "+1", "0-x" };
    for (const std::string layers : not_layers) {
        const std::string one = layers + ":q8_0";
        check_map_refused(one, one + "': '" + layers + "' is no layer N, no range N-M and not *");
    }
    for (const std::string & layer : { past, before }) {
        for (const std::string & one : { layer + ":q8_0", "0," + layer + ":q8_0", "0-" + layer + ":q8_0" }) {
            check_map_refused(one, one + "': layer " + layer + " " + has);
        }
    }
    for (const std::string one : { "1-0:q8_0", "-1--2:q8_0", "*,1-0:q8_0" }) {
        check_map_refused(one, one + "': range ");
        check("... that ends before it begins", log_has(" ends before it begins"));
    }
    for (const std::string type : { "turbo9", "Q8_0", "q4_K", "", "f16 ", "q8_0:f16", "i8" }) {
        check_map_refused("0:" + type, "0:" + type + "': '" + type + "' is no cache type; known: f32, f16, bf16, q8_0");
        check("... with all types", log_has("q4_0, turbo2, turbo3, turbo4"));
    }
    for (const std::string map : { "q8_0", ";", "0:q8_0;", ";0:q8_0", "0:q8_0;;1:q8_0", "*", "0,1" }) {
        check_no_session("'" + map + "'", by_layer(map), "not of the form LAYERS:TYPE");
    }
    check_map_refused("*:q8_0;0:x", "0:x': 'x' is no cache type");  // also where it would not count

    for (const char * mode : { "3", "4", "8", "-1", "01", "1 ", "x", "1,2" }) {
        setup s      = types;
        s.layer_mode = mode;
        check_no_session(std::string("mode '") + mode + "'", s,
                         std::string("layer-adaptive mode '") + mode + "' is not one of 1, 2, 5, 6, 7 (0: none)");
    }
    for (setup s : { by_layer("0:q8_0"), by_layer("", "0:q8_0") }) {
        s.layer_mode = "1";
        check_no_session("a mode and a map", s,
                         "a layer-adaptive mode and cache types by layer can't be used together");
    }

    const session good = session::make(types);
    check("after all that a context can be made", !cache_line_has(" k="));
}

static void test_flash_attn(const setup & types) {
    const auto off = [](setup s) {
        s.flash_attn = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        return s;
    };
    for (ggml_type type : { types.type_k, types.type_v }) {
        const std::string needs =
            std::string("cache type ") + ggml_type_name(type) + " needs flash attention, which was switched off";
        const std::string last = item("-1", type);
        if (ggml_is_turbo(type)) {
            check_no_session("K: flash attention off is refused", off(by_layer(last)), needs);
        } else {
            check_at_most("K: works without flash attention", nmse(run(off({ BASE, BASE })), run(off(by_layer(last)))),
                          ERROR_HEADROOM * measured_error(type).k_max);
        }
        if (ggml_is_quantized(type)) {
            check_no_session("V: flash attention off is refused", off(by_layer("", last)), needs);
            const session by_itself = session::make(by_layer("", last));
            check_log_has(
                "... and switched on by itself",
                std::string("enabling flash_attn since it is required for cache type ") + ggml_type_name(type));
        } else {
            run(off(by_layer("", last)));
            check("V: works without flash attention", true);
        }
    }
}

// For a model whose heads can't be cut into blocks of 32.
static void test_head_size(const setup & types) {
    const std::string head    = std::to_string(n_values(true) / llama_model_n_head_kv(model));
    const std::string last    = std::to_string(n_kv_layers() - 1);
    const std::string message = " needs a head size that is a multiple of 32, but layer ";
    for (ggml_type type : { types.type_k, types.type_v }) {
        const std::string name = ggml_type_name(type);
        check_no_session("K in layer 0", by_layer(item("0", type)), "K cache type " + name + message + "0 has " + head);
        check_no_session("K in the last layer", by_layer(item("-1", type)),
                         "K cache type " + name + message + last + " has " + head);
        check_no_session("V in the last layer", by_layer("", item("-1", type)),
                         "V cache type " + name + message + last + " has " + head);
    }
    check_same("bf16 beside f16 works", run(by_layer("0:f16;*:bf16")), run(by_layer("1--1:bf16")));
}

//
// contexts
//

static types_t types_of(const session & s) {
    s.decode(text(1));
    types_t           res;
    const saved_state state = read_state(s);
    for (const auto & cache : state.caches) {
        for_each_tensor(cache[0], [&](const saved_tensor & tensor, bool) { res.push_back(tensor.type); });
    }
    return res;
}

// The settings are read when a context is made, for that context.
static void test_contexts(const setup & types) {
    const ggml_type a = types.type_k;
    const ggml_type b = types.type_v;

    const size_t n = n_kv_layers();
    types_t      first(2 * n, BASE);
    first[0] = a;
    types_t second(2 * n, b);
    second[n - 1] = a;

    const session one   = session::make(by_layer(item("0", a)));
    const session two   = session::make(by_layer(item("-1", a) + ";" + item("*", b), item("*", b)));
    const session three = session::make({ BASE, BASE });
    check("a context without settings says nothing of layers", !cache_line_has(" k="));
    check("the first context has its map", types_of(one) == first);
    check("the second context has another", types_of(two) == second);
    check("the third context has none", types_of(three) == types_t(2 * n, BASE));

    // a draft, whose layers are other ones
    setup draft        = by_layer("99:x", "0:turbo3;1:turbo2");
    draft.other        = one.ctx.get();
    draft.decay        = "no";
    const session four = session::make(draft);
    check("a context of another context has none", types_of(four) == types_t(2 * n, BASE) && !cache_line_has(" k="));

    const session again = session::make(by_layer(item("0", a)));
    check("a context made later has a map", types_of(again) == first);
}

//
// device
//

static void test_device(const setup & types) {
    setup without      = by_layer("0:q8_0");
    without.flash_attn = LLAMA_FLASH_ATTN_TYPE_DISABLED;

    const logits_t expected = run(without);
    {
        const limited_device no_attention(
            [](const ggml_tensor * op) { return op->op == GGML_OP_FLASH_ATTN_EXT && ggml_is_turbo(op->src[1]->type); });
        for (ggml_type type : { types.type_k, types.type_v }) {
            if (!ggml_is_turbo(type)) {
                continue;
            }
            const std::string name = ggml_type_name(type);
            check_no_session(
                "K: no flash attention for a layer", by_layer(item("1", type)),
                "device LIMITED has no flash attention for K in " + name + ", V in f16 and the head sizes");
            check("... named", log_has(" of layer 1: keep the cache in host memory"));
            setup in_host     = by_layer(item("1", type));
            in_host.on_device = false;
            run(in_host);
            check("... works in host memory", true);
        }
    }
    {
        const limited_device no_attention([](const ggml_tensor * op) { return op->op == GGML_OP_FLASH_ATTN_EXT; });
        check_same("no flash attention, which is off", expected, run(without));
        check_no_session("... or on", by_layer("0:turbo3"),
                         "device LIMITED has no flash attention for K in turbo3, V in f16 and the head sizes");
        check("... for the first layer", log_has(" of layer 0: keep the cache in host memory"));
    }
    {
        const limited_device no_store(
            [](const ggml_tensor * op) { return op->op == GGML_OP_SET_ROWS && op->type == GGML_TYPE_TURBO3_0; });
        check_no_session(
            "V: a layer can't be stored", by_layer("", "1:turbo3"),
            "device LIMITED can't store cache type turbo3 of layer 1: keep the cache in host memory with -nkvo");
    }
}

int main(int argc, char ** argv) {
    const test_program program{
        "test-turbo-layers",
        {
          { "uniform", test_uniform },
          { "mixed", test_mixed },
          { "modes", test_modes },
          { "state", test_state },
          { "shift", test_shift },
          { "errors", test_errors },
          { "flash-attn", test_flash_attn },
          { "head-size", test_head_size },
          { "contexts", test_contexts },
          { "device", test_device },
          },
        /*needs_turbo =*/
        false,
    };

    return program.main(argc, argv);
}
