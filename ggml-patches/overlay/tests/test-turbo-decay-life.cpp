// Temporal decay in the life of a cache: states, cells that are used again, sequences, and shifts. Scenarios of test-turbo-decay.

#include "test-turbo-decay.h"

//
// state
//

// The state of a cache that decays goes on as the cache itself.
// A state goes from a context that decays to one that does not, and the other way round.
static void check_state_without_decay(const setup &    s,
                                      const setup &    types,
                                      const bytes_t &  state,
                                      const logits_t & expected,
                                      int              n_tokens,
                                      int              n_more) {
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

void test_state(const setup & types) {
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

    check_state_without_decay(s, types, state, expected, n_tokens, n_more);
}

// Decay of what has decayed changes nothing.
void test_twice(const setup & types) {
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

void test_rewrite(const setup & types) {
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
void test_shared_cells(const setup & types) {
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
void test_copied_buffer(const setup & types) {
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

void test_sequences(const setup & types) {
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

void test_shift(const setup & types) {
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
