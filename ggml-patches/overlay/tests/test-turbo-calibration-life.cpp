// Calibration in the life of a cache: shifts, sequences, and states. Scenarios of test-turbo-calibration.

#include "test-turbo-calibration.h"

//
// shift
//

void test_shift(const setup & types) {
    GGML_UNUSED(types);

    const setup f32 = f32_setup();

    if (!llama_memory_can_shift(session::make(f32).memory())) {
        check("the cache of this model can shift", false);
        return;
    }
    static const std::pair<int, part> shifts[] = {
        { 1, ALL_SCALED },
        { 1, ALL        },
        { 2, ALL        },
    };
    for (const auto & [n_shifts, parts] : shifts) {
        const calibration_file file     = random_file(parts);
        const std::string      what     = n_shifts == 1 ? "one shift" : "two shifts";
        const logits_t         expected = shift_and_continue(session::make(f32), n_shifts);

        check_at_most(what, nmse(expected, shift_and_continue(session::make(with(f32, file)), n_shifts)), nmse_equal());
        check_at_most(what + ", rotated",
                      nmse(expected, shift_and_continue(session::make(with(rotated(f32), file)), n_shifts)),
                      nmse_equal());

        setup half  = f32_setup();
        half.type_k = GGML_TYPE_F16;
        check_at_most(what + ", K f16", nmse(expected, shift_and_continue(session::make(with(half, file)), n_shifts)),
                      NMSE_HALF);
    }
}

//
// sequences
//

void test_sequences(const setup & types) {
    GGML_UNUSED(types);

    const calibration_file file = random_file(ALL);

    for (bool unified : { true, false }) {
        printf("     %s\n", unified ? "sequences share one buffer" : "one buffer per sequence");

        setup two   = f32_setup();
        two.n_seq   = 2;
        two.unified = unified;

        const session plain = session::make(two);
        plain.decode(text(48));
        const logits_t expected = generate(plain, 8, 48);

        const session s = session::make(with(two, file));
        s.decode(text(48));
        llama_memory_seq_cp(s.memory(), 0, 1, -1, -1);
        check_at_most("a sequence continues as without", nmse(expected, generate(s, 8, 48, 0)), nmse_equal());
        check_at_most("a copied one, too", nmse(expected, generate(s, 8, 48, 1)), nmse_equal());

        if (llama_model_is_hybrid(model)) {
            continue;  // recurrent layers can't forget a tail
        }
        llama_memory_seq_rm(s.memory(), 0, 48, -1);
        check_at_most("... and once its tail is removed", nmse(expected, generate(s, 8, 48, 0)), nmse_equal());
        llama_memory_seq_rm(s.memory(), 0, -1, -1);
        llama_memory_seq_rm(s.memory(), 1, 48, -1);
        check_at_most("... and once the original is removed", nmse(expected, generate(s, 8, 48, 1)), nmse_equal());
        check_at_least("control: another text", nmse(expected, generate(s, 8, 56, 1)), NMSE_MISTAKE);
    }
}

//
// state
//

// A state must be refused for the reason given.
static void check_state_refused(const std::string & what,
                                const setup &       s,
                                const bytes_t &     state,
                                const bytes_t &     seq_state,
                                const std::string & reason) {
    check_refused(what, s, state, seq_state);

    const session other = session::make(s);
    set_state(other, state);
    check_log_has("... with the reason", reason);
}

void test_state(const setup & types) {
    constexpr int n_prompt = 48;

    const calibration_file file  = random_file(ALL);
    const calibration_file other = random_file(ALL, 1);

    for (setup s : { types, f32_setup() }) {
        s.n_seq = 2;

        const setup   calibrated = with(s, file);
        const session writer     = session::make(calibrated);
        writer.decode(text(n_prompt));
        const bytes_t  state     = get_state(writer);
        const bytes_t  seq_state = get_seq_state(writer, 0);
        const logits_t expected  = generate(writer, 8, n_prompt);

        const session plain = session::make(s);
        plain.decode(text(n_prompt));
        const bytes_t plain_state     = get_state(plain);
        const bytes_t plain_seq_state = get_seq_state(plain, 0);

        {
            const session reader = session::make(calibrated);
            check("state read", set_state(reader, state));
            check_continues(expected, generate(reader, 8, n_prompt));
        }
        {
            const session reader = session::make(calibrated);
            check("sequence read", set_seq_state(reader, seq_state, 1));
            check_sequence_continues(expected, generate(reader, 8, n_prompt, 1));
        }

        check_state_refused("state with a calibration refused without one", s, state, seq_state,
                            "this cache has none: give the same --cache-calibration");
        check_state_refused("state without a calibration refused with one", calibrated, plain_state, plain_seq_state,
                            "the state was saved without a calibration, this cache has one");
        check_state_refused("state with another calibration refused", with(s, other), state, seq_state,
                            "the state was saved with calibration ");
        if (!llama_model_is_hybrid(model) && s.flash_attn != LLAMA_FLASH_ATTN_TYPE_DISABLED) {
            check_other_layout_refused(writer, calibrated);
        }
    }
}
