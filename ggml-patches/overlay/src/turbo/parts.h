#pragma once

#include "calibrated.h"
#include "decay.h"
#include "exact.h"
#include "observed.h"
#include "settings.h"

#include <map>
#include <memory>

class llama_kv_cache;
class llama_kv_cache_context;

// What is added to one KV cache of upstream (llama_kv_cache::turbo). A cache without settings and without a turbo type has none.
struct llama_turbo_parts {
    explicit llama_turbo_parts(llama_turbo_settings settings) : settings(std::move(settings)) {}

    const llama_turbo_settings settings;

    // Of this cache, or of the one whose layers it shares.
    std::shared_ptr<const llama_turbo_calibrated>            calibrated;
    std::map<uint32_t, const llama_turbo_calibrated_layer *> calibrated_layers;  // by number of the layer of this cache

    bool maps_rotate_k = false;                      // in place of the rotation of K that the graph had in all layers

    std::unique_ptr<llama_turbo_exact> exact;        // nullptr: none
    std::unique_ptr<llama_turbo_decay> decay;        // nullptr: none

    std::unique_ptr<llama_turbo_observed> observed;  // nullptr: this context is not there to observe

    llama_context * lctx = nullptr;                  // of the last update

    // Once the tensors of the cache are there. Throws std::runtime_error: out of memory, or a cache that can't have them.
    static void init(llama_kv_cache & kv);

    // False, with the reason in the log: the graph does not attend a layer as it must.
    bool check_graph() const;

  private:
    void init_observed(const llama_kv_cache & kv);
    void init_calibration(const llama_kv_cache & kv);
    bool all_keys_are_mapped(const llama_kv_cache & kv) const;
    void share_calibration(const llama_kv_cache & kv, const llama_kv_cache & other);
    void init_exact(llama_kv_cache & kv);
};

// Nodes and leafs of a graph that upstream's estimate, 8 per tensor of the model, has no room for.
uint32_t llama_turbo_graph_nodes(const llama_kv_cache & kv);

// Calibration, and copies, of what a layer of the model attends; nullptr: it has none.
const llama_turbo_calibrated_layer * llama_turbo_calibrated_layer_of(const llama_kv_cache_context & mctx, int32_t il);
const llama_turbo_exact::layer *     llama_turbo_exact_layer_of(const llama_kv_cache_context & mctx, int32_t il);

// Where a layer of the model is observed, and the number of the layer that it attends; nullptr: it is not.
std::pair<const llama_turbo_observed *, uint32_t> llama_turbo_observed_layer_of(const llama_kv_cache_context & mctx,
                                                                                int32_t                        il);

// Of a cache that has copies.
llama_turbo_exact & llama_turbo_exact_of(const llama_kv_cache_context & mctx);
