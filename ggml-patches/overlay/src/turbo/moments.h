#pragma once

#include "calibration.h"
#include "rope-mean.h"

#include <cstdint>
#include <vector>

// What Q, K and V of one layer look like, and the calibration that follows.
class llama_turbo_moments {
  public:
    // Adds what a ubatch of n_tokens, those at the beginning left out, has shown. n_group: query heads of a KV head.
    void add(const llama_turbo_observed_layer & layer, int64_t n_tokens, int64_t n_group);

    // What may be in it.
    struct choice {
        bool centers_k = true;
        bool centers_v = true;
        bool maps_k    = true;  // by matrices; otherwise by scales
    };

    // rope: what RoPE does to K
    llama_turbo_calibration_layer calibrate(const llama_turbo_rope_mean & rope, const choice & choice) const;

    // How far the K of each of the first tokens lies from the mean, over how far others do.
    std::vector<double> first_tokens() const;

    llama_turbo_rope rope;
    bool             turns_q  = true;  // Q is from before this RoPE
    int64_t          n_embd_k = 0;

  private:
    int64_t n_embd_v  = 0;
    int64_t n_head_kv = 0;
    double  n_queries = 0;  // of a KV head
    double  n_keys    = 0;

    std::vector<double> q_products, k_products;  // [n_head_kv][n_embd_k][n_embd_k]
    std::vector<double> k_sum;                   // [n_head_kv][n_embd_k]
    std::vector<double> k_first;                 // [n_first][n_head_kv][n_embd_k], of the last ubatch
    std::vector<double> v_sum, v_sq, v_weight,
        out_sq;                                  // [n_head_kv][n_embd_v]; v_weight: [n_head_kv]; out_sq may be empty

    void calibrate_k(int64_t                         head,
                     const llama_turbo_rope_mean &   rope,
                     const choice &                  choice,
                     llama_turbo_calibration_layer & res) const;
};
