#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

class llama_kv_cache;
class llama_kv_cells;

// Temporal decay: the oldest tokens of each sequence lose one bit of each value of turbo3 and turbo4, in place. It runs before the tokens of a
// ubatch are stored, outside of the model's graph, on the devices that hold the cache.
//
//   cold       positions below pmin + cold percent of the positions stored, rounded down to a multiple of BOUNDARY_STEP
//   cold cell  one that is cold for all its sequences
//
// Each cell remembers what has decayed (llama_kv_cells::turbo_decayed), until it gets a new token. K is encoded again when its token moves, so
// then it is forgotten for K. All layers decay together. Forgetting too much does no harm, since decaying twice changes nothing; so a state
// need not hold it.
class llama_turbo_decay {
  public:
    static constexpr llama_pos BOUNDARY_STEP = 32;

    // percent: cold
    llama_turbo_decay(const llama_kv_cache & kv, int percent);

    // Tells the log what has decayed.
    ~llama_turbo_decay();

    llama_turbo_decay(const llama_turbo_decay &)             = delete;
    llama_turbo_decay & operator=(const llama_turbo_decay &) = delete;

    size_t n_layers_k() const { return decaying_k.size(); }

    size_t n_layers_v() const { return decaying_v.size(); }

    bool any() const { return !decaying_k.empty() || !decaying_v.empty(); }

    // Before a ubatch. False: computing failed.
    bool run(llama_kv_cache & kv, llama_context * lctx);

    // Before K of tokens that move is encoded again.
    static void forget_moved(llama_kv_cache & kv);

  private:
    const int percent;

    // tensors that decay, [layer][stream]
    std::vector<std::vector<ggml_tensor *>> decaying_k;
    std::vector<std::vector<ggml_tensor *>> decaying_v;

    // for the log
    uint64_t n_passes  = 0;
    uint64_t n_cells_k = 0;
    uint64_t n_cells_v = 0;

    struct range {
        uint32_t begin;
        uint32_t end;
    };

    // Cells that are to decay now.
    struct ranges {
        std::vector<range> k;
        std::vector<range> v;
    };

    ranges find_cold(const llama_kv_cells & cells, std::vector<uint8_t> & decayed);
    bool   run_stream(llama_context * lctx, uint32_t stream, const ranges & cold);

    static void append_cell(std::vector<range> & ranges, uint32_t i);
};
