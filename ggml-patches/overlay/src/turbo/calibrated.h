#pragma once

#include "calibration.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

struct llama_model;

// A calibration (calibration.h) in memory of the devices, and what it adds to a graph.

// Of one layer. f32; nullptr: nothing to do.
struct llama_turbo_calibrated_layer {
    ggml_tensor * k_mean  = nullptr;  // [n_embd_head_k, n_head_kv]
    ggml_tensor * k_scale = nullptr;  // [n_embd_head_k, n_head_kv]
    ggml_tensor * q_scale = nullptr;  // [n_embd_head_k, 1, n_head_kv], 1/k_scale: for all query heads of a KV head
    ggml_tensor * k_map =
        nullptr;  // [n_embd_head_k, n_embd_head_k, n_head_kv], in place of scales; the rotation is a part of it
    ggml_tensor * q_map     = nullptr;  // likewise
    ggml_tensor * v_mean    = nullptr;  // [n_embd_head_v, n_head_kv]
    ggml_tensor * v_scale   = nullptr;  // [n_embd_head_v, n_head_kv]
    ggml_tensor * out_scale = nullptr;  // [n_embd_head_v, 1, n_head_kv], 1/v_scale
    ggml_tensor * out_mean  = nullptr;  // [n_embd_head_v, 1, n_head_kv], v_mean

    mutable bool is_built = false;      // into a graph of attention

    // k, v [n_embd_head, n_head_kv, n]: from what the model computes to what the cache stores, and back
    ggml_tensor * store_k(ggml_context * ctx, ggml_tensor * k) const;
    ggml_tensor * restore_k(ggml_context * ctx, ggml_tensor * k) const;
    ggml_tensor * store_v(ggml_context * ctx, ggml_tensor * v) const;

    // q [n_embd_head_k, n_head, n_tokens] of the model, as it meets stored keys.
    ggml_tensor * map_q(ggml_context * ctx, ggml_tensor * q) const;

    // The attention output [n_embd_head_v * n_head, n] of the model, from that of the cache.
    ggml_tensor * restore_out(ggml_context * ctx, ggml_tensor * out) const;
};

// Of the layers of one KV cache.
class llama_turbo_calibrated {
  public:
    // layers: those of the cache, as numbers in the model; is_rotated: whether the cache rotates K. Throws std::runtime_error: out of memory.
    llama_turbo_calibrated(const llama_turbo_calibration & calibration,
                           const llama_model &             model,
                           const std::vector<uint32_t> &   layers,
                           bool                            is_rotated);

    const std::map<uint32_t, llama_turbo_calibrated_layer> & layers() const { return by_number; }

    const uint32_t digest;

  private:
    std::map<uint32_t, llama_turbo_calibrated_layer> by_number;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;  // one per type of buffer

    void allocate(const llama_turbo_calibration & calibration,
                  const llama_model &             model,
                  ggml_backend_buffer_type_t      buft,
                  bool                            is_rotated);
};
