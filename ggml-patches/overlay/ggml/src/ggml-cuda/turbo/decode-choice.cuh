#pragma once

// Which family of decode kernels a GPU takes, where a pair of types has both: with matrix instructions, or without.

#include "ggml-cuda/common.cuh"
#include "turbo/env.h"
#include "wmma.cuh"

#include <cstring>

// GGML_TURBO_CUDA_DECODE, for comparison: "dp4a" for the kernels without matrix instructions everywhere, "mma" for those with them wherever
// the GPU has them.
enum turbo_decode_choice { TURBO_DECODE_DP4A, TURBO_DECODE_FASTEST, TURBO_DECODE_MMA };

static inline turbo_decode_choice turbo_decode_wanted() {
    const char * env = ggml_turbo_getenv("GGML_TURBO_CUDA_DECODE", "GGML_TURBO_CUDA_DECODE", false);
    return env == nullptr           ? TURBO_DECODE_FASTEST :
           strcmp(env, "dp4a") == 0 ? TURBO_DECODE_DP4A :
           strcmp(env, "mma") == 0  ? TURBO_DECODE_MMA :
                                      TURBO_DECODE_FASTEST;
}

// RDNA3 multiplies matrices at the rate of its dot products, and all 16 columns count: up to 8 are faster without (1,720 cycles for a tile of
// turbo3 instead of 1,890; 3,450 instead of 2,040 for 16). Where there are more heads in a group, a token is decoded in one way.
static constexpr int TURBO_RDNA3_DP4A_COLUMNS = 8;

// n_columns: query heads of a KV head, times queries
static inline bool turbo_decode_prefers_mma(const int cc, const int n_columns) {
    static const turbo_decode_choice wanted = turbo_decode_wanted();
    if (wanted == TURBO_DECODE_DP4A) {
        return false;
    }
    if (GGML_CUDA_CC_IS_RDNA3(cc)) {
        return wanted == TURBO_DECODE_MMA || n_columns > TURBO_RDNA3_DP4A_COLUMNS;
    }
    return GGML_CUDA_CC_IS_RDNA4(cc) || GGML_CUDA_CC_IS_CDNA3(cc) || ampere_mma_available(cc);
}

// Whether the sums of a head are few enough for each warp to have tiles of its own.
static inline bool turbo_decode_suits_warp(const int cc, const int DV) {
    return !GGML_CUDA_CC_IS_RDNA3(cc) || DV <= TURBO_RDNA3_MAX_DV;
}
