#include "calibrate.h"

#include "compat.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-cpp.h"
#include "llama-model.h"
#include "memory.h"
#include "model.h"
#include "moments.h"
#include "parts.h"

#include <algorithm>
#include <chrono>
#include <list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

//
// the context
//

static thread_local bool is_observing = false;

bool llama_turbo_is_observing() {
    return is_observing;
}

namespace {

struct observing_scope {
    observing_scope() { is_observing = true; }

    ~observing_scope() { is_observing = false; }
};

// Only warnings and errors of this thread are logged: what a context says of itself would be taken for the one that was asked for. Several threads
// may be at it at once; the log is that of the process, so the first one puts a filter before it, which the last one takes away.
class quiet_scope {
  public:
    quiet_scope() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (n_scopes++ == 0) {
            llama_log_get(&callback, &user_data);
            llama_log_set(filter, nullptr);
        }
        is_quiet = true;
    }

    ~quiet_scope() {
        const std::lock_guard<std::mutex> lock(mutex);
        is_quiet = false;
        if (--n_scopes > 0) {
            return;
        }
        ggml_log_callback current   = nullptr;
        void *            with_data = nullptr;
        llama_log_get(&current, &with_data);
        if (current == filter) {  // nobody has set another one since
            llama_log_set(callback, user_data);
        }
    }

  private:
    static inline std::mutex        mutex;
    static inline int               n_scopes  = 0;
    static inline ggml_log_callback callback  = nullptr;
    static inline void *            user_data = nullptr;

    static inline thread_local bool           is_quiet = false;
    static inline thread_local ggml_log_level last     = GGML_LOG_LEVEL_NONE;

    static void filter(ggml_log_level level, const char * text, void * /*user_data*/) {
        last = level == GGML_LOG_LEVEL_CONT ? last : level;
        if (!is_quiet || last == GGML_LOG_LEVEL_WARN || last == GGML_LOG_LEVEL_ERROR) {
            callback(level, text, user_data);
        }
    }
};

}  // namespace

static llama_context_params observing_params(llama_context_params params, uint32_t n_tokens) {
    params.n_ctx           = n_tokens;
    params.n_batch         = n_tokens;
    params.n_ubatch        = n_tokens;
    params.n_seq_max       = 1;
    params.n_rs_seq        = 0;
    params.type_k          = GGML_TYPE_F32;
    params.type_v          = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.swa_full        = true;
    params.embeddings      = false;
    params.pooling_type    = LLAMA_POOLING_TYPE_UNSPECIFIED;  // another one than that of the model is warned of
    params.no_perf         = true;
    params.samplers        = nullptr;
    params.n_samplers      = 0;
    params.cb_eval         = nullptr;
    params.ctx_other       = nullptr;
    llama_turbo_limit_outputs(params, 0);

    return params;
}

static llama_context_ptr make_context(llama_model & model, const llama_context_params & params, uint32_t n_tokens) {
    const observing_scope scope;

    llama_context_ptr res{ llama_init_from_model(&model, observing_params(params, n_tokens)) };
    if (!res) {
        throw std::runtime_error("no context for it could be made, as the log says");
    }

    return res;
}

//
// the text
//

static std::vector<llama_token> tokenize(const llama_vocab *              vocab,
                                         const std::vector<std::string> & text,
                                         size_t                           n_max) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw std::runtime_error("it has no vocabulary");  // upstream would abort
    }
    std::vector<llama_token> res;
    for (const std::string & piece : text) {
        const auto tokenize_into = [&](std::vector<llama_token> & tokens) {
            return llama_tokenize(vocab, piece.data(), piece.size(), tokens.data(), tokens.size(),
                                  /*add_special =*/false, /*parse_special =*/false);
        };
        std::vector<llama_token> tokens(piece.size() + 1);

        int32_t n = tokenize_into(tokens);
        if (n < 0 && n != INT32_MIN) {  // more tokens than bytes: spaces may be three bytes, each a token
            tokens.resize(-n);
            n = tokenize_into(tokens);
        }
        if (n < 0) {
            throw std::runtime_error("failed to tokenize");
        }
        res.insert(res.end(), tokens.begin(), tokens.begin() + n);
        if (res.size() >= n_max) {
            res.resize(n_max);
            break;
        }
    }

    return res;
}

//
// observing
//

namespace {

class observation {
  public:
    observation(llama_model & model, const llama_context_params & params, int32_t n_chunk) :
        model(model),
        ctx(make_context(model, params, n_chunk)) {
        for (const llama_kv_cache * kv : llama_turbo_caches(llama_get_memory(ctx.get()))) {
            llama_turbo_parts * parts = llama_turbo_access::parts(*kv);
            if (!parts || !parts->observed) {
                throw std::runtime_error("it has no KV cache");
            }
            caches.push_back(parts->observed.get());
        }
        if (caches.empty()) {
            throw std::runtime_error("it has no KV cache");
        }
    }

    // Reads tokens as a text of their own.
    void read(std::vector<llama_token> tokens, bool is_counted) {
        for (llama_turbo_observed * cache : caches) {
            cache->projects = is_counted && moments.empty();
        }
        llama_memory_clear(llama_get_memory(ctx.get()), /*data =*/false);
        const int32_t status = llama_decode(ctx.get(), llama_batch_get_one(tokens.data(), tokens.size()));
        llama_synchronize(ctx.get());
        if (status != 0) {
            throw std::runtime_error(status == 2 ? "it was interrupted" : "failed to compute");
        }
        if (!is_counted) {
            return;
        }
        for (llama_turbo_observed * cache : caches) {
            for (const auto & [il, layer] : cache->layers()) {
                if (!layer.is_built) {
                    throw std::runtime_error("layer " + std::to_string(il) +
                                             " attends in a way that can't be observed");
                }
                const int64_t n_group = model.hparams.n_head(il) / model.hparams.n_head_kv(il);
                moments[il].add(layer, tokens.size() - llama_turbo_observed::n_first, n_group);
            }
        }
    }

    std::shared_ptr<llama_turbo_calibration> calibration() const {
        // more than some models are trained on, but it suits them, too
        static constexpr int64_t N_POSITIONS = 32768;

        struct known_rope {
            llama_turbo_rope      rope;
            int64_t               n_embd_head;
            llama_turbo_rope_mean mean;
        };

        std::list<known_rope> known;

        const auto mean_of = [&](const llama_turbo_moments & layer) -> const llama_turbo_rope_mean & {
            for (const known_rope & one : known) {
                if (one.rope == layer.rope && one.n_embd_head == layer.n_embd_k) {
                    return one.mean;
                }
            }
            known.push_back({
                layer.rope, layer.n_embd_k, { layer.rope, layer.n_embd_k, N_POSITIONS }
            });
            return known.back().mean;
        };

        auto res = std::make_shared<llama_turbo_calibration>();
        for (const auto & [il, layer] : moments) {
            llama_turbo_moments::choice choice;
            choice.centers_k = !llama_turbo_cant_center_k(model, il);
            choice.centers_v = !llama_turbo_cant_center_v(model, il);
            choice.maps_k    = layer.n_embd_k <= LLAMA_TURBO_LARGEST_MAP &&
                            (layer.rope.is_known || llama_model_rope_type(&model) == LLAMA_ROPE_TYPE_NONE);
            res->layers[il] = layer.calibrate(mean_of(layer), choice);

            const std::vector<double> first = layer.first_tokens();
            for (size_t i = 0; i < first.size(); ++i) {
                if (first[i] > res->sink_distance) {
                    res->sink_distance = first[i];
                    res->sink          = i;
                }
            }
        }

        return res;
    }

  private:
    const llama_model & model;

    llama_context_ptr                       ctx;
    std::vector<llama_turbo_observed *>     caches;
    std::map<uint32_t, llama_turbo_moments> moments;
};

}  // namespace

static constexpr int32_t N_TRIAL  = 16;  // tokens that show how fast the model is
static constexpr int     N_TRIALS = 4;   // at most
static constexpr int32_t N_LEAST  = 64;  // tokens without which there is nothing to be learnt

const char * llama_turbo_cant_calibrate(const llama_model & model) {
    if (const char * why = llama_turbo_cant_attend(model)) {
        return why;
    }
    if (llama_model_has_encoder(&model)) {
        return "it has an encoder";
    }

    return llama_turbo_layers_with_kv(model).empty() ? "it has no KV cache" : nullptr;
}

static double seconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::shared_ptr<const llama_turbo_calibration> llama_turbo_calibrate(llama_model &                         model,
                                                                     const llama_context_params &          params,
                                                                     const std::vector<std::string> &      text,
                                                                     const llama_turbo_calibrate_options & options) {
    if (const char * why = llama_turbo_cant_calibrate(model)) {
        throw std::runtime_error(why);
    }

    const llama_vocab *            vocab  = llama_model_get_vocab(&model);
    const std::vector<llama_token> tokens = tokenize(vocab, text, options.n_tokens);
    if ((int32_t) tokens.size() < N_LEAST) {
        throw std::invalid_argument("the text has " + std::to_string(tokens.size()) + " tokens, a calibration needs " +
                                    std::to_string(N_LEAST));
    }
    // positions that were learnt end with the context that the model was trained on, which has room for BOS, too
    const int32_t n_ctx_train = model.hparams.n_ctx_train;
    const int32_t n_chunk     = n_ctx_train > 0 ? std::min(options.n_chunk, n_ctx_train - 1) : options.n_chunk;
    if (n_chunk < N_LEAST) {
        throw std::runtime_error("its context has " + std::to_string(n_ctx_train) + " tokens, too few");
    }
    const auto chunk_of = [&](int32_t begin, int32_t n) {
        std::vector<llama_token> chunk(tokens.begin() + begin, tokens.begin() + begin + n);
        if (llama_vocab_get_add_bos(vocab)) {
            chunk.insert(chunk.begin(), llama_vocab_bos(vocab));
        }
        return chunk;
    };

    const quiet_scope quiet;
    observation       seen(model, params, n_chunk + 1);

    options.progress(0, tokens.size());
    // Once is enough for most. The first time, weights may come from the disk; later ones may be slowed down by other programs.
    double n_possible = 0.0;
    for (int i = 0; i < N_TRIALS && n_possible < tokens.size(); ++i) {
        const auto begin = std::chrono::steady_clock::now();
        seen.read(chunk_of(0, N_TRIAL), /*is_counted =*/false);
        n_possible = std::max(n_possible, options.seconds * N_TRIAL / seconds_since(begin));
    }
    if (n_possible < N_LEAST) {
        throw std::runtime_error("it would take too long here");
    }
    const int32_t n_all = std::min<double>(tokens.size(), n_possible);

    int32_t n_read = 0;
    while (n_all - n_read >= N_LEAST) {
        const int32_t n = std::min(n_chunk, n_all - n_read);
        seen.read(chunk_of(n_read, n), /*is_counted =*/true);
        n_read += n;
        options.progress(n_read, n_all);
    }

    std::shared_ptr<llama_turbo_calibration> res = seen.calibration();
    res->n_tokens                                = n_read;
    llama_turbo_check_calibration(*res, model);

    return res;
}
