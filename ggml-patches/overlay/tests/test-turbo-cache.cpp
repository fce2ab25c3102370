// The life of a turbo KV cache, seen through the logits: rotation, context shift, sequences, state, sliding windows.
//
//   test-turbo-cache MODEL SCENARIO TYPE_K TYPE_V [-ctkl MAP] [-ctvl MAP] [-t THREADS] [-v]
//
// LLAMA_TURBO_ROTATE_F32=1 makes an f32 cache take the path of a turbo cache, so that errors of the rotation show without
// quantization error; see src/turbo/rotation.h.

#include "../src/turbo/layers.h"
#include "../src/turbo/rotation.h"
#include "test-turbo-state.h"

// What the types of the cache explain: those of a map, and the one of the layers that it leaves out.
static type_error expected_error(ggml_type type, const std::string & map) {
    type_error res = measured_error(type);
    if (map.empty()) {
        return res;
    }
    const uint32_t n_layer = llama_model_n_layer(model);
    for (ggml_type other : llama_turbo_parse_layers(map, n_layer, type, "map", /*clip =*/false)) {
        const type_error more = measured_error(other);

        res.k_min = std::min(res.k_min, more.k_min);
        res.k_max = std::max(res.k_max, more.k_max);
        res.v_min = std::min(res.v_min, more.v_min);
        res.v_max = std::max(res.v_max, more.v_max);
    }
    return res;
}

static bool has_trellis(const setup & s) {
    return ggml_turbo_is_trellis(s.type_k) || ggml_turbo_is_trellis(s.type_v);
}

// Error of the turbo pair against f32 within what its types explain.
static void check_quantized(const char * what, const setup & turbo, double value) {
    const type_error k = expected_error(turbo.type_k, turbo.layers_k);
    const type_error v = expected_error(turbo.type_v, turbo.layers_v);

    check_between(what, value, std::max(k.k_min, v.v_min) / ERROR_HEADROOM, (k.k_max + v.v_max) * ERROR_HEADROOM);
}

//
// rotation
//

// The context says what it caches, and that it rotates it.
static void check_log(const setup & turbo) {
    session::make(turbo);  // for its log

    check("log names K's type", log_has(std::string("K (") + ggml_type_name(turbo.type_k) + ")"));
    check("log names V's type", log_has(std::string("V (") + ggml_type_name(turbo.type_v) + ")"));
    if (ggml_is_turbo(turbo.type_k)) {
        check("log says that K is rotated", is_rotated('k'));
    }
    if (ggml_is_turbo(turbo.type_v)) {
        check("log says that V is rotated", is_rotated('v'));
    }
    check("flash attention was switched on by itself", log_has("enabling flash_attn"));
}

static void check_flash_attn_off(setup s) {
    s.flash_attn = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    const session off(s);
    check("flash attention off is refused", !off.ctx);
    check("... with the reason", log_has("needs flash attention"));
}

// An f32 cache that was written without rotation and is read with it: what a rotation that is missing on one side gives.
static double unrotated_cache_error(const setup & plain) {
    const session writer = session::make(plain);
    writer.decode(text(96));

    saved_state    saved    = read_state(writer);
    const logits_t expected = generate(writer, 8, 96);

    const session reader = session::make(rotated(plain));
    if (STATES_HAVE_ROT_SIZES) {
        check("state without rotation refused with it", !set_state(reader, saved.bytes));
        llama_memory_clear(reader.memory(), true);

        reader.decode(text(96));
        const saved_state with_rotation = read_state(reader);
        for (size_t i = 0; i < saved.caches.size(); ++i) {
            memcpy(&saved.bytes[saved.caches[i][0].sizes_at], &with_rotation.bytes[with_rotation.caches[i][0].sizes_at],
                   2 * sizeof(uint32_t));
        }
    }
    check("state without rotation read", set_state(reader, saved.bytes));
    return nmse(expected, generate(reader, 8, 96));
}

// The matrices of groups that upstream lacks, against the butterfly. The CPU knows from a hint what they are and never reads them; other
// backends do.
static void check_matrices() {
    for (int n_embd_head : { 96, 160, 176 }) {
        uint32_t                                        rot_k = 0;
        uint32_t                                        rot_v = 0;
        std::unordered_map<int64_t, std::vector<float>> hadamard;
        llama_turbo_init_rotation(GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO4_0, n_embd_head, n_embd_head, rot_k, rot_v,
                                  hadamard);

        const int64_t              n   = llama_turbo_rotation_group(n_embd_head);
        const std::vector<float> & mat = hadamard[n];

        double error = rot_k == n && rot_v == n && (int64_t) mat.size() == n * n ? 0.0 : INFINITY;
        for (int64_t row = 0; row < n && std::isfinite(error); ++row) {
            std::vector<double> expected(n, 0.0);  // column of the identity, transformed
            expected[row] = 1.0 / std::sqrt((double) n);
            for (int64_t len = 1; len < n; len *= 2) {
                for (int64_t i = 0; i < n; ++i) {
                    if ((i & len) == 0) {
                        const double a    = expected[i];
                        const double b    = expected[i + len];
                        expected[i]       = a + b;
                        expected[i + len] = a - b;
                    }
                }
            }
            for (int64_t col = 0; col < n; ++col) {
                error = std::max(error, std::fabs(expected[col] - mat[row * n + col]));
            }
        }
        report(error <= 1e-7, "rotation matrix of an adaptive group", format("error %.1e", error));
    }
}

static void test_rotation(const setup & turbo) {
    check_matrices();

    const setup f32 = f32_setup();

    setup k_only  = f32_setup();
    k_only.type_v = GGML_TYPE_F16;

    setup v_only  = f32_setup();
    v_only.type_k = GGML_TYPE_F16;

    const logits_t expected = prompt_and_generate(session::make(f32));

    const session identity = session::make(rotated(f32));
    check("log says that f32 is rotated", is_rotated('k') && is_rotated('v'));
    check_float("K and V rotated, no quantization", expected, prompt_and_generate(identity));

    setup flash      = f32_setup();
    flash.flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    const std::pair<const char *, setup> halves[] = {
        { "K and V rotated, flash attention", flash  },
        { "K rotated, V f16",                 k_only },
        { "V rotated, K f16",                 v_only },
    };
    for (const auto & [what, plain] : halves) {
        const logits_t expected_plain = prompt_and_generate(session::make(plain));
        check_at_most(what, nmse(expected_plain, prompt_and_generate(session::make(rotated(plain)))), NMSE_HALF);
    }

    check_at_least("control: unrotated K and V in a rotated cache", unrotated_cache_error(f32), NMSE_MISTAKE);
    check_at_least("control: unrotated K in a rotated cache", unrotated_cache_error(k_only), NMSE_MISTAKE);
    check_at_least("control: unrotated V in a rotated cache", unrotated_cache_error(v_only), NMSE_MISTAKE);

    const double error = nmse(expected, prompt_and_generate(session::make(turbo)));
    check_quantized("quantized against f32", turbo, error);

    setup no_rotation              = turbo;
    no_rotation.rotate_off         = true;
    const double error_no_rotation = nmse(expected, prompt_and_generate(session::make(no_rotation)));
    // two codebooks to choose from make up for a part of it: measured 1.15 times for turbo2t
    const double at_least          = has_trellis(turbo) ? 1.1 : 1.2;
    check_at_least("quantized without rotation is worse", error_no_rotation, at_least * error);

    check_flash_attn_off(turbo);
}

//
// shift
//

// The texts of one shift, but what is cached gets other positions: how much the logits depend on them.
static logits_t divide_and_continue(const session & s) {
    s.decode(text(SHIFT_PROMPT));
    llama_memory_seq_rm(s.memory(), 0, SHIFT_KEEP, SHIFT_KEEP + SHIFT_GAP);
    llama_memory_seq_div(s.memory(), 0, SHIFT_KEEP + SHIFT_GAP, -1, 2);

    const llama_pos n_past = llama_memory_seq_pos_max(s.memory(), 0) + 1;
    llama_memory_seq_add(s.memory(), 0, SHIFT_KEEP, -1, SHIFT_PROMPT - SHIFT_GAP - n_past);

    return continue_after_shift(s, SHIFT_PROMPT - SHIFT_GAP, 100);
}

static void test_shift(const setup & turbo) {
    const setup f32 = f32_setup();

    if (!llama_memory_can_shift(session::make(turbo).memory())) {
        check("the cache of this model can shift", false);
        return;
    }

    for (int n_shifts : { 1, 2 }) {
        const logits_t expected = shift_and_continue(session::make(f32), n_shifts);

        check_float(n_shifts == 1 ? "one shift, K and V rotated, no quantization" :
                                    "two shifts, K and V rotated, no quantization",
                    expected, shift_and_continue(session::make(rotated(f32)), n_shifts));
        check_quantized(n_shifts == 1 ? "one shift, quantized" : "two shifts, quantized", turbo,
                        nmse(expected, shift_and_continue(session::make(turbo), n_shifts)));

        if (n_shifts == 1) {
            check_at_least("control: other positions in the cache",
                           nmse(expected, divide_and_continue(session::make(f32))), NMSE_MISTAKE);
        }
    }
}

//
// sequences
//

static void test_copy_and_remove(setup s, bool unified) {
    s.n_seq   = 2;
    s.unified = unified;

    const session one = session::make(s);
    one.decode(text(48));
    llama_memory_seq_cp(one.memory(), 0, 1, -1, -1);

    const logits_t first = generate(one, 8, 48, 0);
    // in one buffer its tokens get other cells, and attention sums tiles of neighbouring cells
    check_at_most("a copied sequence continues as the original", nmse(first, generate(one, 8, 48, 1)), NMSE_BATCH);

    llama_memory_seq_rm(one.memory(), 0, 48, -1);
    check_same("... as before, once its tail is removed", first, generate(one, 8, 48, 0));

    llama_memory_seq_rm(one.memory(), 0, -1, -1);
    llama_memory_seq_rm(one.memory(), 1, 48, -1);
    check_same("... and once the original is removed", first, generate(one, 8, 48, 1));

    check_at_least("control: another text", nmse(first, generate(one, 8, 56, 1)), NMSE_MISTAKE);
}

// Three texts of different lengths: prompts in one batch, then one token of each at a time.
static void test_batch(setup s, bool unified) {
    constexpr int n_seq = 3;

    s.n_seq   = n_seq;
    s.unified = unified;

    std::vector<logits_t> alone(n_seq);
    std::vector<logits_t> together(n_seq);

    const auto n_prompt = [](int seq) {
        return 24 + 8 * seq;
    };
    const auto prompt = [&](int seq) {
        return text(n_prompt(seq), 0, seq, seq);
    };

    for (int seq = 0; seq < n_seq; ++seq) {
        const session one = session::make(s);
        alone[seq]        = one.decode(prompt(seq));
        append(alone[seq], generate(one, 4, n_prompt(seq), seq, seq));
    }

    const session all = session::make(s);

    // logits come in the order of the inputs
    const auto decode = [&](const std::vector<input> & inputs) {
        const logits_t logits  = all.decode(inputs);
        const size_t   n_vocab = logits.size() / inputs.size();
        for (size_t i = 0; i < inputs.size(); ++i) {
            append(together[inputs[i].seq], logits_t(logits.begin() + i * n_vocab, logits.begin() + (i + 1) * n_vocab));
        }
    };

    std::vector<input> inputs;
    for (int seq = 0; seq < n_seq; ++seq) {
        for (const input & in : prompt(seq)) {
            inputs.push_back(in);
        }
    }
    decode(inputs);

    for (int i = 0; i < 4; ++i) {
        inputs.clear();
        for (int seq = 0; seq < n_seq; ++seq) {
            inputs.push_back(text(1, n_prompt(seq) + i, seq, seq)[0]);
        }
        decode(inputs);
    }

    const double bound = has_trellis(s) ? NMSE_BATCH_TRELLIS : NMSE_BATCH;
    for (int seq = 0; seq < n_seq; ++seq) {
        check_at_most("three sequences in one batch as each alone", nmse(alone[seq], together[seq]), bound);
    }
    check_at_least("control: two of these texts",
                   nmse(logits_t(alone[1].begin(), alone[1].begin() + alone[0].size()), alone[0]), NMSE_MISTAKE);
}

static void test_sequences(const setup & turbo) {
    for (bool unified : { true, false }) {
        printf("     %s\n", unified ? "sequences share one buffer" : "one buffer per sequence");
        test_copy_and_remove(turbo, unified);
        test_batch(turbo, unified);
    }
}

//
// state
//

static void check_states_refused(const setup &   two,
                                 const session & writer,
                                 const bytes_t & state,
                                 const bytes_t & seq_state) {
    setup other_k  = two;
    other_k.type_k = two.type_k == GGML_TYPE_TURBO3_0 ? GGML_TYPE_TURBO4_0 : GGML_TYPE_TURBO3_0;
    check_refused("state of another K type refused", other_k, state, seq_state);

    setup other_v  = two;
    other_v.type_v = two.type_v == GGML_TYPE_TURBO3_0 ? GGML_TYPE_TURBO4_0 : GGML_TYPE_TURBO3_0;
    check_refused("state of another V type refused", other_v, state, seq_state);

    // q4_0 has the block size of turbo4
    setup upstream  = two;
    upstream.type_k = two.type_k == GGML_TYPE_Q4_0 ? GGML_TYPE_F16 : GGML_TYPE_Q4_0;
    upstream.type_v = two.type_v == GGML_TYPE_Q4_0 ? GGML_TYPE_F16 : GGML_TYPE_Q4_0;
    check_refused("state of a turbo cache refused by an upstream type", upstream, state, seq_state);

    const bytes_t half(state.begin(), state.begin() + state.size() / 2);
    const bytes_t half_seq(seq_state.begin(), seq_state.begin() + seq_state.size() / 2);
    check_refused("truncated state refused", two, half, half_seq);

    if (!llama_model_is_hybrid(model)) {
        check_other_layout_refused(writer, two);
    }
}

static void test_state(const setup & turbo) {
    constexpr int n_prompt = 48;

    const std::string types = std::string(ggml_type_name(turbo.type_k)) + "-" + ggml_type_name(turbo.type_v);
    const std::string path  = "test-turbo-cache-" + types + ".state";

    setup two = turbo;
    two.n_seq = 2;

    const session writer = session::make(two);
    writer.decode(text(n_prompt));

    const bytes_t state     = get_state(writer);
    const bytes_t seq_state = get_seq_state(writer, 0);

    std::vector<llama_token> tokens;
    for (const input & in : text(n_prompt)) {
        tokens.push_back(in.token);
    }
    const std::string path_seq = path + ".seq";
    check("state file written", llama_state_save_file(writer.ctx.get(), path.c_str(), tokens.data(), tokens.size()));
    check("sequence file written",
          llama_state_seq_save_file(writer.ctx.get(), path_seq.c_str(), 0, tokens.data(), tokens.size()) > 0);

    const logits_t expected = generate(writer, 8, n_prompt);

    {
        const session s = session::make(two);
        check("state read", set_state(s, state));
        check_continues(expected, generate(s, 8, n_prompt));
    }
    for (llama_seq_id seq : { 0, 1 }) {
        const session s = session::make(two);
        s.decode(text(16, 0, 1 - seq, 7));  // the other sequence is in use
        check("sequence read", set_seq_state(s, seq_state, seq));
        check_sequence_continues(expected, generate(s, 8, n_prompt, seq));
    }
    {
        const session            s = session::make(two);
        std::vector<llama_token> got(n_prompt);
        size_t                   n_got = 0;
        check("state file read", llama_state_load_file(s.ctx.get(), path.c_str(), got.data(), got.size(), &n_got) &&
                                     n_got == n_prompt && got == tokens);
        check_continues(expected, generate(s, 8, n_prompt));
    }
    {
        const session            s = session::make(two);
        std::vector<llama_token> got(n_prompt);
        size_t                   n_got = 0;
        check("sequence file read",
              llama_state_seq_load_file(s.ctx.get(), path_seq.c_str(), 1, got.data(), got.size(), &n_got) > 0 &&
                  got == tokens);
        check_sequence_continues(expected, generate(s, 8, n_prompt, 1));
    }
    remove(path.c_str());
    remove(path_seq.c_str());

    check_states_refused(two, writer, state, seq_state);
}

//
// sliding windows
//

static void test_swa(const setup & turbo) {
    const int n_swa = llama_model_n_swa(model);
    if (n_swa <= 0 || n_swa > 64) {
        check("the model has a sliding window of at most 64 tokens", false);
        return;
    }

    // long enough for the cache of the windowed layers to be written twice over
    const auto run = [](setup s) {
        s.n_ctx               = 768;
        s.swa_full            = false;
        const session session = session::make(s);
        logits_t      res;
        for (int i = 0; i < 600; i += 100) {
            append(res, session.decode(text(100, i)));
        }
        append(res, generate(session, 16, 600));
        return res;
    };

    const logits_t expected = run(f32_setup());
    check_float("K and V rotated, no quantization", expected, run(rotated(f32_setup())));
    check_quantized("quantized", turbo, nmse(expected, run(turbo)));

    // the whole window is kept: as without windows
    test_copy_and_remove(turbo, true);
    test_shift(turbo);

    setup small     = turbo;
    small.swa_full  = false;
    const session s = session::make(small);
    s.decode(text(100));
    const logits_t first = generate(s, 4, 100);
    check("tail removed", llama_memory_seq_rm(s.memory(), 0, 100, -1));
    check_same("... continues as before", first, generate(s, 4, 100));
}

//
// main
//

template <void (*run)(const setup &)> static void with_log(const setup & turbo) {
    check_log(turbo);
    run(turbo);
}

int main(int argc, char ** argv) {
    const test_program program{
        "test-turbo-cache",
        {
          { "rotation", with_log<test_rotation> },
          { "shift", with_log<test_shift> },
          { "sequences", with_log<test_sequences> },
          { "state", with_log<test_state> },
          { "swa", with_log<test_swa> },
          },
        /*needs_turbo =*/
        true,
    };

    return program.main(argc, argv);
}
