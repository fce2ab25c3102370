#pragma once

#include "calibration.h"
#include "exact.h"
#include "layers.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

// What is asked for a context beyond its cache types. It comes from the environment, which the options of the tools set:
//   TURBO_CACHE_TYPE_K_LAYERS, TURBO_CACHE_TYPE_V_LAYERS   maps, see layers.h
//   TURBO_CACHE_LAYER_ADAPTIVE                             a mode instead of maps
//   TURBO_CACHE_DECAY                                      shares of temporal decay, see decay.h
//   TURBO_CACHE_CALIBRATION                                auto, none or a file, see calibration.h and auto-calibration.h
//   TURBO_CACHE_SINK, TURBO_CACHE_TAIL                     numbers of tokens, see exact.h
// The variables are read once, when the context is made. TURBO_LAYER_ADAPTIVE, TURBO_DECAY and TURBO_CALIBRATION are older names; they work for
// one more release, with a warning.
//
// Where K or V has a turbo type, in any layer, the last three are "auto", 4 and 64 unless they are set. What is not set is left out where a
// model or a device can't have it, with the reason in the log; what is set is refused there.
//
// A context that belongs to another one has no maps, decay or file, also while its memory is measured and there is no other one yet (draft.h).
// The one of a draft model has the defaults of its types. One that shares its target's model or layers (MTP) has nothing of its own, and attends
// layers of the other's cache as the other does. In a model that is loaded to measure its memory only (no_alloc), maps and files that do not fit
// are left out.
struct llama_turbo_settings {
    bool                   by_layer = false;  // a map or mode is set
    std::vector<uint32_t>  layers;            // layers of the model that have a KV cache, ascending
    std::vector<ggml_type> types_k;           // [layers.size()]
    std::vector<ggml_type> types_v;

    llama_turbo_decay_shares decay;

    std::shared_ptr<const llama_turbo_calibration> calibration;  // nullptr: none

    llama_turbo_exact_sizes exact;

    // Of what nobody has set.
    bool calibrates       = false;  // automatically
    bool exact_by_default = false;

    // Why what is there by default is not; "": it is, or is not to be.
    std::string why_not_calibrated;
    std::string why_not_exact;

    bool observes = false;  // the context of an observation (calibrate.h), which has nothing else

    bool any() const {
        return by_layer || decay.cold > 0 || calibration || exact || observes || !why_not_calibrated.empty() ||
               !why_not_exact.empty();
    }

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
