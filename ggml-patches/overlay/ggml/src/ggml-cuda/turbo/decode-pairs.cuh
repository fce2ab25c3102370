#pragma once

// Which kernels of decode attention are compiled: see turbo/list.h for the lists.

#include "attn-args.cuh"
#include "mma.cuh"
#include "wmma.cuh"

// The kernel for one head size, which takes n_cols columns in a block, and the one that merges the parts it leaves. widest: the kernel for
// the most columns, where keys are split as for it whatever the columns are; else null.
struct turbo_decode_kernels {
    void (*decode)(turbo_attn_args args);
    void (*merge)(const float * parts, const float2 * meta, float * dst, int n_parts);
    int n_cols;
    void (*widest)(turbo_attn_args args);
};

// The kernels of one pair of types for a head size that ggml_cuda_turbo_flash_attn_supported lets pass, and for so many columns.
typedef turbo_decode_kernels (*turbo_attn_decode_t)(int DK, int DV, int n_columns);

// Those of a pair for which turbo_is_decode_pair is true. Instances: turbo-attn-decode-*.cu
template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_pair(int DK, int DV, int n_columns);

// The same with matrix instructions, for a pair and a head size for which turbo_is_decode_mma is true. Instances: turbo-attn-decode-mma-*.cu
template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_mma_pair(int DK, int DV, int n_columns);

// Types of K, and of V.
#define TURBO_DECODE_TYPES_X(X)   \
    GGML_TURBO_TYPES_X(X)         \
    X(Q8_0, q8_0, q8_0, OTHER, 8) \
    X(F16, f16, f16, OTHER, 16)

#ifdef GGML_TURBO_CUDA_ALL_PAIRS
static constexpr bool TURBO_ALL_PAIRS = true;
#else
static constexpr bool TURBO_ALL_PAIRS = false;
#endif  // GGML_TURBO_CUDA_ALL_PAIRS

// Whether a pair of these types is compiled.
static constexpr bool turbo_is_decode_pair(const ggml_type type_k, const ggml_type type_v) {
#define TURBO_IS_PAIR(K, V) || (type_k == GGML_TYPE_##K && type_v == GGML_TYPE_##V)
    return (TURBO_ALL_PAIRS && (turbo_is_turbo(type_k) || turbo_is_turbo(type_v)))
        GGML_TURBO_DECODE_PAIRS_X(TURBO_IS_PAIR);
#undef TURBO_IS_PAIR
}

// Whether a pair that is compiled has kernels with matrix instructions for some head size, and for this one.
static constexpr bool turbo_has_decode_mma(const ggml_type type_k, const ggml_type type_v) {
#if defined(TURBO_MMA) || defined(TURBO_WMMA)
    return turbo_is_decode_pair(type_k, type_v);
#else
    return GGML_UNUSED(type_k), GGML_UNUSED(type_v), false;
#endif  // defined(TURBO_MMA) || defined(TURBO_WMMA)
}

// Rows of 256 values of q8_0 would need more than 48 KiB of shared memory.
static constexpr bool turbo_is_decode_mma(const ggml_type type_k, const ggml_type type_v, const int DK, const int DV) {
    const bool q8_0 = type_k == GGML_TYPE_Q8_0 || type_v == GGML_TYPE_Q8_0;
    return turbo_has_decode_mma(type_k, type_v) && DK == DV && (DK == 64 || DK == 128 || (DK == 256 && !q8_0));
}
