#pragma once

#include "calibration.h"
#include "exact.h"
#include "layers.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

struct llama_model;

// What is asked for a context beyond its cache types. It comes from the environment, which the options of the tools set:
//   TURBO_CACHE_TYPE_K_LAYERS, TURBO_CACHE_TYPE_V_LAYERS   maps, see layers.h
//   TURBO_CACHE_LAYER_ADAPTIVE                             a mode instead of maps
//   TURBO_CACHE_DECAY                                      shares of temporal decay, see decay.h
//   TURBO_CACHE_CALIBRATION                                file, see calibration.h
//   TURBO_CACHE_SINK, TURBO_CACHE_TAIL                     numbers of tokens, see exact.h
// The variables are read once, when the context is made. TURBO_LAYER_ADAPTIVE, TURBO_DECAY and TURBO_CALIBRATION are older names; they work for
// one more release, with a warning.
//
// A context that belongs to another one (draft, MTP) has no settings, also while its memory is measured and there is no other one yet (draft.h).
// Where it attends layers of the other's cache, it does so as the other. In a model that is loaded to measure its memory only (no_alloc), maps
// and files that do not fit are left out.
struct llama_turbo_settings {
    bool                   by_layer = false;  // a map or mode is set
    std::vector<uint32_t>  layers;            // layers of the model that have a KV cache, ascending
    std::vector<ggml_type> types_k;           // [layers.size()]
    std::vector<ggml_type> types_v;

    llama_turbo_decay_shares decay;

    std::shared_ptr<const llama_turbo_calibration> calibration;  // nullptr: none

    llama_turbo_exact_sizes exact;

    bool any() const { return by_layer || decay.cold > 0 || calibration || exact; }

    // Index of a layer of the model in layers; layers.size(): it has no KV cache.
    size_t index_of(uint32_t il) const;

    // Types of K and V of a layer of the model: the given ones, unless a map says otherwise.
    std::pair<ggml_type, ggml_type> types_of(uint32_t il, ggml_type type_k, ggml_type type_v) const;
};

// Throws std::invalid_argument.
llama_turbo_settings llama_turbo_read_settings(const llama_model & model, const llama_context_params & params);

// The settings of the context that this thread is making. The check of a context hands them over, and the constructors of its caches take them:
// between the two lie constructors of upstream, through which a hook of one line can't pass an argument.
void                         llama_turbo_use_settings(llama_turbo_settings settings);
const llama_turbo_settings & llama_turbo_settings_in_use();
