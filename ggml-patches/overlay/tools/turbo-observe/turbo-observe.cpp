// What Q, K and V of a model look like in a text, per layer, KV head and channel: what a calibration is computed from
// (src/turbo/calibration.h). Run by turbo-gguf calibrate.
//
//   llama-turbo-observe -m MODEL -o FILE [-f TEXT]... [-c CTX] [--chunks N] [-t THREADS] [-ngl N]
//
// FILE is a GGUF:
//   general.type                     "turbo-observation"
//   general.architecture
//   turbo.calibration.model          fingerprint of the model
//   turbo.observation.tokens         u32, 0 without a text
//   turbo.observation.rope           "none", "normal" (pairs 2i, 2i + 1) or "neox" (pairs i, i + n_rot/2)
//   turbo.observation.{layers, n_head, n_head_kv, head_k, head_v, n_rot}
//                                    arrays of u32: layers with a KV cache, by their number in the model, and their shape
//   turbo.observation.{center_k, center_v}
//                                    arrays of bool: K, or V, may be centered
// and for each of these layers, with a text, f32:
//   blk.N.q_sq, k_sq, k_mean [head_k, n_head_kv]  means over the text, of Q over all query heads of the KV head
//   blk.N.v_sq, v_mean       [head_v, n_head_kv]  means weighted by the squares of the weights that attention gives a token: as the noise of
//                                                 its V adds up
// Q and K are those after RoPE.
//
// Exit code: 0, 1 if something failed, 2 for a wrong command line or input.

#include "../../src/llama-model.h"
#include "../../src/turbo/model.h"
#include "../../src/turbo/settings.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama-cpp.h"
#include "llama.h"
#include "observer.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// A wrong command line, model or text.
struct input_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct options {
    std::string              model;
    std::string              out;
    std::vector<std::string> texts;
    int                      n_ctx        = 512;
    int                      n_chunks     = -1;  // all
    int                      n_threads    = 1;
    int                      n_gpu_layers = 0;
};

static options parse_options(int argc, char ** argv) {
    options res;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (i + 1 == argc) {
            throw input_error(name + ": unknown, or without a value");
        }
        const std::string value = argv[++i];

        const std::map<std::string, int *> numbers = {
            { "-c",       &res.n_ctx        },
            { "--chunks", &res.n_chunks     },
            { "-t",       &res.n_threads    },
            { "-ngl",     &res.n_gpu_layers },
        };
        if (name == "-m") {
            res.model = value;
        } else if (name == "-o") {
            res.out = value;
        } else if (name == "-f") {
            res.texts.push_back(value);
        } else if (numbers.count(name) > 0) {
            *numbers.at(name) = atoi(value.c_str());
        } else {
            throw input_error(name + ": unknown option");
        }
    }
    if (res.model.empty() || res.out.empty() || res.n_ctx < 16 || res.n_threads < 1) {
        throw input_error("-m MODEL and -o FILE are needed, -c is at least 16, -t at least 1");
    }

    return res;
}

//
// observing
//

static std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & path) {
    std::ifstream     file(path, std::ios::binary);
    std::stringstream content;
    content << file.rdbuf();
    const std::string text = content.str();
    if (!file || text.empty()) {
        throw input_error(path + ": can't be read, or empty");
    }

    const auto tokenize_into = [&](std::vector<llama_token> & tokens) {
        return llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), true, false);
    };
    std::vector<llama_token> tokens;
    tokens.resize(-tokenize_into(tokens));  // what it takes
    if (tokens.empty() || tokenize_into(tokens) < 0) {
        throw std::runtime_error(path + ": failed to tokenize");
    }

    return tokens;
}

// Runs the model over a text in chunks that know nothing of each other, as llama-perplexity does.
static size_t observe(llama_context *          ctx,
                      observer &               obs,
                      std::vector<llama_token> tokens,
                      const options &          opts,
                      int &                    n_left) {
    const llama_vocab * vocab   = llama_model_get_vocab(llama_get_model(ctx));
    const bool          add_bos = llama_vocab_get_add_bos(vocab);

    size_t n_seen = 0;
    for (size_t begin = 0; begin < tokens.size() && n_left != 0; begin += opts.n_ctx) {
        const int n = std::min<size_t>(opts.n_ctx, tokens.size() - begin);
        if (add_bos) {
            tokens[begin] = llama_vocab_bos(vocab);
        }
        llama_memory_clear(llama_get_memory(ctx), true);
        obs.begin_chunk();
        if (llama_decode(ctx, llama_batch_get_one(tokens.data() + begin, n)) != 0 || !obs.error.empty()) {
            throw std::runtime_error("failed to compute: " + obs.error);
        }
        n_seen += n;
        --n_left;
    }

    return n_seen;
}

//
// writing
//

class writer {
  public:
    // n_bytes: of the tensors, and what ggml needs for them
    explicit writer(size_t n_bytes) {
        data.reset(ggml_init({ n_bytes, /*mem_buffer =*/nullptr, /*no_alloc =*/false }));
        meta.reset(gguf_init_empty());
    }

    void text(const char * key, const std::string & value) { gguf_set_val_str(meta.get(), key, value.c_str()); }

    void number(const char * key, uint32_t value) { gguf_set_val_u32(meta.get(), key, value); }

    void numbers(const char * key, const std::vector<uint32_t> & values) {
        gguf_set_arr_data(meta.get(), key, GGUF_TYPE_UINT32, values.data(), values.size());
    }

    void flags(const char * key, const std::vector<int8_t> & values) {
        gguf_set_arr_data(meta.get(), key, GGUF_TYPE_BOOL, values.data(), values.size());
    }

    // weights: of the sums of each head
    void tensor(const char * name, uint32_t il, const std::vector<double> & sums, const std::vector<double> & weights) {
        const int64_t n_embd_head = sums.size() / weights.size();

        ggml_tensor * res = ggml_new_tensor_2d(data.get(), GGML_TYPE_F32, n_embd_head, weights.size());
        ggml_format_name(res, "blk.%u.%s", il, name);
        for (size_t i = 0; i < sums.size(); ++i) {
            ((float *) res->data)[i] = sums[i] / weights[i / n_embd_head];
        }
        gguf_add_tensor(meta.get(), res);
    }

    void write(const std::string & path) const {
        if (!gguf_write_to_file(meta.get(), path.c_str(), /*only_meta =*/false)) {
            throw std::runtime_error(path + ": failed to write: No space left on device, or no folder");
        }
    }

  private:
    ggml_context_ptr data;
    gguf_context_ptr meta;
};

static const char * rope_name(const llama_model & model) {
    switch (llama_model_rope_type(&model)) {
        case LLAMA_ROPE_TYPE_NONE:
            return "none";
        case LLAMA_ROPE_TYPE_NORM:
            return "normal";
        default:
            return "neox";  // the others pair channels like it
    }
}

static void write_layers(writer &                       out,
                         const llama_hparams &          hparams,
                         const std::vector<uint32_t> &  layers,
                         std::map<uint32_t, layer_sums> sums) {
    for (uint32_t il : layers) {
        const layer_sums & layer = sums[il];
        if (layer.n_tokens == 0 || layer.v_sq.empty()) {
            throw std::runtime_error("layer " + std::to_string(il) + " attended in a way that could not be observed");
        }
        const std::vector<double> n_queries(hparams.n_head_kv(il), layer.n_queries);
        const std::vector<double> n_tokens(hparams.n_head_kv(il), layer.n_tokens);
        out.tensor("q_sq", il, layer.q_sq, n_queries);
        out.tensor("k_sq", il, layer.k_sq, n_tokens);
        out.tensor("k_mean", il, layer.k, n_tokens);
        out.tensor("v_sq", il, layer.v_sq, layer.v_weight);
        out.tensor("v_mean", il, layer.v, layer.v_weight);
    }
}

static void write(const std::string &            path,
                  const llama_model &            model,
                  const std::vector<uint32_t> &  layers,
                  std::map<uint32_t, layer_sums> sums,
                  size_t                         n_tokens) {
    const llama_hparams & hparams = model.hparams;

    std::vector<uint32_t> n_head, n_head_kv, head_k, head_v, n_rot;
    std::vector<int8_t>   center_k, center_v;
    size_t                n_bytes = 0;
    for (uint32_t il : layers) {
        n_head.push_back(hparams.n_head(il));
        n_head_kv.push_back(hparams.n_head_kv(il));
        head_k.push_back(hparams.n_embd_head_k(il));
        head_v.push_back(hparams.n_embd_head_v(il));
        n_rot.push_back(hparams.n_rot(il));
        center_k.push_back(llama_turbo_cant_center_k(model, il) == nullptr);
        center_v.push_back(llama_turbo_cant_center_v(model, il) == nullptr);
        n_bytes +=
            n_head_kv.back() * (3 * head_k.back() + 2 * head_v.back()) * sizeof(float) + 8 * ggml_tensor_overhead();
    }

    writer out(n_bytes);
    out.text("general.type", "turbo-observation");
    out.text("general.architecture", llm_arch_name(model.arch));
    out.text("general.name", model.name);
    out.text("turbo.calibration.model", llama_turbo_model_fingerprint(model));
    out.number("turbo.observation.tokens", n_tokens);
    out.text("turbo.observation.rope", rope_name(model));
    out.numbers("turbo.observation.layers", layers);
    out.numbers("turbo.observation.n_head", n_head);
    out.numbers("turbo.observation.n_head_kv", n_head_kv);
    out.numbers("turbo.observation.head_k", head_k);
    out.numbers("turbo.observation.head_v", head_v);
    out.numbers("turbo.observation.n_rot", n_rot);
    out.flags("turbo.observation.center_k", center_k);
    out.flags("turbo.observation.center_v", center_v);

    if (n_tokens > 0) {
        write_layers(out, hparams, layers, std::move(sums));
    }
    out.write(path);
}

//
// main
//

static void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static void set_env(const char * name, const char * value) {
#ifdef _WIN32
    _putenv_s(name, value);
#else
    setenv(name, value, /*overwrite =*/1);
#endif
}

static void run(const options & opts) {
    // the cache must hold what the model computes
    for (const char * name : { "TURBO_CACHE_TYPE_K_LAYERS", "TURBO_CACHE_TYPE_V_LAYERS", "TURBO_CACHE_LAYER_ADAPTIVE",
                               "TURBO_CACHE_DECAY", "TURBO_CACHE_CALIBRATION", "TURBO_CACHE_SINK", "TURBO_CACHE_TAIL",
                               "TURBO_LAYER_ADAPTIVE", "TURBO_DECAY", "TURBO_CALIBRATION", "LLAMA_TURBO_ROTATE_F32" }) {
        set_env(name, "");
    }

    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = opts.n_gpu_layers;
    llama_model_ptr model{ llama_model_load_from_file(opts.model.c_str(), model_params) };
    if (!model) {
        throw input_error(opts.model + ": failed to load the model");
    }
    if (const char * why = llama_turbo_cant_attend(*model)) {
        throw input_error(std::string("this model can't be calibrated: ") + why);
    }

    observer             obs;
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = opts.n_ctx;
    params.n_batch              = opts.n_ctx;
    params.n_ubatch             = std::min(opts.n_ctx, 512);
    params.n_threads            = opts.n_threads;
    params.n_threads_batch      = opts.n_threads;
    params.type_k               = GGML_TYPE_F32;
    params.type_v               = GGML_TYPE_F32;
    params.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.swa_full             = true;
    params.cb_eval              = observer::callback;
    params.cb_eval_user_data    = &obs;

    const llama_turbo_settings settings = llama_turbo_read_settings(*model, params);
    if (settings.layers.empty()) {
        throw input_error("this model has no KV cache");
    }

    size_t n_tokens = 0;
    if (!opts.texts.empty()) {
        llama_context_ptr ctx{ llama_init_from_model(model.get(), params) };
        if (!ctx) {
            throw std::runtime_error("failed to make a context");
        }
        int n_left = opts.n_chunks;
        for (const std::string & path : opts.texts) {
            n_tokens += observe(ctx.get(), obs, tokenize(llama_model_get_vocab(model.get()), path), opts, n_left);
        }
    }
    write(opts.out, *model, settings.layers, obs.layers, n_tokens);
    printf("%zu tokens, %zu layers\n", n_tokens, settings.layers.size());
}

int main(int argc, char ** argv) {
    try {
        const options opts = parse_options(argc, argv);
        llama_log_set(on_log, nullptr);
        llama_backend_init();
        run(opts);
    } catch (const input_error & err) {
        fprintf(stderr, "error: %s\n", err.what());
        return 2;
    } catch (const std::exception & err) {
        fprintf(stderr, "error: %s\n", err.what());
        return 1;
    }

    return 0;
}
