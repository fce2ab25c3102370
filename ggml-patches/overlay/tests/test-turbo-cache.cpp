// The life of a turbo KV cache, seen through the logits: rotation, context shift, sequences, state, sliding windows.
//
//   test-turbo-cache MODEL SCENARIO TYPE_K TYPE_V [-t THREADS] [-v]
//
// Every check prints the measured value and its bound. Where the maths says "the same", the bound is 0 (bit-identical) or
// float error. Where quantization is in play, it is bounded from both sides: an error that is too small means that
// something else than the type under test was cached.
//
// LLAMA_TURBO_ROTATE_F32=1 makes an f32 cache take the path of a turbo cache, so that errors of the rotation show without
// quantization error; see src/llama-turbo.h.

#include "../src/llama-turbo.h"
#include "llama-cpp.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

using logits_t = std::vector<float>;

static int         n_failed = 0;
static std::string log_text;  // of llama, since the last session was made
static bool        verbose = false;

//
// checks
//

static void report(bool ok, const char * what, const std::string & measured) {
    printf("%-4s %-64s %s\n", ok ? "ok" : "FAIL", what, measured.c_str());
    n_failed += !ok;
}

static std::string format(const char * fmt, double a, double b = 0.0, double c = 0.0) {
    char buf[128];
    snprintf(buf, sizeof(buf), fmt, a, b, c);
    return buf;
}

static void check(const char * what, bool ok) {
    report(ok, what, ok ? "yes" : "no");
}

static void check_at_most(const char * what, double value, double bound) {
    report(value <= bound, what, format("nmse %.3e <= %.3e", value, bound));
}

static void check_at_least(const char * what, double value, double bound) {
    report(value >= bound, what, format("nmse %.3e >= %.3e", value, bound));
}

static void check_between(const char * what, double value, double lower, double upper) {
    report(value >= lower && value <= upper, what, format("nmse %.3e in [%.3e, %.3e]", value, lower, upper));
}

// Normalized mean squared error, infinity for logits that aren't finite.
static double nmse(const logits_t & expected, const logits_t & got) {
    if (expected.size() != got.size() || expected.empty()) {
        return std::numeric_limits<double>::infinity();
    }
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double diff = (double) expected[i] - got[i];
        err += diff * diff;
        sum += (double) expected[i] * expected[i];
    }
    return std::isfinite(err) && sum > 0.0 ? err / sum : std::numeric_limits<double>::infinity();
}

static void check_same(const char * what, const logits_t & expected, const logits_t & got) {
    const bool same = !expected.empty() && expected.size() == got.size() &&
                      memcmp(expected.data(), got.data(), expected.size() * sizeof(float)) == 0;
    report(same, what, same ? "bit-identical" : format("nmse %.3e, must be bit-identical", nmse(expected, got)));
}

// Float error only: measured 1e-13 to 4e-13, and 3e-9 where the model rounds to f16 elsewhere (GELU).
constexpr double NMSE_FLOAT   = 3e-8;
// As above with one side of the cache in f16, or flash attention, which reads f32 as f16: measured up to 2e-6.
constexpr double NMSE_HALF    = 1e-5;
// The same values in another batch: float error may move some across a decision level of the quantizer.
constexpr double NMSE_BATCH   = 1e-3;
// What a mistake in the rotation or in the positions gives at least: measured .1 to 1.4.
constexpr double NMSE_MISTAKE = 3e-2;

// Error of the logits when only K or only V is of a type: the range over the models of tests/native, as measured.
struct type_error {
    double k_min, k_max;
    double v_min, v_max;
};

static type_error measured_error(ggml_type type) {
    switch (type) {
        case GGML_TYPE_TURBO2_0:
            return { 0.107, 0.440, 0.115, 0.213 };
        case GGML_TYPE_TURBO3_0:
            return { 0.029, 0.124, 0.030, 0.060 };
        case GGML_TYPE_TURBO4_0:
            return { 0.0068, 0.033, 0.0071, 0.0145 };
        case GGML_TYPE_Q4_0:
            return { 0.007, 0.075, 0.007, 0.045 };  // not rotated in heads of 96
        case GGML_TYPE_Q5_0:
            return { 0.001, 0.012, 0.001, 0.012 };
        default:
            return { 0.0, 0.001, 0.0, 0.001 };
    }
}

// Measured errors may be off by so much on another machine, or with a better encoder.
constexpr double ERROR_HEADROOM = 1.6;

//
// sessions: a context and its logits
//

struct setup {
    ggml_type type_k;
    ggml_type type_v;

    bool rotate_f32 = false;  // f32 takes the path of turbo
    bool rotate_off = false;  // upstream's switch

    uint32_t n_ctx    = 256;  // per sequence, if not unified
    uint32_t n_seq    = 1;
    bool     unified  = false;
    bool     swa_full = true;

    llama_flash_attn_type flash_attn = LLAMA_FLASH_ATTN_TYPE_AUTO;
};

static llama_model * model     = nullptr;
static int32_t       n_threads = 1;

// The reference. Without flash attention, which makes an f16 copy of an f32 cache.
static setup f32_setup() {
    setup s{ GGML_TYPE_F32, GGML_TYPE_F32 };
    s.flash_attn = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return s;
}

static setup rotated(setup s) {
    s.rotate_f32 = true;
    return s;
}

static void set_env(const char * name, bool value) {
#ifdef _WIN32
    _putenv_s(name, value ? "1" : "0");
#else
    setenv(name, value ? "1" : "0", /*overwrite =*/1);
#endif
}

// One token of a batch.
struct input {
    llama_token  token;
    llama_pos    pos;
    llama_seq_id seq;
};

// Sessions are used one after the other: the environment belongs to the last one made.
struct session {
    llama_context_ptr ctx;

    explicit session(const setup & s) {
        set_env("LLAMA_TURBO_ROTATE_F32", s.rotate_f32);
        set_env("LLAMA_ATTN_ROT_DISABLE", s.rotate_off);

        llama_context_params params = llama_context_default_params();
        params.n_ctx                = s.unified ? s.n_ctx : s.n_ctx * s.n_seq;
        params.n_batch              = 512;
        params.n_ubatch             = 64;  // so that a prompt takes several graphs
        params.n_seq_max            = s.n_seq;
        params.n_threads            = n_threads;
        params.n_threads_batch      = n_threads;
        params.type_k               = s.type_k;
        params.type_v               = s.type_v;
        params.flash_attn_type      = s.flash_attn;
        params.kv_unified           = s.unified;
        params.swa_full             = s.swa_full;

        log_text.clear();
        ctx.reset(llama_init_from_model(model, params));
    }

    // Makes the session or ends the program: for sessions that must work.
    static session make(const setup & s) {
        session res(s);
        if (!res.ctx) {
            printf("FAIL can't make a context with K %s, V %s:\n%s", ggml_type_name(s.type_k), ggml_type_name(s.type_v),
                   log_text.c_str());
            exit(1);
        }
        return res;
    }

    llama_memory_t memory() const { return llama_get_memory(ctx.get()); }

    // Logits of all inputs.
    logits_t decode(const std::vector<input> & inputs) const {
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

        llama_batch batch = llama_batch_init(inputs.size(), 0, 1);
        for (const input & in : inputs) {
            const int32_t i    = batch.n_tokens++;
            batch.token[i]     = in.token;
            batch.pos[i]       = in.pos;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = in.seq;
            batch.logits[i]    = 1;
        }

        logits_t      res;
        const int32_t status = llama_decode(ctx.get(), batch);
        for (int32_t i = 0; status == 0 && i < batch.n_tokens; ++i) {
            const float * logits = llama_get_logits_ith(ctx.get(), i);
            res.insert(res.end(), logits, logits + n_vocab);
        }
        llama_batch_free(batch);

        if (status != 0) {
            printf("FAIL llama_decode returned %d:\n%s", status, log_text.c_str());
            exit(1);
        }
        return res;
    }
};

// n tokens of a fixed pseudo-random text, at positions from pos0 on.
static std::vector<input> text(int n, llama_pos pos0 = 0, llama_seq_id seq = 0, uint32_t seed = 0) {
    const uint32_t n_plain = llama_vocab_n_tokens(llama_model_get_vocab(model)) - 3;  // without <unk>, <s>, </s>

    std::vector<input> res;
    for (int i = 0; i < n; ++i) {
        uint32_t hash = (seed + 1) * 2654435761u ^ (uint32_t) (pos0 + i) * 2246822519u;
        hash          = (hash ^ hash >> 15) * 3266489917u;
        res.push_back({ (llama_token) (3 + (hash >> 8) % n_plain), pos0 + i, seq });
    }
    return res;
}

static void append(logits_t & all, const logits_t & more) {
    all.insert(all.end(), more.begin(), more.end());
}

// Continues one token at a time, as in generation.
static logits_t generate(const session & s, int n, llama_pos pos0, llama_seq_id seq = 0, uint32_t seed = 0) {
    logits_t res;
    for (const input & in : text(n, pos0, seq, seed)) {
        append(res, s.decode({ in }));
    }
    return res;
}

static logits_t prompt_and_generate(const session & s) {
    logits_t res = s.decode(text(96));
    append(res, generate(s, 16, 96));
    return res;
}

// Error of the turbo pair against f32 within what its types explain.
static void check_quantized(const char * what, const setup & turbo, double value) {
    const type_error k = measured_error(turbo.type_k);
    const type_error v = measured_error(turbo.type_v);

    check_between(what, value, std::max(k.k_min, v.v_min) / ERROR_HEADROOM, (k.k_max + v.v_max) * ERROR_HEADROOM);
}

//
// rotation
//

static bool log_has(const std::string & part) {
    return log_text.find(part) != std::string::npos;
}

// The context says what it caches, and that it rotates it.
static void check_log(const setup & turbo) {
    session::make(turbo);  // for its log

    check("log names K's type", log_has(std::string("K (") + ggml_type_name(turbo.type_k) + ")"));
    check("log names V's type", log_has(std::string("V (") + ggml_type_name(turbo.type_v) + ")"));
    if (ggml_is_turbo(turbo.type_k)) {
        check("log says that K is rotated", log_has("attn_rot_k = 1") && !log_has("attn_rot_k = 0"));
    }
    if (ggml_is_turbo(turbo.type_v)) {
        check("log says that V is rotated", log_has("attn_rot_v = 1") && !log_has("attn_rot_v = 0"));
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

    std::vector<uint8_t> state(llama_state_get_size(writer.ctx.get()));
    llama_state_get_data(writer.ctx.get(), state.data(), state.size());
    const logits_t expected = generate(writer, 8, 96);

    const session reader = session::make(rotated(plain));
    llama_state_set_data(reader.ctx.get(), state.data(), state.size());
    return nmse(expected, generate(reader, 8, 96));
}

// The matrices of groups that upstream lacks, against the butterfly. The CPU knows from a hint what they are and never reads them; other
// backends do.
static void check_matrices() {
    for (int n_embd_head : { 96, 160, 176 }) {
        bool                                            rot_k = false;
        bool                                            rot_v = false;
        std::unordered_map<int64_t, std::vector<float>> hadamard;
        llama_turbo_init_rotation(GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO4_0, n_embd_head, n_embd_head, rot_k, rot_v,
                                  hadamard);

        const int64_t              n   = llama_turbo_rotation_group(n_embd_head);
        const std::vector<float> & mat = hadamard[n];

        double error = rot_k && rot_v && (int64_t) mat.size() == n * n ? 0.0 : INFINITY;
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
    check("log says that f32 is rotated", log_has("attn_rot_k = 1") && log_has("attn_rot_v = 1"));
    check_at_most("K and V rotated, no quantization", nmse(expected, prompt_and_generate(identity)), NMSE_FLOAT);

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
    check_at_least("quantized without rotation is worse", error_no_rotation, 1.2 * error);

    check_flash_attn_off(turbo);
}

//
// shift
//

constexpr int SHIFT_PROMPT = 80;
constexpr int SHIFT_KEEP   = 8;
constexpr int SHIFT_GAP    = 24;

static logits_t continue_after_shift(const session & s, llama_pos pos0, uint32_t seed) {
    logits_t res = s.decode(text(12, pos0, 0, seed));
    append(res, generate(s, 4, pos0 + 12, 0, seed));
    return res;
}

// Removes a range of tokens and moves the later ones into the gap, n_shifts times, going on with new text each time.
static logits_t shift_and_continue(const session & s, int n_shifts) {
    s.decode(text(SHIFT_PROMPT));

    logits_t  res;
    llama_pos n_past = SHIFT_PROMPT;
    for (int i = 0; i < n_shifts; ++i) {
        llama_memory_seq_rm(s.memory(), 0, SHIFT_KEEP, SHIFT_KEEP + SHIFT_GAP);
        llama_memory_seq_add(s.memory(), 0, SHIFT_KEEP + SHIFT_GAP, -1, -SHIFT_GAP);
        n_past -= SHIFT_GAP;
        append(res, continue_after_shift(s, n_past, 100 + i));
        n_past += 16;
    }
    return res;
}

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

        check_at_most(n_shifts == 1 ? "one shift, K and V rotated, no quantization" :
                                      "two shifts, K and V rotated, no quantization",
                      nmse(expected, shift_and_continue(session::make(rotated(f32)), n_shifts)), NMSE_FLOAT);
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
    check_same("a copied sequence continues as the original", first, generate(one, 8, 48, 1));

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

    for (int seq = 0; seq < n_seq; ++seq) {
        check_at_most("three sequences in one batch as each alone", nmse(alone[seq], together[seq]), NMSE_BATCH);
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

using bytes_t = std::vector<uint8_t>;

static bytes_t get_state(const session & s) {
    bytes_t res(llama_state_get_size(s.ctx.get()));
    res.resize(llama_state_get_data(s.ctx.get(), res.data(), res.size()));
    return res;
}

static bytes_t get_seq_state(const session & s, llama_seq_id seq) {
    bytes_t res(llama_state_seq_get_size(s.ctx.get(), seq));
    res.resize(llama_state_seq_get_data(s.ctx.get(), res.data(), res.size(), seq));
    return res;
}

// A whole state is written from the first cell on, and the next token may take a cell that has left the window: then the
// order of the sums differs from the first time, for every cache type.
static void check_continues(const logits_t & expected, const logits_t & got) {
    if (llama_model_n_swa(model) > 0) {
        check_at_most("... continues, sliding window", nmse(expected, got), NMSE_BATCH);
    } else {
        check_same("... continues", expected, got);
    }
}

// A state that doesn't fit must be refused, and leave a context that works.
static void check_refused(const char * what, const setup & s, const bytes_t & state, const bytes_t & seq_state) {
    const session  other    = session::make(s);
    const logits_t expected = other.decode(text(24));
    llama_memory_clear(other.memory(), true);

    const bool refused = llama_state_set_data(other.ctx.get(), state.data(), state.size()) == 0 &&
                         llama_state_seq_set_data(other.ctx.get(), seq_state.data(), seq_state.size(), 0) == 0;
    check(what, refused);

    llama_memory_clear(other.memory(), true);
    check_same("... and the context works on", expected, other.decode(text(24)));
}

static void test_state(const setup & turbo, const std::string & path) {
    constexpr int n_prompt = 48;

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
        check("state read", llama_state_set_data(s.ctx.get(), state.data(), state.size()) == state.size());
        check_continues(expected, generate(s, 8, n_prompt));
    }
    for (llama_seq_id seq : { 0, 1 }) {
        const session s = session::make(two);
        s.decode(text(16, 0, 1 - seq, 7));  // the other sequence is in use
        check("sequence read",
              llama_state_seq_set_data(s.ctx.get(), seq_state.data(), seq_state.size(), seq) == seq_state.size());
        check_same("... continues", expected, generate(s, 8, n_prompt, seq));
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
        check_same("... continues", expected, generate(s, 8, n_prompt, 1));
    }
    remove(path.c_str());
    remove(path_seq.c_str());

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
    check_at_most("K and V rotated, no quantization", nmse(expected, run(rotated(f32_setup()))), NMSE_FLOAT);
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

static bool type_from_name(const char * name, ggml_type & type) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && strcmp(name, other) == 0) {
            type = (ggml_type) i;
            return true;
        }
    }
    return false;
}

static int usage(const char * reason) {
    fprintf(stderr, "%s\n\nusage: test-turbo-cache MODEL SCENARIO TYPE_K TYPE_V [-t THREADS] [-v]\n\n", reason);
    fprintf(stderr, "  SCENARIO  rotation, shift, sequences, state or swa\n");
    fprintf(stderr, "  TYPE_K/V  cache types, at least one of them turbo2, turbo3 or turbo4\n");
    fprintf(stderr, "  -v        llama's log on stderr\n");
    return 2;
}

static void on_log(ggml_log_level level, const char * line, void * user_data) {
    GGML_UNUSED(user_data);

    static bool is_debug = false;
    is_debug             = level == GGML_LOG_LEVEL_DEBUG || (level == GGML_LOG_LEVEL_CONT && is_debug);

    if (!is_debug) {
        log_text += line;
    }
    if (verbose) {
        fputs(line, stderr);
    }
}

int main(int argc, char ** argv) {
    setup turbo{ GGML_TYPE_COUNT, GGML_TYPE_COUNT };

    if (argc < 5) {
        return usage("missing arguments");
    }
    if (!type_from_name(argv[3], turbo.type_k) || !type_from_name(argv[4], turbo.type_v)) {
        return usage("unknown cache type");
    }
    if (!ggml_is_turbo(turbo.type_k) && !ggml_is_turbo(turbo.type_v)) {
        return usage("neither type is a turbo type");
    }
    for (int i = 5; i < argc; ++i) {
        if (strcmp(argv[i], "-v") == 0) {
            verbose = true;
        } else if (strcmp(argv[i], "-t") == 0 && i + 1 < argc && atoi(argv[i + 1]) > 0) {
            n_threads = atoi(argv[++i]);
        } else {
            return usage("unknown option");
        }
    }
    const std::string scenario    = argv[2];
    const std::string scenarios[] = { "rotation", "shift", "sequences", "state", "swa" };
    if (std::find(std::begin(scenarios), std::end(scenarios), scenario) == std::end(scenarios)) {
        return usage("unknown scenario");
    }

    llama_log_set(on_log, nullptr);
    llama_backend_init();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;

    llama_model_ptr loaded{ llama_model_load_from_file(argv[1], params) };
    model = loaded.get();
    if (!model) {
        printf("FAIL can't load %s:\n%s", argv[1], log_text.c_str());
        return 1;
    }

    check_log(turbo);
    if (scenario == "rotation") {
        test_rotation(turbo);
    } else if (scenario == "shift") {
        test_shift(turbo);
    } else if (scenario == "sequences") {
        test_sequences(turbo);
    } else if (scenario == "state") {
        test_state(turbo, std::string("test-turbo-cache-") + argv[3] + "-" + argv[4] + ".state");
    } else {
        test_swa(turbo);
    }

    printf("%s\n", n_failed == 0 ? "all checks passed" : "some checks FAILED");
    return n_failed == 0 ? 0 : 1;
}
