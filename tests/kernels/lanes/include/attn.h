// What turbo/decode.cuh uses of upstream's common.cuh beyond the stand-in of that name.

#pragma once

#include "ggml-cuda/common.cuh"

static inline float get_alibi_slope(float max_bias, uint32_t h, uint32_t n_head_log2, float m0, float m1) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    return h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2 * (h - n_head_log2) + 1);
}

static inline void ggml_cuda_mad(half2 & acc, const half2 v, const half2 u) {
    acc += v * u;
}

static inline void ggml_cuda_mad(float & acc, const half2 v, const half2 u) {
    const float2 p = __half22float2(v * u);
    acc += p.x + p.y;
}
