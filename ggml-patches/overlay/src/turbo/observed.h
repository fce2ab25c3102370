#pragma once

#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

struct llama_model;
struct llm_graph_context;

// What a context that observes Q, K and V adds to its graphs: sums over the tokens of a ubatch, from which a calibration is computed
// (calibrate.h). Such a context has an f32 cache, no flash attention, and one sequence that begins with each ubatch. So token i is in cell i.
//
// K and Q are taken before RoPE. There their moments do not depend on the position, and those of any range of positions follow from them.

// RoPE of the keys of a layer, as the graph applies it.
struct llama_turbo_rope {
    std::array<int32_t, 16> op_params = {};  // of GGML_OP_ROPE
    std::vector<float>      factors;         // of its frequencies; empty: none

    bool is_known = false;                   // false: what is observed is what attention sees

    bool operator==(const llama_turbo_rope & other) const {
        return op_params == other.op_params && factors == other.factors && is_known == other.is_known;
    }
};

// Sums of one layer of a cache, f32. The first tokens of a sequence (n_first) are left out, since caches keep them exactly.
struct llama_turbo_observed_layer {
    ggml_tensor * q_products =
        nullptr;  // [n_embd_head_k, n_embd_head_k, n_head_kv]  of channels, of all query heads of a KV head
    ggml_tensor * k_products =
        nullptr;  // likewise, of what is left when the mean of the ubatch is taken away: biases would hide it
    ggml_tensor * k_sum   = nullptr;  // [n_embd_head_k, n_head_kv]
    ggml_tensor * k_first = nullptr;  // [n_embd_head_k, n_head_kv, n_first]  K of the tokens that are left out

    // Tokens are weighted by the squares of the weights that attention gives them: as the noise of their V adds up.
    ggml_tensor * v_sum    = nullptr;  // [n_embd_head_v, n_head_kv]
    ggml_tensor * v_sq     = nullptr;  // [n_embd_head_v, n_head_kv]
    ggml_tensor * v_weight = nullptr;  // [n_head_kv]

    // Squares of the columns of the output projection, summed over the query heads of a KV head. The weights may lie in a layout that only
    // products can read, so unit vectors are projected. In large models some query heads of a KV head are projected at once, with signs: what
    // is left of the products of their columns is an error.
    ggml_tensor * out_sq = nullptr;  // [n_embd_head_v * n_head_kv]
    ggml_tensor * probe  = nullptr;  // [n_embd_head_v * n_head, n_embd_head_v * n_head_kv]
    ggml_tensor * parts  = nullptr;  // [n_embd_head_v * n_head, n_parts]  which query heads are projected at once

    // Found in the graph.
    mutable llama_turbo_rope rope;                // of K
    mutable bool             turns_q    = false;  // Q was taken before the same RoPE, or there is none
    mutable bool             has_output = false;  // out_sq is there
    mutable bool             is_built   = false;
};

class llama_turbo_observed {
  public:
    static constexpr int64_t n_first = 4;

    // layers: those of the cache, as numbers in the model. Throws std::runtime_error: out of memory.
    llama_turbo_observed(const llama_model & model, const std::vector<uint32_t> & layers);

    const std::map<uint32_t, llama_turbo_observed_layer> & layers() const { return by_number; }

    bool projects = true;  // the output projection is observed, too; once is enough

    // Adds the sums to a graph.
    //   q, k, v: of the model, [n_embd_head, n_head, n_tokens]
    //   out:     of attention
    //   wo:      output projection, or nullptr
    // Throws std::runtime_error: a form of attention without weights.
    void build(const llm_graph_context & graph,
               uint32_t                  il,
               ggml_tensor *             q,
               ggml_tensor *             k,
               ggml_tensor *             v,
               ggml_tensor *             out,
               ggml_tensor *             wo) const;

    // Nodes and leafs of a graph.
    uint32_t n_nodes() const;

  private:
    std::map<uint32_t, llama_turbo_observed_layer> by_number;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;  // one per type of buffer

    void allocate(const llama_model & model, ggml_backend_buffer_type_t buft);
};
