#pragma once

// Instances of the decode kernel with matrix instructions for a pair of types: its head sizes, and both numbers of columns of a block.
// Nothing where turbo_is_decode_mma is false throughout.

#include "decode-mma.cuh"
#include "decode-pairs.cuh"
#include "decode-wmma.cuh"

#if defined(TURBO_MMA) || defined(TURBO_WMMA)

#    ifdef TURBO_WMMA
#        define TURBO_DECODE_MMA_KERNEL turbo_attn_decode_wmma_kernel
#    else
#        define TURBO_DECODE_MMA_KERNEL turbo_attn_decode_mma_kernel
#    endif  // TURBO_WMMA

// Most columns of a block. At head size 256, sums of 16 columns and f16 as K, or turbo2t or turbo4t as V, are more than 255 registers.
template <int DV, ggml_type type_K, ggml_type type_V> static constexpr int turbo_decode_mma_max_columns() {
#    ifdef TURBO_MMA
    return DV > 128 && (type_K == GGML_TYPE_F16 || turbo_mma_is_large<type_V>()) ? 8 : 16;
#    else
    return 16;
#    endif  // TURBO_MMA
}

template <int DK, int DV, ggml_type type_K, ggml_type type_V>
static turbo_decode_kernels turbo_attn_decode_mma_columns(const int n_columns) {
    constexpr int max    = turbo_decode_mma_max_columns<DV, type_K, type_V>();
    const auto    merge  = turbo_attn_merge_parts<DV>;
    const auto    widest = TURBO_DECODE_MMA_KERNEL<DK, DV, type_K, type_V, max>;
    if (n_columns > 8) {
        return { widest, merge, max, widest };
    }
    return { TURBO_DECODE_MMA_KERNEL<DK, DV, type_K, type_V, 8>, merge, 8, widest };
}

template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_mma_pair(const int DK, const int DV, const int n_columns) {
#    define TURBO_HEAD_SIZE(K, V)                                                      \
        if constexpr (turbo_is_decode_mma(type_K, type_V, K, V)) {                     \
            if (DK == K && DV == V) {                                                  \
                return turbo_attn_decode_mma_columns<K, V, type_K, type_V>(n_columns); \
            }                                                                          \
        }
    GGML_TURBO_HEAD_SIZES_X(TURBO_HEAD_SIZE)
#    undef TURBO_HEAD_SIZE
    GGML_UNUSED(n_columns);
    GGML_ABORT("head sizes %d/%d", DK, DV);
}

// K, V: as in GGML_TYPE_##K
#    define TURBO_DECODE_MMA_INSTANCE(K, V)                                                                         \
        template turbo_decode_kernels ggml_cuda_turbo_decode_mma_pair<GGML_TYPE_##K, GGML_TYPE_##V>(int DK, int DV, \
                                                                                                    int n_columns)

#else
#    define TURBO_DECODE_MMA_INSTANCE(K, V) static_assert(true, "no matrix instructions")
#endif  // defined(TURBO_MMA) || defined(TURBO_WMMA)
