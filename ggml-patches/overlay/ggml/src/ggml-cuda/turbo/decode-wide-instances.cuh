#pragma once

// Instances of the decode kernels for wide heads for a pair of types: their head sizes, and both numbers of columns of a block. Nothing where
// turbo_is_decode_wide is false throughout.

#include "decode-mma-wide.cuh"
#include "decode-wmma-wide.cuh"

#if defined(TURBO_MMA) || defined(TURBO_WMMA)

#    ifdef TURBO_WMMA
#        define TURBO_DECODE_WIDE_KERNEL turbo_attn_decode_wmma_wide_kernel
#    else
#        define TURBO_DECODE_WIDE_KERNEL turbo_attn_decode_mma_wide_kernel
#    endif  // TURBO_WMMA

// Most columns of a block.
template <int DK, int DV, ggml_type type_K, ggml_type type_V> static constexpr int turbo_decode_wide_max_columns() {
#    ifdef TURBO_MMA
    return turbo_mma_wide_shape<DK, DV, type_K, type_V, 16>::fits ? 16 : 8;
#    else
    return 16;
#    endif  // TURBO_MMA
}

template <int DK, int DV, ggml_type type_K, ggml_type type_V>
static turbo_decode_kernels turbo_attn_decode_wide_columns(const int n_columns) {
    constexpr int max    = turbo_decode_wide_max_columns<DK, DV, type_K, type_V>();
    const auto    merge  = turbo_attn_merge_parts<DV>;
    const auto    widest = TURBO_DECODE_WIDE_KERNEL<DK, DV, type_K, type_V, max>;
    if (n_columns > 8) {
        return { widest, merge, max, widest };
    }
    return { TURBO_DECODE_WIDE_KERNEL<DK, DV, type_K, type_V, 8>, merge, 8, widest };
}

template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_wide_pair(const int DK, const int DV, const int n_columns) {
#    define TURBO_HEAD_SIZE(K, V)                                                       \
        if constexpr (turbo_is_decode_wide(type_K, type_V, K, V)) {                     \
            if (DK == K && DV == V) {                                                   \
                return turbo_attn_decode_wide_columns<K, V, type_K, type_V>(n_columns); \
            }                                                                           \
        }
    GGML_TURBO_HEAD_SIZES_X(TURBO_HEAD_SIZE)
#    undef TURBO_HEAD_SIZE
    GGML_UNUSED(n_columns);
    GGML_ABORT("head sizes %d/%d", DK, DV);
}

// K, V: as in GGML_TYPE_##K
#    define TURBO_DECODE_WIDE_INSTANCE(K, V)                                                                         \
        template turbo_decode_kernels ggml_cuda_turbo_decode_wide_pair<GGML_TYPE_##K, GGML_TYPE_##V>(int DK, int DV, \
                                                                                                     int n_columns)

#else
#    define TURBO_DECODE_WIDE_INSTANCE(K, V) static_assert(true, "no matrix instructions")
#endif  // defined(TURBO_MMA) || defined(TURBO_WMMA)
