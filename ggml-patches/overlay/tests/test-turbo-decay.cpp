// Temporal decay: which cells have lost a bit and which have not, seen in the saved state; and that nothing else changes.
//
//   test-turbo-decay MODEL SCENARIO TYPE_K TYPE_V [-ctkl MAP] [-ctvl MAP] [-t THREADS] [-v]

#include "test-turbo-device.h"
#include "test-turbo-session.h"
#include "test-turbo-state.h"

using positions = std::set<llama_pos>;

constexpr int N_CTX = 512;

struct shares {
    const char * text;
    int          hot, warm, cold;
};

static const shares BALANCED = { "balanced", 15, 35, 50 };

static const shares ALL_SHARES[] = {
    { "conservative", 25, 40, 35  },
    BALANCED, { "aggressive",   5,  25, 70  },
    { "59,0,41",      59, 0,  41  },
    { "0,0,100",      0,  0,  100 },
};

static setup decaying(const setup & types, const char * decay) {
    setup s = types;
    s.decay = decay;
    s.n_ctx = N_CTX;
    return s;
}

static setup balanced(const setup & types) {
    return decaying(types, BALANCED.text);
}

static setup plain(const setup & types) {
    return decaying(types, "");
}

//
// what has decayed
//

static positions range(llama_pos begin, llama_pos end) {
    positions res;
    for (llama_pos pos = begin; pos < end; ++pos) {
        res.insert(pos);
    }
    return res;
}

static positions operator|(positions a, const positions & b) {
    a.insert(b.begin(), b.end());
    return a;
}

// Rows of turbo3 and turbo4 where not all blocks have decayed though they should, or some though none should.
struct decay_count {
    int n_wrong    = 0;
    int n_decayed  = 0;
    int n_expected = 0;
};

// open_k: positions whose K may be either.
static decay_count count_decayed(saved_state &     state,
                                 const positions & k,
                                 const positions & v,
                                 const positions & open_k) {
    decay_count res;
    for (size_t c = 0; c < state.caches.size(); ++c) {
        const bool has_window = c > 0;
        for (const saved_stream & stream : state.caches[c]) {
            for_each_tensor(stream, [&](const saved_tensor & tensor, bool is_k) {
                if (!ggml_turbo_decays(tensor.type)) {
                    return;
                }
                const int n_blocks = (int) (tensor.row_size / ggml_type_size(tensor.type));
                for (size_t i = 0; i < stream.cells.size(); ++i) {
                    if (is_k && open_k.count(stream.cells[i].pos) > 0) {
                        continue;
                    }
                    const bool expected = !has_window && (is_k ? k : v).count(stream.cells[i].pos) > 0;
                    const int  n        = n_decayed_blocks(tensor.type, state.row(tensor, i), tensor.row_size);
                    res.n_decayed += n == n_blocks;
                    res.n_expected += expected;
                    res.n_wrong += n != (expected ? n_blocks : 0);
                }
            });
        }
    }
    return res;
}

static void check_decayed(const std::string & what,
                          saved_state         state,
                          const positions &   k,
                          const positions &   v,
                          const positions &   open_k = {}) {
    const decay_count n        = count_decayed(state, k, v, open_k);
    const bool        has_rows = n.n_expected > 0 || (k.empty() && v.empty());
    report(n.n_wrong == 0 && has_rows, what,
           format("%.0f rows decayed, expected %.0f, %.0f are wrong", n.n_decayed, n.n_expected, n.n_wrong));
}

static void check_decayed(const std::string & what, const saved_state & state, const positions & both) {
    check_decayed(what, state, both, both);
}

// The numbers that a cache logs when it is freed.
struct decay_totals {
    long long n_passes = -1;
    long long n_k      = -1;
    long long n_v      = -1;
};

static decay_totals logged_totals() {
    decay_totals res;
    const size_t pos = log_text.rfind("llama_turbo_cache: decay: ");
    if (pos != std::string::npos) {
        sscanf(log_text.c_str() + pos, "llama_turbo_cache: decay: %lld passes, %lld cells of K, %lld cells of V\n",
               &res.n_passes, &res.n_k, &res.n_v);
    }
    return res;
}

// Layers without a window whose K or V can decay.
static int n_decaying_layers(const saved_state & state, bool k) {
    int n = 0;
    for_each_tensor(state.caches[0][0],
                    [&](const saved_tensor & tensor, bool is_k) { n += is_k == k && ggml_turbo_decays(tensor.type); });
    return n;
}

//
// by hand
//

static void decay_row(const saved_tensor & tensor, uint8_t * row) {
    if (ggml_turbo_decays(tensor.type)) {
        const int64_t n_values = tensor.row_size / ggml_type_size(tensor.type) * QK_TURBO;
        ggml_turbo_decay_row(tensor.type, ggml_turbo_get_scale(), row, n_values);
    }
}

// Decays what is cold of a sequence, as the library should have done by now, and puts the state back.
static void decay_by_hand(const session & s, int percent) {
    saved_state state = read_seq_state(s, 0);
    if (state.caches[0].empty()) {
        return;
    }
    const saved_stream & stream = state.caches[0][0];
    const int            cold   = n_cold((int) stream.cells.size(), percent);
    for_each_tensor(stream, [&](const saved_tensor & tensor, bool) {
        for (size_t i = 0; i < stream.cells.size(); ++i) {
            if (stream.cells[i].pos < cold) {
                decay_row(tensor, state.row(tensor, i));
            }
        }
    });
    if (!set_seq_state(s, state.bytes, 0)) {
        check("state with decayed rows read", false);
    }
}

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
// state
//

// The state of a cache that decays goes on as the cache itself.
static void test_state(const setup & types) {
    constexpr int n_tokens = 300;
    constexpr int n_more   = 64;

    const std::string name =
        std::string("test-turbo-decay-") + ggml_type_name(types.type_k) + "-" + ggml_type_name(types.type_v);
    setup s = balanced(types);
    s.n_seq = 2;

    const session writer = session::make(s);
    writer.decode(text(n_tokens));
    const bytes_t            state     = get_state(writer);
    const bytes_t            seq_state = get_seq_state(writer, 0);
    std::vector<llama_token> tokens(n_tokens, 3);
    const std::string        path     = name + ".state";
    const std::string        path_seq = name + ".seq";
    check("files written",
          llama_state_save_file(writer.ctx.get(), path.c_str(), tokens.data(), tokens.size()) &&
              llama_state_seq_save_file(writer.ctx.get(), path_seq.c_str(), 0, tokens.data(), tokens.size()) > 0);

    // stored before the last ubatch: 256
    check_decayed("what was cold has decayed", read_seq_state(writer, 0), range(0, n_cold(256, BALANCED.cold)));
    const logits_t  expected = generate(writer, n_more, n_tokens);
    const positions after    = range(0, n_cold(n_tokens + n_more - 1, BALANCED.cold));
    check_decayed("... and more later", read_seq_state(writer, 0), after);

    size_t n_got = 0;
    {
        const session one = session::make(s);
        check("state read", set_state(one, state));
        check_continues(expected, generate(one, n_more, n_tokens));
        check_decayed("... and decays", read_seq_state(one, 0), after);
        check("state read once more", set_state(one, state));
        check_continues(expected, generate(one, n_more, n_tokens));
    }
    for (llama_seq_id seq : { 0, 1 }) {
        const session one = session::make(s);
        one.decode(text(200, 0, 1 - seq, 7));  // the other sequence is in use
        one.decode(text(310, 0, seq, 8));      // and this one was
        check("sequence read", set_seq_state(one, seq_state, seq));
        check_continues(expected, generate(one, n_more, n_tokens, seq));
        check_decayed("... and decays", read_seq_state(one, seq), after);
        check_decayed("... and the other one by itself", read_seq_state(one, 1 - seq),
                      range(0, n_cold(200, BALANCED.cold)));
    }
    {
        const session one = session::make(s);
        check("state file read",
              llama_state_load_file(one.ctx.get(), path.c_str(), tokens.data(), tokens.size(), &n_got));
        check_continues(expected, generate(one, n_more, n_tokens));
    }
    {
        const session one = session::make(s);
        check("sequence file read",
              llama_state_seq_load_file(one.ctx.get(), path_seq.c_str(), 1, tokens.data(), tokens.size(), &n_got) > 0);
        check_continues(expected, generate(one, n_more, n_tokens, 1));
    }
    remove(path.c_str());
    remove(path_seq.c_str());

    setup without       = plain(types);
    without.n_seq       = 2;
    const session never = session::make(without);
    check("state read by a context that does not decay", set_state(never, state));
    const logits_t same(expected.begin(), expected.begin() + expected.size() / n_more);
    const logits_t next = generate(never, 1, n_tokens);
    check("... continues with what it has", next.size() == same.size() && nmse(next, same) < 1.0);
    check_decayed("... and leaves it as it is", read_seq_state(never, 0), range(0, n_cold(256, BALANCED.cold)));

    llama_memory_clear(never.memory(), true);
    never.decode(text(n_tokens));
    const bytes_t fresh = get_state(never);
    const session late  = session::make(s);
    check("state of one that does not decay is read", set_state(late, fresh));
    generate(late, 1, n_tokens);
    check_decayed("... and decays with the next token", read_seq_state(late, 0),
                  range(0, n_cold(n_tokens, BALANCED.cold)));
}

// Decay of what has decayed changes nothing.
static void test_twice(const setup & types) {
    const session one = session::make(balanced(types));
    one.decode(text(300));
    generate(one, 1, 300);  // so that all that is cold has decayed

    const saved_state before = read_seq_state(one, 0);
    const session     two    = session::make(balanced(types));
    check("state read", set_seq_state(two, before.bytes, 0));
    two.decode(text(1, 301));  // decays all cold cells again
    llama_memory_seq_rm(two.memory(), 0, 301, -1);
    const saved_state after = read_seq_state(two, 0);
    check("all cells are as before", after.bytes == before.bytes);

    decay_by_hand(two, BALANCED.cold);
    check("... and decayed by hand, too", get_seq_state(two, 0) == before.bytes);
}

//
// cells that are used again
//

static void test_rewrite(const setup & types) {
    const int     cold_prompt = n_cold(192, BALANCED.cold);  // stored before the last ubatch of 256 tokens
    const session one         = session::make(balanced(types));

    const auto fill = [&](uint32_t seed) {
        one.decode(text(256, 0, 0, seed));
        check_decayed("a text", read_seq_state(one, 0), range(0, cold_prompt));
    };
    const auto new_text = [&](uint32_t seed) {
        one.decode(text(50, 0, 0, seed));
        check_decayed("... a new text is whole", read_seq_state(one, 0), {});
        one.decode(text(206, 50, 0, seed));  // stored before the last ubatch: 50 + 192
        check_decayed("... and decays when it is long", read_seq_state(one, 0), range(0, n_cold(242, BALANCED.cold)));
    };

    fill(0);
    llama_memory_clear(one.memory(), true);
    new_text(1);

    llama_memory_clear(one.memory(), false);
    new_text(2);

    llama_memory_seq_rm(one.memory(), 0, -1, -1);
    new_text(3);

    llama_memory_seq_rm(one.memory(), -1, -1, -1);
    fill(4);

    // the tail goes, with cells that have decayed: 0 .. 47 stay
    llama_memory_seq_rm(one.memory(), 0, 48, -1);
    one.decode(text(100, 48, 0, 5));   // stored before the last ubatch: 112
    check_decayed("what is stored in place of a tail is whole", read_seq_state(one, 0), range(0, 48));
    one.decode(text(108, 148, 0, 5));  // 212
    check_decayed("... until it is cold", read_seq_state(one, 0), range(0, n_cold(212, BALANCED.cold)));

    // the beginning goes: the sequence begins at 64 now, and 64 of 192 positions are cold at its end
    llama_memory_seq_rm(one.memory(), 0, 0, 64);
    one.decode(text(1, 256, 0, 5));
    check_decayed("a sequence that begins later", read_seq_state(one, 0), range(64, 64 + n_cold(192, BALANCED.cold)));
}

//
// sequences
//

// Cells of two sequences: cold is what is cold for both.
static void test_shared_cells(const setup & types) {
    setup s     = balanced(types);
    s.n_ctx     = 1024;
    s.n_seq     = 2;
    s.unified   = true;
    const int p = BALANCED.cold;

    const session one = session::make(s);
    one.decode(text(128));
    llama_memory_seq_cp(one.memory(), 0, 1, -1, -1);
    one.decode(text(272, 128));  // stored before the last ubatch: 384 of one, 128 of the other
    check_decayed("the longer one", read_seq_state(one, 0), range(0, n_cold(128, p)) | range(128, n_cold(384, p)));
    check_decayed("the shorter one", read_seq_state(one, 1), range(0, n_cold(128, p)));

    one.decode(text(192, 128, 1, 5));  // 400, 256
    check_decayed("the longer one, once the other has grown", read_seq_state(one, 0), range(0, n_cold(400, p)));
    check_decayed("the one that has grown", read_seq_state(one, 1), range(0, n_cold(256, p)));

    const session two = session::make(s);
    two.decode(text(128));
    llama_memory_seq_cp(two.memory(), 0, 1, -1, -1);
    two.decode(text(272, 128));
    llama_memory_seq_rm(two.memory(), 1, -1, -1);
    two.decode(text(1, 400));
    check_decayed("the longer one, once the other is gone", read_seq_state(two, 0), range(0, n_cold(400, p)));
}

// Sequences of different lengths that grow by turns, so that their cells alternate in a common buffer.
static void test_alternating(const setup & types, bool unified) {
    setup s         = balanced(types);
    s.n_ctx         = unified ? 2 * N_CTX : N_CTX;
    s.n_seq         = 2;
    s.unified       = unified;
    const int p     = BALANCED.cold;
    const int n_own = 200;

    const session one = session::make(s);
    one.decode(text(n_own));
    one.decode(text(40, 0, 1, 3));
    for (int i = 0; i < 140; ++i) {
        std::vector<input> both = text(1, n_own + i);
        both.push_back(text(1, 40 + i, 1, 3)[0]);
        if (i % 2 == 0) {
            one.decode(both);
        } else {
            one.decode({ both[0] });
            one.decode({ both[1] });
        }
    }
    // before the last token of the other: 340, 179
    check_decayed("the longer one", read_seq_state(one, 0), range(0, n_cold(340, p)));
    check_decayed("the shorter one", read_seq_state(one, 1), range(0, n_cold(179, p)));
}

// A copy to another buffer takes along what has decayed, and what was in the buffer before does not count.
static void test_copied_buffer(const setup & types) {
    setup s     = balanced(types);
    s.n_seq     = 2;
    const int p = BALANCED.cold;

    const session one = session::make(s);
    one.decode(text(320, 0, 1, 9));
    check_decayed("a text in the second buffer", read_seq_state(one, 1), range(0, n_cold(256, p)));
    one.decode(text(128));
    llama_memory_seq_cp(one.memory(), 0, 1, -1, -1);
    check_decayed("its first tokens", read_seq_state(one, 0), range(0, n_cold(64, p)));

    one.decode(text(1, 128, 1));
    check_decayed("a copy in its place", read_seq_state(one, 1), range(0, n_cold(128, p)));
    check_decayed("... and the original", read_seq_state(one, 0), range(0, n_cold(128, p)));

    one.decode(text(200, 129, 1));  // stored before the last ubatch: 129 + 192
    check_decayed("the copy grows", read_seq_state(one, 1), range(0, n_cold(321, p)));
    check_decayed("... and the original does not", read_seq_state(one, 0), range(0, n_cold(128, p)));
}

static void test_sequences(const setup & types) {
    test_shared_cells(types);
    test_alternating(types, /*unified =*/true);
    test_alternating(types, /*unified =*/false);
    test_copied_buffer(types);
}

//
// context shift
//

// Rows of V at these positions.
static std::vector<bytes_t> rows_of_v(const saved_state & state, llama_pos begin, llama_pos end) {
    std::vector<bytes_t> res;
    const saved_stream & stream = state.caches[0][0];
    for (const saved_tensor & tensor : stream.v) {
        for (size_t i = 0; i < stream.cells.size(); ++i) {
            if (stream.cells[i].pos >= begin && stream.cells[i].pos < end) {
                res.push_back(state.copy_row(tensor, i));
            }
        }
    }
    return res;
}

static void test_shift(const setup & types) {
    const int p     = BALANCED.cold;
    bool      has_k = false;
    bool      has_v = false;

    {
        const session one = session::make(balanced(types));
        one.decode(text(256));
        const saved_state before = read_seq_state(one, 0);
        check_decayed("before the shift", before, range(0, n_cold(192, p)));

        shift(one, 40, 32);
        one.decode(text(1, 224));
        const saved_state after = read_seq_state(one, 0);
        check_decayed("K and V of all cold cells, moved or not", after, range(0, n_cold(224, p)));
        check("V that had decayed has moved as it was", rows_of_v(before, 72, 96) == rows_of_v(after, 40, 64));
        check("V that is whole has moved as it was", rows_of_v(before, 200, 256) == rows_of_v(after, 168, 224));

        generate(one, 60, 225);
        check_decayed("... and later", read_seq_state(one, 0), range(0, n_cold(284, p)));
        has_k = n_decaying_layers(after, true) > 0;
        has_v = n_decaying_layers(after, false) > 0;
    }
    // before the shift 96, then 32 and 32 more; of K also the 24 that had decayed and moved
    const decay_totals totals = logged_totals();
    check_count("cells of K in the log", totals.n_k, has_k ? 96 + 24 + 32 + 32 : 0);
    check_count("cells of V in the log", totals.n_v, has_v ? 96 + 32 + 32 : 0);
    {
        // decayed, but no longer cold: K of cells that move is encoded again, V is as it was
        const session one = session::make(balanced(types));
        one.decode(text(256));
        llama_memory_seq_rm(one.memory(), 0, 100, -1);
        shift(one, 16, 16);
        one.decode(text(1, 84));
        check_decayed("a shift of cells that are no longer cold", read_seq_state(one, 0), range(0, n_cold(84, p)),
                      range(0, 80), range(n_cold(84, p), 80));
    }
    {
        // two buffers: that one moves leaves the other as it was
        setup s           = balanced(types);
        s.n_seq           = 2;
        const session one = session::make(s);
        one.decode(text(256));
        one.decode(text(256, 0, 1, 4));
        check_decayed("another sequence", read_seq_state(one, 0), range(0, n_cold(256, p)));
        llama_memory_seq_rm(one.memory(), 1, 16, 48);
        llama_memory_seq_add(one.memory(), 1, 48, -1, -32);
        one.decode(text(1, 224, 1, 4));
        check_decayed("... when this one moves", read_seq_state(one, 0), range(0, n_cold(256, p)));
        check_decayed("... which decays", read_seq_state(one, 1), range(0, n_cold(224, p)));
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
        check_cache_line_has("... which is said", " | no decay: no layer\n");
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
                " in layer 0: leave TURBO_CACHE_DECAY and --cache-decay out, keep the cache in host memory with -nkvo");
        check_same("... works without decay", never, run(plain(types)));

        setup in_host     = balanced(types);
        in_host.on_device = false;
        check_same("... and in host memory", expected, run(in_host));

        setup half    = balanced({ GGML_TYPE_F16, GGML_TYPE_F16 });
        half.layers_v = "-1:turbo3";
        check_no_session("... for one layer, too", half, "can't do temporal decay of cache type turbo3 in layer ");
        half.layers_v = "-1:turbo2";
        run(half);
        check_cache_line_has("... but for types that decay only", " | no decay: no layer\n");
    }
    {
        // such as RPC, which forwards custom operations and can't know
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
