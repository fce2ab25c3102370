#include "auto-calibration.h"

#include "calibrate.h"
#include "calibration-text.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "model.h"

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <utility>

// Raised when the numbers change for another reason than those that method_of() sees.
static constexpr uint32_t METHOD = 2;

// A big model on few cores must not keep anyone waiting for minutes.
static constexpr double SECONDS = 60.0;

std::vector<std::string> llama_turbo_calibration_text() {
    return { std::begin(LLAMA_TURBO_CALIBRATION_TEXT), std::end(LLAMA_TURBO_CALIBRATION_TEXT) };
}

//
// the file
//

static std::string folder_in(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

// As common/common.cpp has it, which not all programs are linked with; empty: none.
static std::filesystem::path cache_folder() {
    const auto named = [](const char * variable, const char * below) {
        const std::string value = folder_in(variable);
        return value.empty() ? std::filesystem::path() : std::filesystem::u8path(value) / below;
    };
    std::filesystem::path res = folder_in("LLAMA_CACHE");
    if (!res.empty()) {
        return res;
    }
#if defined(_WIN32)
    return named("LOCALAPPDATA", "llama.cpp");
#elif defined(__APPLE__)
    return named("HOME", "Library/Caches/llama.cpp");
#else
    res = named("XDG_CACHE_HOME", "llama.cpp");
    return res.empty() ? named("HOME", ".cache/llama.cpp") : res;
#endif
}

static uint32_t method_of(const llama_model &                   model,
                          const std::vector<uint32_t> &         layers,
                          const llama_context_params &          params,
                          const llama_turbo_calibrate_options & options) {
    uint32_t   res = METHOD;
    const auto add = [&](const auto & value) {
        res = llama_turbo_crc32(res, &value, sizeof(value));
    };
    for (const std::string & piece : llama_turbo_calibration_text()) {
        res = llama_turbo_crc32(res, piece.data(), piece.size());
    }
    add(options.n_tokens);
    add(options.n_chunk);

    // norms may be the same in models of several sizes, in fine-tunes that leave them alone, or not be there, as in OLMo
    res = llama_turbo_crc32(res, model.name.data(), model.name.size());
    for (uint32_t il : layers) {
        for (uint32_t n : { il, model.hparams.n_head(il), model.hparams.n_head_kv(il), model.hparams.n_embd_head_k(il),
                            model.hparams.n_embd_head_v(il) }) {
            add(n);
        }
    }

    // the mean of K depends on how it is turned
    add(model.hparams.n_ctx_train);
    add(model.hparams.rope_freq_base_train);
    add(model.hparams.rope_freq_scale_train);
    add((int32_t) params.rope_scaling_type);
    add(params.rope_freq_base);
    add(params.rope_freq_scale);
    add(params.yarn_ext_factor);
    add(params.yarn_attn_factor);
    add(params.yarn_beta_fast);
    add(params.yarn_beta_slow);
    add(params.yarn_orig_ctx);

    return res;
}

//
// making it
//

static std::shared_ptr<const llama_turbo_calibration> read_built_in_text(llama_model &                 model,
                                                                         const llama_context_params &  params,
                                                                         llama_turbo_calibrate_options options) {
    options.progress = [](int32_t n_read, int32_t n_all) {
        if (n_read == 0) {
            LLAMA_LOG_WARN(
                "llama_turbo_calibrate: reading %d tokens to calibrate the KV cache, once for this model (leave it out "
                "with --cache-calibration none)\n",
                n_all);
        } else {
            LLAMA_LOG_INFO("llama_turbo_calibrate: %d of %d tokens\n", n_read, n_all);
        }
    };

    return llama_turbo_calibrate(model, params, llama_turbo_calibration_text(), options);
}

static void keep(const llama_turbo_calibration & calibration,
                 const llama_model &             model,
                 const std::filesystem::path &   path) {
    std::error_code ignored;  // if it matters, writing fails
    std::filesystem::create_directories(path.parent_path(), ignored);
    try {
        llama_turbo_save_calibration(calibration, model, path.u8string());
        LLAMA_LOG_WARN("llama_turbo_calibrate: wrote %s\n", path.u8string().c_str());
    } catch (const std::runtime_error & error) {
        LLAMA_LOG_WARN("llama_turbo_calibrate: the next start has to calibrate again: %s\n", error.what());
    }
}

std::shared_ptr<const llama_turbo_calibration> llama_turbo_auto_calibration(llama_model &                 model,
                                                                            const llama_context_params &  params,
                                                                            const std::vector<uint32_t> & layers,
                                                                            std::string &                 why_not) {
    if (const char * why = llama_turbo_cant_calibrate(model)) {
        why_not = why;
        return nullptr;
    }
    if (model.hparams.no_alloc) {
        return llama_turbo_planned_calibration(model, layers);
    }

    llama_turbo_calibrate_options options;
    options.seconds = SECONDS;

    const std::filesystem::path folder = cache_folder();
    const std::filesystem::path path =
        folder / format("turbo-calibration-%s-%08x.gguf", llama_turbo_model_fingerprint(model).c_str(),
                        method_of(model, layers, params, options));

    std::error_code ignored;
    if (!folder.empty() && std::filesystem::exists(path, ignored)) {
        try {
            return llama_turbo_load_calibration(path.u8string(), model, layers);
        } catch (const std::invalid_argument & error) {
            LLAMA_LOG_WARN("llama_turbo_calibrate: %s; it is made again\n", error.what());
        }
    }
    try {
        auto res = read_built_in_text(model, params, options);
        if (folder.empty()) {
            LLAMA_LOG_WARN(
                "llama_turbo_calibrate: the next start has to calibrate again: no cache folder (set LLAMA_CACHE)\n");
        } else {
            keep(*res, model, path);
        }
        return res;
    } catch (const std::exception & error) {
        why_not = error.what();
    }

    return nullptr;
}
