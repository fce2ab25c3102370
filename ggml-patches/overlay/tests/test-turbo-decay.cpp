// Temporal decay: which cells have lost a bit and which have not, seen in the saved state; and that nothing else changes.
//
//   test-turbo-decay MODEL SCENARIO TYPE_K TYPE_V [-ctkl MAP] [-ctvl MAP] [-t THREADS] [-v]

#include "test-turbo-decay.h"

//
// by hand
//

// A prompt in pieces of at most one ubatch, then single tokens.
static logits_t decode_in_pieces(const session & s, int n_tokens, int by_hand_percent) {
    logits_t res;
    for (int n = 0; n < n_tokens;) {
        const int n_piece = n < 3 * (int) N_UBATCH ? N_UBATCH : n == 3 * (int) N_UBATCH ? 37 : 1;
        if (by_hand_percent > 0) {
            decay_by_hand(s, by_hand_percent);
        }
        append(res, s.decode(text(n_piece, n)));
        n += n_piece;
    }
    return res;
}

static void test_by_hand(const setup & types) {
    constexpr int n_tokens = 420;

    for (const shares & decay : { BALANCED, ALL_SHARES[3] }) {
        const session  by_itself = session::make(decaying(types, decay.text));
        const logits_t got       = decode_in_pieces(by_itself, n_tokens, 0);
        const bytes_t  state     = get_seq_state(by_itself, 0);

        const session by_hand = session::make(plain(types));
        check_same(std::string(decay.text) + ": decayed by hand", decode_in_pieces(by_hand, n_tokens, decay.cold), got);

        check("... and what is cached is the same", get_seq_state(by_hand, 0) == state);
        const session never = session::make(plain(types));
        check_at_least("control: never decayed", nmse(decode_in_pieces(never, n_tokens, 0), got), 1e-6);
    }
}

//
// chunks
//

// What a cache decays while one text is stored piece by piece.
struct expected_decay {
    int     percent;
    int     cold    = 0;
    int64_t n_cells = 0;
    int64_t passes  = 0;

    explicit expected_decay(int percent) : percent(percent) {}

    void begin_text() { cold = 0; }

    // n: positions stored before the piece
    void store(int n) {
        if (n_cold(n, percent) > cold) {
            n_cells += n_cold(n, percent) - cold;
            cold = n_cold(n, percent);
            ++passes;
        }
    }
};

// The first layer depends on no other, so that all of its rows are known from a cache that does not decay.
static void check_first_layer(const saved_state & got, saved_state without, int cold) {
    const saved_stream & stream = got.caches[0][0];
    const saved_stream & other  = without.caches[0][0];

    int n_wrong = 0;
    for (bool is_k : { true, false }) {
        const saved_tensor & tensor   = is_k ? stream.k[0] : stream.v[0];
        const saved_tensor & expected = is_k ? other.k[0] : other.v[0];
        for (size_t i = 0; i < stream.cells.size(); ++i) {
            if (stream.cells[i].pos < cold) {
                decay_row(tensor, without.row(expected, i));
            }
            n_wrong += got.copy_row(tensor, i) != without.copy_row(expected, i);
        }
    }
    check_count("... wrong rows in the first layer", n_wrong, 0);
}

static void check_log(const saved_state & state, const shares & decay) {
    check_cache_line_has("the log tells the shares",
                         format(" decay=%.0f,%.0f,%.0f ", decay.hot, decay.warm, decay.cold));
    check_cache_line_has("... and what decays", format(" | decaying %.0f/%.0f\n", n_decaying_layers(state, true),
                                                       n_decaying_layers(state, false)));
    if (llama_model_n_swa(model) > 0) {
        check_cache_line_has("... and what has a window", " | no decay: sliding window\n");
    }
}

constexpr int N_CHUNKS = 3;
constexpr int N_PROMPT = 256;
constexpr int N_ANSWER = 40;

// One text after the other in the same cache, as in llama-perplexity.
static void for_each_chunk(const session &                  s,
                           const std::function<void(int)> & after_prompt,
                           const std::function<void(int)> & after_answer) {
    for (int chunk = 0; chunk < N_CHUNKS; ++chunk) {
        llama_memory_clear(s.memory(), chunk == 1);
        s.decode(text(N_PROMPT, 0, 0, chunk));
        after_prompt(chunk);
        generate(s, N_ANSWER, N_PROMPT, 0, chunk);
        after_answer(chunk);
    }
}

static void test_shares(const setup & s, const shares & decay, const std::vector<saved_state> & without) {
    printf("     %s\n", decay.text);

    expected_decay expected(decay.cold);
    int            cold_first = 0;
    bool           has_k      = false;
    bool           has_v      = false;

    const auto after_prompt = [&](const session & one) {
        expected.begin_text();
        for (int n = 0; n < N_PROMPT; n += N_UBATCH) {
            expected.store(n);
        }
        cold_first = expected.cold;
        check_decayed("prompt", read_state(one), range(0, expected.cold));
    };
    const auto after_answer = [&](const session & one, int chunk) {
        for (int i = 0; i < N_ANSWER; ++i) {
            expected.store(N_PROMPT + i);
        }
        const saved_state state = read_state(one);
        check_decayed("prompt and answer", state, range(0, expected.cold));
        if (llama_model_n_swa(model) == 0) {
            check_first_layer(state, without[chunk], expected.cold);
        }
        has_k = n_decaying_layers(state, true) > 0;
        has_v = n_decaying_layers(state, false) > 0;
        if (chunk == 0) {
            check_log(state, decay);
        }
    };
    {
        const session one = session::make(s);
        for_each_chunk(one, [&](int) { after_prompt(one); }, [&](int chunk) { after_answer(one, chunk); });
    }

    const decay_totals totals = logged_totals();
    check_count("passes in the log", totals.n_passes, expected.passes);
    check_count("cells of K in the log", totals.n_k, has_k ? expected.n_cells : 0);
    check_count("cells of V in the log", totals.n_v, has_v ? expected.n_cells : 0);
    check("in the prompt something had decayed, and later more",
          cold_first > 0 && expected.cold > cold_first && (has_k || has_v));
}

static void test_chunks(const setup & types) {
    setup never    = plain(types);
    never.swa_full = false;

    std::vector<saved_state> without;
    {
        const session one = session::make(never);
        for_each_chunk(one, [](int) {}, [&](int) { without.push_back(read_state(one)); });
    }
    for (const shares & decay : ALL_SHARES) {
        setup s = never;
        s.decay = decay.text;
        test_shares(s, decay, without);
    }
}

//
// what it costs
//

static void test_quality(const setup & types) {
    const auto run = [](const setup & s) {
        const session one = session::make(s);
        one.decode(text(320));
        return generate(one, 64, 320);
    };
    setup f32         = f32_setup();
    f32.n_ctx         = N_CTX;
    const auto logits = run(f32);

    double error = nmse(logits, run(plain(types)));
    for (const char * decay : { "90,0,10", "conservative", "aggressive", "0,0,100" }) {
        const double more = nmse(logits, run(decaying(types, decay)));
        report(more > error && std::isfinite(more), std::string(decay) + ": the error grows with the cold share",
               format("nmse %.3e > %.3e", more, error));
        error = more;
    }
}

// Decay runs outside of the model's graph, which is reused as before.
static void test_graph(const setup & types) {
    const auto n_reused = [](const setup & s) {
        const session one = session::make(s);
        one.decode(text(64));
        generate(one, 200, 64);
        return llama_perf_context(one.ctx.get()).n_reused;
    };
    const int without = n_reused(plain(types));
    check_count("graphs reused", n_reused(balanced(types)), without);
    report(without > 100, "control: graphs are reused", format("%.0f of 200", without));
}

//
// none
//

static void test_none(const setup & types) {
    const auto run = [](const setup & s) {
        const session one = session::make(s);
        logits_t      res = one.decode(text(256));
        append(res, generate(one, 16, 256));
        return res;
    };
    const logits_t expected = run(plain(types));
    for (const char * decay : { "off", "100,0,0", "60,40,0" }) {
        check_same(decay, expected, run(decaying(types, decay)));
        check("... and not in the log", !log_has("decay"));
    }

    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_TURBO2_0 }) {
        const setup    other  = { type, type };
        const logits_t logits = run(plain(other));
        check_same(std::string("a cache in ") + ggml_type_name(type), logits, run(balanced(other)));
        check_cache_line_has("... which is said", " | no decay: no layer of a type that decays\n");
        check("... and nothing is counted", logged_totals().n_passes == -1);
    }

    // a draft
    const session one   = session::make(plain(types));
    setup         draft = balanced(types);
    draft.other         = one.ctx.get();
    check_same("a context of another context", expected, run(draft));
    check("... does not decay", !log_has("decay"));
}

static void test_errors(const setup & types) {
    const auto is_no = [](const std::string & text) {
        return "decay '" + text + "' is not conservative, balanced, aggressive, off or three percentages HOT,WARM,COLD";
    };
    for (const std::string text :
         { "on", "Balanced", "balanced ", "50", "50,50", "25,25,25,25", "a,b,c", "50,50,", ",50,50", "-10,60,50",
           "60,50,-10", "33.3,33.3,33.4", " 15,35,50", "15, 35,50", "15;35;50", "0", "1" }) {
        check_no_session("'" + text + "'", decaying(types, text.c_str()), is_no(text));
    }
    const std::pair<const char *, const char *> sums[] = {
        { "15,35,51",    "101" },
        { "0,0,0",       "0"   },
        { "100,100,100", "300" },
        { "50,0,49",     "99"  },
    };
    for (const auto & [text, sum] : sums) {
        check_no_session(std::string("'") + text + "'", decaying(types, text),
                         std::string("decay '") + text + "': the percentages add up to " + sum + ", not to 100");
    }
    const session good = session::make(plain(types));
    check("after all that a context can be made", !log_has("decay"));
}

//
// device
//

static void test_device(const setup & types) {
    const auto run = [](const setup & s) {
        const session one = session::make(s);
        logits_t      res = one.decode(text(256));
        append(res, generate(one, 16, 256));
        return res;
    };
    const logits_t expected = run(balanced(types));
    const logits_t never    = run(plain(types));
    {
        const limited_device device([](const ggml_tensor * op) { return op->op == GGML_OP_MAP_CUSTOM1; });
        const std::string    name = ggml_type_name(ggml_turbo_decays(types.type_k) ? types.type_k : types.type_v);
        check_no_session(
            "a device that can't", balanced(types),
            "device LIMITED can't do temporal decay of cache type " + name +
                " in layer 0: keep the cache in host memory with -nkvo, use -ngl 0, or leave TURBO_CACHE_DECAY and ");
        check_same("... works without decay", never, run(plain(types)));

        setup in_host     = balanced(types);
        in_host.on_device = false;
        check_same("... and in host memory", expected, run(in_host));

        setup half    = balanced({ GGML_TYPE_F16, GGML_TYPE_F16 });
        half.layers_v = "-1:turbo3";
        check_no_session("... for one layer, too", half, "can't do temporal decay of cache type turbo3 in layer ");
        half.layers_v = "-1:turbo2";
        run(half);
        check_cache_line_has("... but for types that decay only", " | no decay: no layer of a type that decays\n");
    }
    {
        // such as one that forwards custom operations
        const limited_device device([](const ggml_tensor *) { return false; }, /*knows_turbo =*/false);
        check_no_session("a device whose backend does not say that it can", balanced(types),
                         "device LIMITED can't do temporal decay of cache type ");
        check_same("... works without decay", never, run(plain(types)));
    }
    {
        const limited_device device([](const ggml_tensor *) { return false; });
        check_same("a device that can", expected, run(balanced(types)));
        check_cache_line_has("... does", " decay=15,35,50 ");
        check_cache_line_has("... in some layers", " | decaying ");
    }
}

int main(int argc, char ** argv) {
    const test_program program{
        "test-turbo-decay",
        {
          { "by-hand", test_by_hand },
          { "chunks", test_chunks },
          { "state", test_state },
          { "twice", test_twice },
          { "rewrite", test_rewrite },
          { "sequences", test_sequences },
          { "shift", test_shift },
          { "quality", test_quality },
          { "graph", test_graph },
          { "none", test_none },
          { "errors", test_errors },
          { "device", test_device },
          },
        /*needs_turbo =*/
        true,
    };

    return program.main(argc, argv);
}
