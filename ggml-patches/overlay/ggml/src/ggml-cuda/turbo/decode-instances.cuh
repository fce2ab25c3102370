#pragma once

// Instances of the decode kernel for a pair of types: all head sizes, and all numbers of columns of a block.

#include "decode-pairs.cuh"
#include "decode.cuh"

template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static turbo_decode_kernels turbo_attn_decode_instance() {
    return { turbo_attn_decode_kernel<DK, DV, type_K, type_V, n_cols>, turbo_attn_merge_parts<DV>, n_cols, nullptr };
}

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

template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_pair(const int DK, const int DV, const int n_columns) {
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

// K, V: as in GGML_TYPE_##K
#define TURBO_DECODE_INSTANCE(K, V)                                                                         \
    template turbo_decode_kernels ggml_cuda_turbo_decode_pair<GGML_TYPE_##K, GGML_TYPE_##V>(int DK, int DV, \
                                                                                            int n_columns)
