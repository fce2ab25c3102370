// KV caches with other types in other layers: what the maps and modes mean, what is refused, and what types meet in the life of a cache.
//
//   test-turbo-layers MODEL SCENARIO TYPE_K TYPE_V [-t THREADS] [-v]
//
// TYPE_K and TYPE_V are the types that the maps put into layers, of K and of V alike.

#include "test-turbo-layers.h"

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
        const auto compare = [type = type, bound = bound](const std::string & what, const logits_t & meant,
                                                          const logits_t & got) {
            if (type == GGML_TYPE_F32) {
                check_float(what, meant, got);
            } else {
                check_at_most(what, nmse(meant, got), bound);
            }
        };
        for (const char * layer : { "0", "-1" }) {
            setup s    = f32;
            s.layers_k = item(layer, type) + ";*:f32";

            const std::string what = std::string(ggml_type_name(type)) + " in layer " + layer;
            compare(what + ", one shift", expected, shift_and_continue(session::make(rotated(s)), 1));
            compare(what + ", two shifts", twice, shift_and_continue(session::make(rotated(s)), 2));
            // in a model with two caches, the one that has other layers, too
            check("... which is rotated", cache_lines().find(" | rotated 1/") != std::string::npos);
            check_at_least("control: RoPE in the wrong basis", nmse(expected, shift_in_wrong_basis(s)), NMSE_MISTAKE);
        }
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
