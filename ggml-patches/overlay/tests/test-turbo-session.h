#pragma once

// What the tests of turbo caches share: contexts and their logits, texts, and main().
//
//   PROGRAM MODEL SCENARIO TYPE_K TYPE_V [-ctkl MAP] [-ctvl MAP] [-t THREADS] [-v]

#include "llama-cpp.h"
#include "llama.h"
#include "test-turbo-checks.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

//
// sessions: a context and its logits
//

constexpr uint32_t N_UBATCH = 64;  // so that a prompt takes several graphs

struct setup {
    ggml_type type_k;
    ggml_type type_v;

    std::string layers_k   = "";  // types by layer, see src/turbo/layers.h
    std::string layers_v   = "";
    std::string layer_mode = "";  // ready-made ones
    std::string decay      = "";

    // What is measured is the type: without the defaults, see src/turbo/settings.h. Empty: the defaults.
    std::string calibration = "none";  // or a file

    std::string sink = "0";            // exact tokens, see src/turbo/exact.h
    std::string tail = "0";

    bool rotate_f32 = false;  // f32 takes the path of turbo
    bool rotate_off = false;  // upstream's switch

    uint32_t n_ubatch  = N_UBATCH;
    uint32_t n_ctx     = 256;  // per sequence, if not unified
    uint32_t n_seq     = 1;
    bool     unified   = false;
    bool     swa_full  = true;
    bool     on_device = true;  // the cache is where the layers are

    llama_flash_attn_type flash_attn = LLAMA_FLASH_ATTN_TYPE_AUTO;

    llama_context * other = nullptr;  // of a draft
};

inline llama_model * model = nullptr;
inline std::string   model_path;
inline int32_t       n_threads = 1;

// The reference. Without flash attention, which makes an f16 copy of an f32 cache.
inline setup f32_setup() {
    setup s{ GGML_TYPE_F32, GGML_TYPE_F32 };
    s.flash_attn = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return s;
}

inline setup rotated(setup s) {
    s.rotate_f32 = true;
    return s;
}

// Whether the GELU rounds to f16, as it does on the CPU. A value near the border of two may round the other way, which changes few tokens.
inline bool has_half_gelu() {
    char arch[32] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
    return strcmp(arch, "gemma2") == 0;
}

inline double nmse_float() {
    return on_gpu ? NMSE_HALF : has_half_gelu() ? NMSE_FLOAT_GELU : NMSE_FLOAT;
}

// Logits of many tokens, equal but for float error. With such a GELU it is the median token that keeps to the bound of other models.
inline void check_float(const std::string & what, const logits_t & expected, const logits_t & got) {
    if (has_half_gelu() && !on_gpu) {
        const size_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        check_at_most(what + ", median token", nmse_of_median(expected, got, n_vocab), NMSE_FLOAT);
    }
    check_at_most(what, nmse(expected, got), nmse_float());
}

// An empty value takes the variable away.
inline void set_env(const char * name, const std::string & value) {
#ifdef _WIN32
    _putenv_s(name, value.c_str());
#else
    if (value.empty()) {
        unsetenv(name);
    } else {
        setenv(name, value.c_str(), /*overwrite =*/1);
    }
#endif
}

// One token of a batch.
struct input {
    llama_token  token;
    llama_pos    pos;
    llama_seq_id seq;
};

// The environment is that of the last session made, which matters to what is read later than that.
struct session {
    llama_context_ptr ctx;

    explicit session(const setup & s) {
        set_env("LLAMA_TURBO_ROTATE_F32", s.rotate_f32 ? "1" : "");
        set_env("LLAMA_ATTN_ROT_DISABLE", s.rotate_off ? "1" : "");
        set_env("TURBO_CACHE_TYPE_K_LAYERS", s.layers_k);
        set_env("TURBO_CACHE_TYPE_V_LAYERS", s.layers_v);
        set_env("TURBO_CACHE_LAYER_ADAPTIVE", s.layer_mode);
        set_env("TURBO_CACHE_DECAY", s.decay);
        set_env("TURBO_CACHE_CALIBRATION", s.calibration);
        set_env("TURBO_CACHE_SINK", s.sink);
        set_env("TURBO_CACHE_TAIL", s.tail);

        llama_context_params params = llama_context_default_params();
        params.n_ctx                = s.unified ? s.n_ctx : s.n_ctx * s.n_seq;
        params.n_batch              = 1024;
        params.n_ubatch             = s.n_ubatch;
        params.n_seq_max            = s.n_seq;
        params.n_threads            = n_threads;
        params.n_threads_batch      = n_threads;
        params.type_k               = s.type_k;
        params.type_v               = s.type_v;
        params.flash_attn_type      = s.flash_attn;
        params.kv_unified           = s.unified;
        params.swa_full             = s.swa_full;
        params.offload_kqv          = s.on_device;
        params.ctx_other            = s.other;

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

// A session that must not come to be, with the reason in the log.
inline void check_no_session(const std::string & what, const setup & s, const std::string & reason) {
    const session none(s);
    report(!none.ctx && log_has(reason), what, none.ctx ? "accepted" : log_has(reason) ? "refused" : log_text);
}

// n tokens of a fixed pseudo-random text, at positions from pos0 on.
inline std::vector<input> text(int n, llama_pos pos0 = 0, llama_seq_id seq = 0, uint32_t seed = 0) {
    const uint32_t n_plain = llama_vocab_n_tokens(llama_model_get_vocab(model)) - 3;  // without <unk>, <s>, </s>

    std::vector<input> res;
    for (int i = 0; i < n; ++i) {
        uint32_t hash = (seed + 1) * 2654435761u ^ (uint32_t) (pos0 + i) * 2246822519u;
        hash          = (hash ^ hash >> 15) * 3266489917u;
        res.push_back({ (llama_token) (3 + (hash >> 8) % n_plain), pos0 + i, seq });
    }
    return res;
}

inline void append(logits_t & all, const logits_t & more) {
    all.insert(all.end(), more.begin(), more.end());
}

// Continues one token at a time, as in generation.
inline logits_t generate(const session & s, int n, llama_pos pos0, llama_seq_id seq = 0, uint32_t seed = 0) {
    logits_t res;
    for (const input & in : text(n, pos0, seq, seed)) {
        append(res, s.decode({ in }));
    }
    return res;
}

inline logits_t prompt_and_generate(const session & s) {
    logits_t res = s.decode(text(96));
    append(res, generate(s, 16, 96));
    return res;
}

//
// context shift
//

constexpr int SHIFT_PROMPT = 80;
constexpr int SHIFT_KEEP   = 8;
constexpr int SHIFT_GAP    = 24;

inline logits_t continue_after_shift(const session & s, llama_pos pos0, uint32_t seed) {
    logits_t res = s.decode(text(12, pos0, 0, seed));
    append(res, generate(s, 4, pos0 + 12, 0, seed));
    return res;
}

// Removes a range of tokens and moves the later ones into the gap.
inline void shift(const session & s, int n_keep, int n_gap) {
    llama_memory_seq_rm(s.memory(), 0, n_keep, n_keep + n_gap);
    llama_memory_seq_add(s.memory(), 0, n_keep + n_gap, -1, -n_gap);
}

// Shifts n_shifts times, going on with new text each time.
inline logits_t shift_and_continue(const session & s, int n_shifts) {
    s.decode(text(SHIFT_PROMPT));

    logits_t  res;
    llama_pos n_past = SHIFT_PROMPT;
    for (int i = 0; i < n_shifts; ++i) {
        shift(s, SHIFT_KEEP, SHIFT_GAP);
        n_past -= SHIFT_GAP;
        append(res, continue_after_shift(s, n_past, 100 + i));
        n_past += 16;
    }
    return res;
}

//
// state
//

inline bytes_t get_state(const session & s) {
    bytes_t res(llama_state_get_size(s.ctx.get()));
    res.resize(llama_state_get_data(s.ctx.get(), res.data(), res.size()));
    return res;
}

inline bytes_t get_seq_state(const session & s, llama_seq_id seq) {
    bytes_t res(llama_state_seq_get_size(s.ctx.get(), seq));
    res.resize(llama_state_seq_get_data(s.ctx.get(), res.data(), res.size(), seq));
    return res;
}

inline bool set_state(const session & s, const bytes_t & state) {
    return llama_state_set_data(s.ctx.get(), state.data(), state.size()) == state.size();
}

inline bool set_seq_state(const session & s, const bytes_t & state, llama_seq_id seq) {
    return llama_state_seq_set_data(s.ctx.get(), state.data(), state.size(), seq) == state.size();
}

// A whole state is written from the first cell on, and the next token may take a cell that has left the window: then the
// order of the sums differs from the first time, for every cache type.
inline void check_continues(const logits_t & expected, const logits_t & got) {
    if (llama_model_n_swa(model) > 0) {
        check_at_most("... continues, sliding window", nmse(expected, got), NMSE_BATCH);
    } else {
        check_same("... continues", expected, got);
    }
}

// A sequence is written without the cells between its own. GPUs sum by tiles of cells, so that a window that has left some changes the order.
inline void check_sequence_continues(const logits_t & expected, const logits_t & got) {
    if (on_gpu && llama_model_n_swa(model) > 0) {
        check_at_most("... continues, sliding window on a GPU", nmse(expected, got), NMSE_FLOAT);
    } else {
        check_same("... continues", expected, got);
    }
}

// A state that doesn't fit must be refused, and leave a context that works.
inline void check_refused(const std::string & what, const setup & s, const bytes_t & state, const bytes_t & seq_state) {
    const session  other    = session::make(s);
    const logits_t expected = other.decode(text(24));
    llama_memory_clear(other.memory(), true);

    check(what, !set_state(other, state) && !set_seq_state(other, seq_state, 0));

    llama_memory_clear(other.memory(), true);
    check_same("... and the context works on", expected, other.decode(text(24)));
}

//
// main
//

inline bool type_from_name(const char * name, ggml_type & type) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && strcmp(name, other) == 0) {
            type = (ggml_type) i;
            return true;
        }
    }
    return false;
}

inline void on_log(ggml_log_level level, const char * line, void * user_data) {
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

struct scenario {
    const char * name;
    void (*run)(const setup & types);
};

struct test_program {
    const char *          name;
    std::vector<scenario> scenarios;
    bool                  needs_turbo;  // one of the two types must be ours

    int usage(const char * reason) const {
        fprintf(stderr,
                "%s\n\nusage: %s MODEL SCENARIO TYPE_K TYPE_V [-ctkl MAP] [-ctvl MAP] [-t THREADS] [-ngl N] [-v]\n\n",
                reason, name);
        fprintf(stderr, "  SCENARIO  one of:");
        for (const scenario & s : scenarios) {
            fprintf(stderr, " %s", s.name);
        }
        fprintf(stderr, "\n  TYPE_K/V  cache types%s\n",
                needs_turbo ? ", at least one of them turbo2, turbo3 or turbo4" : "");
        fprintf(stderr, "  -ctkl/vl  types of K and V by layer, as --cache-type-k-layers takes them\n");
        fprintf(stderr, "  -ngl N    layers on a GPU\n");
        fprintf(stderr, "  -v        llama's log on stderr\n");
        return 2;
    }

    int main(int argc, char ** argv) const {
        setup              types{ GGML_TYPE_COUNT, GGML_TYPE_COUNT };
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers       = 0;

        if (argc < 5) {
            return usage("missing arguments");
        }
        if (!type_from_name(argv[3], types.type_k) || !type_from_name(argv[4], types.type_v)) {
            return usage("unknown cache type");
        }
        if (needs_turbo && !ggml_is_turbo(types.type_k) && !ggml_is_turbo(types.type_v)) {
            return usage("neither type is a turbo type");
        }
        for (int i = 5; i < argc; ++i) {
            const bool has_value = i + 1 < argc;
            if (strcmp(argv[i], "-v") == 0) {
                verbose = true;
            } else if (strcmp(argv[i], "-t") == 0 && has_value && atoi(argv[i + 1]) > 0) {
                n_threads = atoi(argv[++i]);
            } else if (strcmp(argv[i], "-ngl") == 0 && has_value && atoi(argv[i + 1]) > 0) {
                params.n_gpu_layers = atoi(argv[++i]);
                on_gpu              = true;
            } else if (strcmp(argv[i], "-ctkl") == 0 && has_value) {
                types.layers_k = argv[++i];
            } else if (strcmp(argv[i], "-ctvl") == 0 && has_value) {
                types.layers_v = argv[++i];
            } else {
                return usage("unknown option");
            }
        }
        const auto it = std::find_if(scenarios.begin(), scenarios.end(),
                                     [&](const scenario & s) { return strcmp(s.name, argv[2]) == 0; });
        if (it == scenarios.end()) {
            return usage("unknown scenario");
        }

        llama_log_set(on_log, nullptr);
        ggml_backend_load_all();
        llama_backend_init();

        model_path = argv[1];
        llama_model_ptr loaded{ llama_model_load_from_file(argv[1], params) };
        model = loaded.get();
        if (!model) {
            printf("FAIL can't load %s:\n%s", argv[1], log_text.c_str());
            return 1;
        }

        it->run(types);

        printf("%s\n", n_failed == 0 ? "all checks passed" : "some checks FAILED");
        return n_failed == 0 ? 0 : 1;
    }
};
