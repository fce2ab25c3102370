#pragma once

#include "calibration.h"
#include "rope-mean.h"

#include <cstdint>
#include <vector>

// What Q, K and V of one layer look like, and the vectors that follow.
struct llama_turbo_moments {
    // Adds what a ubatch of n_tokens, those at the beginning left out, has shown. n_group: query heads of a KV head.
    void add(const llama_turbo_observed_layer & layer, int64_t n_tokens, int64_t n_group);

    // The means and scales.
    //   center_k, center_v: whether something may be taken from K, and from V
    //   mean: what RoPE does to the mean of K
    llama_turbo_calibration_layer calibrate(bool center_k, bool center_v, const llama_turbo_rope_mean & mean) const;

    // How far the K of each of the first tokens lies from the mean, over how far others do.
    std::vector<double> first_tokens() const;

    llama_turbo_rope rope;

  private:
    int64_t n_embd_k  = 0;
    int64_t n_embd_v  = 0;
    int64_t n_head_kv = 0;
    double  n_queries = 0;  // of a KV head
    double  n_keys    = 0;

    std::vector<double> q_sq, k_sum, k_sq,
        k_first;  // [n_head_kv][n_embd_k]; k_first: [n_first][n_head_kv][n_embd_k], of the last ubatch
    std::vector<double> v_sum, v_sq, v_weight,
        out_sq;   // [n_head_kv][n_embd_v]; v_weight: [n_head_kv]; out_sq may be empty
};
