// Exact tokens in the life of a cache: shifts, sequences, removals, and states. Scenarios of test-turbo-exact.

#include "test-turbo-exact.h"

//
// shift
//

void test_shift(const setup & types) {
    for (int n_shifts : { 1, 2 }) {
        const std::string what     = n_shifts == 1 ? "one shift" : "two shifts";
        const logits_t    expected = shift_and_continue(session::make(half(types)), n_shifts);
        check_at_most(what, nmse(expected, shift_and_continue(session::make(all_in_tail(types)), n_shifts)), NMSE_HALF);
        check_at_most(what + ", an f16 cache with a window",
                      nmse(expected, shift_and_continue(session::make(window(half(types))), n_shifts)), NMSE_HALF);
    }
}

//
// sequences
//

void test_sequences(const setup & types) {
    for (bool unified : { true, false }) {
        printf("     %s\n", unified ? "sequences share one buffer" : "one buffer per sequence");

        setup two   = types;
        two.n_seq   = 2;
        two.unified = unified;

        const session plain = session::make(half(two));
        plain.decode(text(48));
        const logits_t expected = generate(plain, 8, 48);

        const session s = session::make(all_in_tail(two));
        s.decode(text(48));
        llama_memory_seq_cp(s.memory(), 0, 1, -1, -1);
        check_at_most("a sequence continues", nmse(expected, generate(s, 8, 48, 0)), NMSE_HALF);
        check_at_most("a copied one, too", nmse(expected, generate(s, 8, 48, 1)), NMSE_HALF);
        if (!llama_model_is_hybrid(model)) {  // recurrent layers can't forget a tail
            llama_memory_seq_rm(s.memory(), 0, 48, -1);
            check_at_most("... and once its tail is removed", nmse(expected, generate(s, 8, 48, 0)), NMSE_HALF);
            llama_memory_seq_rm(s.memory(), 0, -1, -1);
            llama_memory_seq_rm(s.memory(), 1, 48, -1);
            check_at_most("... and once the original is removed", nmse(expected, generate(s, 8, 48, 1)), NMSE_HALF);
        }
        llama_memory_clear(s.memory(), true);
        check_at_most("... and once all is cleared",
                      nmse(prompt_and_generate(session::make(half(two))), prompt_and_generate(s)), NMSE_HALF);

        // each sequence has a window of its own, wherever the other one is
        const session alone = session::make(window(two));
        alone.decode(text(100, 0, 0, 7));
        logits_t of_first = generate(alone, 8, 100, 0, 7);
        llama_memory_clear(alone.memory(), true);
        alone.decode(text(30, 0, 0, 8));
        logits_t of_second = generate(alone, 8, 30, 0, 8);

        const session both = session::make(window(two));
        both.decode(text(100, 0, 0, 7));
        both.decode(text(30, 0, 1, 8));
        logits_t first;
        logits_t second;
        for (int i = 0; i < 8; ++i) {
            const logits_t logits = both.decode({ text(1, 100 + i, 0, 7)[0], text(1, 30 + i, 1, 8)[0] });
            append(first, logits_t(logits.begin(), logits.begin() + logits.size() / 2));
            append(second, last_logits(logits, 1));
        }
        check_at_most("two sequences at once: the first", nmse(of_first, first), nmse_batch(types));
        check_at_most("two sequences at once: the second", nmse(of_second, second), nmse_batch(types));

        // ... and prompts of both in one batch
        const session      prompts = session::make(all_in_tail(two));
        std::vector<input> inputs  = text(50, 0, 0, 7);
        const auto         others  = text(50, 0, 1, 8);
        inputs.insert(inputs.end(), others.begin(), others.end());
        prompts.decode(inputs);
        for (int seq : { 0, 1 }) {
            const session one = session::make(half(types));
            one.decode(text(50, 0, 0, 7 + seq));
            check_at_most("prompts of both at once: sequence " + std::to_string(seq),
                          nmse(generate(one, 8, 50, 0, 7 + seq), generate(prompts, 8, 50, seq, 7 + seq)), NMSE_HALF);
        }
    }
}

//
// removal
//

void test_removal(const setup & types) {
    const setup s = long_context(window(types));

    const session  fresh    = session::make(s);
    const logits_t expected = last_logits(fresh.decode(text(100)), 1);

    const session used = session::make(s);
    used.decode(text(N_LONG, 0, 0, 5));
    llama_memory_clear(used.memory(), true);
    check_same("a cleared cache is a new one", expected, last_logits(used.decode(text(100)), 1));

    // the last tokens, and again
    const session again = session::make(s);
    again.decode(text(N_LONG));
    const logits_t first = generate(again, 20, N_LONG);
    for (int n : { 1, 20 }) {
        llama_memory_seq_rm(again.memory(), 0, N_LONG + 20 - n, -1);
        check_at_most("the last " + std::to_string(n) + " tokens removed and computed again",
                      nmse(last_logits(first, n), generate(again, n, N_LONG + 20 - n)), nmse_batch(types));
    }

    // of a sequence beside a longer one, whose copies are older
    setup two               = s;
    two.n_seq               = 2;
    two.unified             = true;
    const session beside    = session::make(two);
    const session untouched = session::make(two);
    for (const session * one : { &beside, &untouched }) {
        one->decode(text(400, 0, 0, 1));
        one->decode(text(60, 0, 1, 2));
    }
    for (int i = 0; i < REWIND; ++i) {
        beside.decode({ text(1, 400 + i, 0, 1)[0], text(1, 60 + i, 1, 3)[0] });
    }
    llama_memory_seq_rm(beside.memory(), 1, 60, -1);
    check_at_most("the last 16 tokens of one of two sequences removed",
                  nmse(generate(untouched, 8, 60, 1, 2), generate(beside, 8, 60, 1, 2)), NMSE_DEEP);

    // tokens in the middle: what is left is the same as with copies of everything that is left
    const session holes = session::make(all_in_tail(types));
    holes.decode(text(96));
    const session plain = session::make(half(types));
    plain.decode(text(96));
    for (const session * one : { &holes, &plain }) {
        llama_memory_seq_rm(one->memory(), 0, 20, 50);
    }
    check_at_most("tokens in the middle removed", nmse(generate(plain, 16, 96), generate(holes, 16, 96)), NMSE_HALF);
}

//
// state
//

static int64_t copied_cells(const session & s) {
    return read_state(s).caches.at(0).at(0).copied_cells.size();
}

// A context, and what it has saved after a prompt.
struct saved_context {
    setup    s;
    int      n_prompt;
    session  writer;
    bytes_t  state;
    bytes_t  seq_state;
    logits_t expected;  // what follows

    saved_context(const setup & s, int n_prompt) : s(s), n_prompt(n_prompt), writer(session::make(s)) {
        writer.decode(text(n_prompt));
        state     = get_state(writer);
        seq_state = get_seq_state(writer, 0);
        expected  = generate(writer, 12, n_prompt);
    }

    setup plain() const { return with(s, "0", "0"); }

    // all sequences in one stream
    setup shared() const {
        setup res   = s;
        res.unified = true;
        return res;
    }
};

static void check_state_is_read(const saved_context & saved) {
    const double bound = nmse_batch(saved.s);
    {
        const session reader = session::make(saved.s);
        check("state read", set_state(reader, saved.state));
        check_goes_on(saved.expected, generate(reader, 12, saved.n_prompt));
    }
    {
        const session reader = session::make(saved.s);
        check("sequence read", set_seq_state(reader, saved.seq_state, 1));
        check_at_most("... continues", nmse(saved.expected, generate(reader, 12, saved.n_prompt, 1)), bound);
    }
    {
        const session reader = session::make(saved.s);
        reader.decode(text(N_LONG, 0, 0, 3));
        reader.decode(text(50, 0, 1, 4));
        check("sequence read into a used cache", set_seq_state(reader, saved.seq_state, 1));
        check_at_most("... continues", nmse(saved.expected, generate(reader, 12, saved.n_prompt, 1)), bound);
    }
}

// Into other numbers of exact tokens, and of rows: what both have, and the rest from the cache.
static void check_other_sizes(const saved_context & saved) {
    const setup & s         = saved.s;
    const int     n_prompt  = saved.n_prompt;
    const double  one_token = nmse_of_types(s);
    for (const setup & to : { saved.plain(), with(s, "20", "300"), with(s, "2", "4"), with(s, "900", "900") }) {
        const session reader = session::make(to);
        check("state read with sink '" + to.sink + "', tail '" + to.tail + "'", set_state(reader, saved.state));
        check_at_most("... continues", nmse(saved.expected, generate(reader, 12, n_prompt)), one_token);
    }
    setup narrow = s;
    narrow.n_seq = 1;
    for (const auto & [from, to] : { std::make_pair(saved.shared(), narrow), std::make_pair(narrow, saved.shared()) }) {
        const session first = session::make(from);
        first.decode(text(n_prompt));
        const session second = session::make(to);
        check("state read with another number of rows", set_seq_state(second, get_seq_state(first, 0), 0));
        check_count("... and all its copies", copied_cells(second), std::min(n_prompt, SINK + TAIL + REWIND - 1));
        check_goes_on(generate(first, 12, n_prompt), generate(second, 12, n_prompt));
    }
    const session reader = session::make(with(s, "2", "4"));
    set_state(reader, saved.state);
    check_count("a smaller window takes its copies", copied_cells(reader), std::min(n_prompt, 2 + 4 + REWIND - 1));
}

// A sequence beside others does not take their copies.
static void check_beside_another(const saved_context & saved) {
    const double bound = nmse_batch(saved.s);

    const session writer = session::make(saved.shared());
    writer.decode(text(saved.n_prompt));
    const bytes_t  one      = get_seq_state(writer, 0);
    const logits_t expected = generate(writer, 12, saved.n_prompt);

    const session alone = session::make(saved.shared());
    alone.decode(text(100, 0, 1, 9));
    const session both = session::make(saved.shared());
    both.decode(text(100, 0, 1, 9));
    check("a sequence read beside another", set_seq_state(both, one, 0));
    check_at_most("... which continues as without", nmse(generate(alone, 12, 100, 1, 9), generate(both, 12, 100, 1, 9)),
                  bound);
    check_at_most("... and itself", nmse(expected, generate(both, 12, saved.n_prompt)), bound);
}

static void check_without_copies(const saved_context & saved) {
    const int n_prompt = saved.n_prompt;
    {
        saved_state    erased = read_state(saved.writer);
        saved_stream & stream = erased.caches.at(0).at(0);
        for (const saved_tensor & tensor : stream.copies) {
            for (size_t i = 0; i < stream.copied_cells.size(); ++i) {
                erase_row(erased, tensor, i);
            }
        }
        const session with_copies    = session::make(saved.plain());
        const session without_copies = session::make(saved.plain());
        check("states read by a cache without copies",
              set_state(with_copies, read_state(saved.writer).bytes) && set_state(without_copies, erased.bytes));
        check_same("... which leaves them out", generate(with_copies, 4, n_prompt + 12),
                   generate(without_copies, 4, n_prompt + 12));
    }
    const double  one_token = nmse_of_types(saved.s);
    const session writer    = session::make(saved.plain());
    writer.decode(text(n_prompt));
    const bytes_t  state     = get_state(writer);
    const bytes_t  seq_state = get_seq_state(writer, 0);
    const logits_t expected  = generate(writer, 1, n_prompt);

    const session reader = session::make(saved.s);
    reader.decode(text(N_LONG, 0, 0, 3));
    check("state without copies read", set_state(reader, state));
    check_at_most("... continues", nmse(expected, generate(reader, 1, n_prompt)), one_token);
    reader.decode(text(N_LONG, 0, 1, 3));
    check("... and of a sequence", set_seq_state(reader, seq_state, 1));
    check_at_most("... continues", nmse(expected, generate(reader, 1, n_prompt, 1)), one_token);
}

static void check_damaged(const saved_context & saved) {
    for (double part : { 0.02, 0.3, 0.9 }) {
        const session reader = session::make(saved.s);
        const bytes_t cut(saved.seq_state.begin(), saved.seq_state.begin() + (size_t) (part * saved.seq_state.size()));
        check(format("%.0f %% of a state refused", 100 * part), !set_seq_state(reader, cut, 0));
        llama_memory_clear(reader.memory(), true);
        check_same("... and the context works on", last_logits(session::make(saved.s).decode(text(24)), 1),
                   last_logits(reader.decode(text(24)), 1));
    }
    if (llama_model_is_hybrid(model)) {
        return;
    }
    bytes_t    damaged = saved.seq_state;
    const auto found   = std::search(damaged.begin(), damaged.end(), (const uint8_t *) &EXACT_STATE,
                                     (const uint8_t *) (&EXACT_STATE + 1));
    check("the state has copies", found != damaged.end());
    found[8] ^= 1;  // the bytes of a copy
    const session reader = session::make(saved.s);
    check("copies of another size refused", !set_seq_state(reader, damaged, 0));
    check_log_has("... with the reason", "the state is damaged, or of another model: f16 copies of ");
    check_other_layout_refused(saved.writer, saved.s);
}

void test_state(const setup & types) {
    for (int n_prompt : { 48, N_LONG }) {
        printf("     %d tokens\n", n_prompt);

        setup s = long_context(window(types));
        s.n_seq = 2;

        const saved_context saved(s, n_prompt);
        check_state_is_read(saved);
        check_other_sizes(saved);
        check_beside_another(saved);
        check_without_copies(saved);
        check_damaged(saved);
    }
}
