// Tests of an exact sink and tail (src/turbo/exact.h): which tokens are attended in f16, and that they stay right whatever happens to
// the cache.
//
//   test-turbo-exact MODEL SCENARIO TYPE_K TYPE_V [-ctkl MAP] [-ctvl MAP] [-t THREADS] [-v]
//
// Two kinds of checks. With a tail longer than the text, a cache of any type is an f16 cache: any mistake shows. With a short one, bytes of a
// saved state are destroyed, token by token, and the logits tell which of them count.

#include "test-turbo-exact.h"

//
// equal: an f16 cache
//

static void test_equal(const setup & types) {
    const logits_t expected = prompt_and_generate(session::make(half(types)));

    const session s = session::make(all_copied(types));
    check_cache_line_has("the log tells it", " tail=100000 | ");
    const double error = nmse(expected, prompt_and_generate(s));
    check_at_most("every token is copied", error, NMSE_HALF);
    check_at_most("every token is in the tail", nmse(expected, prompt_and_generate(session::make(all_in_tail(types)))),
                  NMSE_HALF);
    if (ggml_is_quantized(types.type_v)) {
        check_at_least("control: without", nmse(expected, prompt_and_generate(session::make(types))), 100 * error);
    }

    for (const auto & [sink, tail] : std::vector<std::pair<const char *, const char *>>{
             { "4",   "0"   },
             { "0",   "8"   },
             { "4",   "8"   },
             { "100", "100" },
             { "500", "0"   },
             { "0",   "1"   }
    }) {
        const std::string what = std::string("an f16 cache, sink ") + sink + ", tail " + tail;
        check_at_most(what, nmse(expected, prompt_and_generate(session::make(with(half(types), sink, tail)))),
                      NMSE_HALF);
    }

    if (llama_model_n_swa(model) > 0) {  // cells behind the window are used again
        setup reused            = types;
        reused.swa_full         = false;
        const logits_t expected = prompt_and_generate(session::make(half(reused)));
        for (const setup & s : { all_copied(reused), all_in_tail(reused) }) {
            check_at_most("cells of a sliding window that are used again",
                          nmse(expected, prompt_and_generate(session::make(s))), NMSE_HALF);
        }
    }

    setup host     = all_in_tail(types);
    host.on_device = false;
    check_at_most("in host memory", nmse(expected, prompt_and_generate(session::make(host))), NMSE_HALF);
}

//
// window: which tokens a query attends in f16
//

// Zeros in place of a row: other values, and finite ones in all types
static logits_t next_logits(const setup & s, const bytes_t & state, int n_past) {
    const session reader = session::make(s);
    if (!set_state(reader, state)) {
        check("state read", false);
        return {};
    }
    return reader.decode(text(1, n_past));
}

static bool is_same(const logits_t & a, const logits_t & b) {
    return !a.empty() && a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

static void check_window(const setup & s, int n_sink, int n_tail) {
    constexpr int n_prompt = 40;

    const session writer = session::make(s);
    writer.decode(text(n_prompt));
    const saved_state    saved    = read_state(writer);
    const saved_stream & stream   = saved.caches.at(0).at(0);
    const logits_t       expected = next_logits(s, saved.bytes, n_prompt);
    check_goes_on(writer.decode(text(1, n_prompt)), expected);
    check_count(format("sink %.0f, tail %.0f: copies of what is needed", n_sink, n_tail), stream.copied_cells.size(),
                n_sink + (n_tail > 0 ? n_tail + REWIND - 1 : 0));

    for (bool packed : { true, false }) {
        int n_wrong = 0;
        for (int i = 0; i < n_prompt; ++i) {
            saved_state  state = saved;
            const size_t copy =
                std::find(stream.copied_cells.begin(), stream.copied_cells.end(), i) - stream.copied_cells.begin();
            if (packed) {
                for_each_tensor(stream, [&](const saved_tensor & tensor, bool) { erase_row(state, tensor, i); });
            } else if (copy < stream.copied_cells.size()) {
                for (const saved_tensor & tensor : stream.copies) {
                    erase_row(state, tensor, copy);
                }
            }
            const llama_pos pos      = stream.cells[i].pos;
            const bool      is_exact = pos < n_sink || (n_tail > 0 && pos > n_prompt - n_tail);
            const bool      counts   = !is_same(expected, next_logits(s, state.bytes, n_prompt));
            if (counts != (packed ? !is_exact : is_exact)) {
                printf("     %s of the token at %d %s\n", packed ? "packed rows" : "the copy", pos,
                       counts ? "count" : "do not count");
                ++n_wrong;
            }
        }
        check_count(packed ? "packed rows count outside of the window only" : "copies count in the window only",
                    n_wrong, 0);
    }
}

static void test_window(const setup & types) {
    check_window(window(types), SINK, TAIL);
    check_window(with(types, std::to_string(SINK), "0"), SINK, 0);
    check_window(with(types, "0", std::to_string(TAIL)), 0, TAIL);
}

//
// batches: the same however the text is cut, also where rows of copies are used again
//

static logits_t of_last_tokens(const setup & s, bool one_at_a_time) {
    const session writer = session::make(s);
    logits_t      res    = last_logits(writer.decode(text(500)), 100);
    append(res, one_at_a_time ? generate(writer, 100, 500) : writer.decode(text(100, 500)));
    return res;
}

static void test_batches(const setup & types) {
    setup s    = long_context(window(types));
    s.n_ubatch = 512;

    const logits_t expected = of_last_tokens(s, false);
    check_cache_line_has("rows", " | copies 32 rows in 1 streams, ");

    // what is left of the difference that the window makes: float error, and values that it moves to another level of the quantizer
    const double without = nmse(expected, of_last_tokens(long_context(types), false));
    check_at_least("control: without", without, 10 * NMSE_HALF);

    s.n_ubatch = 64;
    check_at_most("small batches, and one token at a time", nmse(expected, of_last_tokens(s, true)), without / 10);

    s.n_ubatch = 3;
    check_at_most("three tokens at a time", nmse(expected, of_last_tokens(s, false)), without / 10);
}

//
// refusals
//

static void test_refusals(const setup & types) {
    setup off      = window(half(types));
    off.flash_attn = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    check_no_session(
        "without flash attention", off,
        "an exact sink and tail (--cache-sink, --cache-tail) needs flash attention, which was switched off");

    for (const char * wrong : { "x", "-1", "1.5", "4x", " 4", "16777217", "99999999", "123456789012" }) {
        check_no_session(std::string("a sink of '") + wrong + "'", with(types, wrong, "0"),
                         std::string("--cache-sink ") + wrong + ": not a number of tokens from 0 to 16777216");
        check_no_session(std::string("a tail of '") + wrong + "'", with(types, "0", wrong),
                         std::string("--cache-tail ") + wrong + ": not a number of tokens from 0 to 16777216");
    }

    const session none = session::make(with(types, "0", "0"));
    check("none with 0", !cache_line_has(" sink=") && !cache_line_has(" tail=") && !cache_line_has("copies"));

    const session s = session::make(window(types));
    check_cache_line_has("an exact cache", " sink=4 tail=8 | ");
}

//
// main
//

int main(int argc, char ** argv) {
    const test_program program{
        "test-turbo-exact",
        {
          { "equal", test_equal },
          { "window", test_window },
          { "batches", test_batches },
          { "shift", test_shift },
          { "sequences", test_sequences },
          { "removal", test_removal },
          { "state", test_state },
          { "refusals", test_refusals },
          },
        /*needs_turbo =*/
        false,
    };

    return program.main(argc, argv);
}
