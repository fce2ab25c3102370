#pragma once

// Instances of the decode kernel for a pair of types: all head sizes, and all numbers of columns of a block.

#include "decode-mma.cuh"
#include "decode-pairs.cuh"
#include "decode.cuh"

template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static turbo_decode_kernels turbo_attn_decode_instance() {
    return { turbo_attn_decode_kernel<DK, DV, type_K, type_V, n_cols>, turbo_attn_merge_parts<DV>, n_cols, nullptr };
}

#ifdef TURBO_MMA
template <int DK, int DV, ggml_type type_K, ggml_type type_V>
static turbo_decode_kernels turbo_attn_decode_mma_columns(const int n_columns) {
    const auto widest = turbo_attn_decode_mma_kernel<DK, DV, type_K, type_V, 16>;
    if (n_columns <= 8) {
        return { turbo_attn_decode_mma_kernel<DK, DV, type_K, type_V, 8>, turbo_attn_merge_parts<DV>, 8, widest };
    }
    return { widest, turbo_attn_merge_parts<DV>, 16, widest };
}
#endif  // TURBO_MMA

// n_columns: query heads of a KV head, times queries
template <int DK, int DV, ggml_type type_K, ggml_type type_V>
static turbo_decode_kernels turbo_attn_decode_columns(const int n_columns) {
    if (n_columns <= 2) {
        return turbo_attn_decode_instance<DK, DV, type_K, type_V, 2>();
    }
    if constexpr (DV <= 256) {
        if (n_columns > 4) {
            return turbo_attn_decode_instance<DK, DV, type_K, type_V, 8>();
        }
    }
    return turbo_attn_decode_instance<DK, DV, type_K, type_V, 4>();
}

// A turbo_attn_decode_t.
template <ggml_type type_K, ggml_type type_V>
static turbo_decode_kernels turbo_attn_decode(const int DK, const int DV, const int n_columns, const bool mma) {
#ifdef TURBO_MMA
#    define TURBO_MMA_HEAD_SIZE(K, V)                                                  \
        if constexpr (turbo_is_decode_mma(type_K, type_V, K, V)) {                     \
            if (mma && DK == K && DV == V) {                                           \
                return turbo_attn_decode_mma_columns<K, V, type_K, type_V>(n_columns); \
            }                                                                          \
        }
    GGML_TURBO_HEAD_SIZES_X(TURBO_MMA_HEAD_SIZE)
#    undef TURBO_MMA_HEAD_SIZE
#else
    GGML_UNUSED(mma);
#endif  // TURBO_MMA
#define TURBO_HEAD_SIZE(K, V)                                                                   \
    if constexpr (K % turbo_block_values(type_K) == 0 && V % turbo_block_values(type_V) == 0) { \
        if (DK == K && DV == V) {                                                               \
            return turbo_attn_decode_columns<K, V, type_K, type_V>(n_columns);                  \
        }                                                                                       \
    }
    GGML_TURBO_HEAD_SIZES_X(TURBO_HEAD_SIZE)
#undef TURBO_HEAD_SIZE
    GGML_ABORT("head sizes %d/%d", DK, DV);
}

template <ggml_type type_K, ggml_type type_V> static turbo_attn_decode_t turbo_attn_decode_or_null() {
    if constexpr (turbo_is_decode_pair(type_K, type_V)) {
        return turbo_attn_decode<type_K, type_V>;
    } else {
        return nullptr;
    }
}

template <ggml_type type_K> turbo_attn_decode_t ggml_cuda_turbo_decode_pair(const ggml_type type_v) {
    switch (type_v) {
#define TURBO_DECODE_V(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                               \
        return turbo_attn_decode_or_null<type_K, GGML_TYPE_##ENUM>();
        TURBO_DECODE_TYPES_X(TURBO_DECODE_V)
#undef TURBO_DECODE_V
        default:
            return nullptr;
    }
}

// All that a file turbo-attn-decode-*.cu has. K: as in GGML_TYPE_##K
#define TURBO_DECODE_INSTANCES(K) \
    template turbo_attn_decode_t ggml_cuda_turbo_decode_pair<GGML_TYPE_##K>(ggml_type type_v)
