// Types by layer and contexts: what is refused, whose settings count, and what a device lacks. Scenarios of test-turbo-layers.

#include "../src/turbo/draft.h"
#include "test-turbo-layers.h"

//
// errors
//

static void check_map_refused(const std::string & map, const std::string & reason) {
    check_no_session("K '" + map + "'", by_layer(map), "K cache types by layer, '" + reason);
    check_no_session("V '" + map + "'", by_layer("", map), "V cache types by layer, '" + reason);
}

void test_errors(const setup & types) {
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

void test_flash_attn(const setup & types) {
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
void test_head_size(const setup & types) {
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
void test_contexts(const setup & types) {
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

    draft.other        = LLAMA_TURBO_DRAFT;
    const session five = session::make(draft);
    check("nor has one whose other context is yet to come",
          types_of(five) == types_t(2 * n, BASE) && !cache_line_has(" k="));

    const session again = session::make(by_layer(item("0", a)));
    check("a context made later has a map", types_of(again) == first);
}

//
// device
//

void test_device(const setup & types) {
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
    {
        // such as one behind a server that is not patched
        const limited_device no_view([](const ggml_tensor * op) { return ggml_is_turbo(op->type); });
        setup                in_host = by_layer("", "1:turbo3");
        in_host.on_device            = false;
        check_no_session("V: a device does not know the type of a layer, wherever the cache is", in_host,
                         ") does not know cache type turbo3: start ggml-rpc-server of this patched build there");
        check_same("... and works without it", expected, run(without));
    }
}
