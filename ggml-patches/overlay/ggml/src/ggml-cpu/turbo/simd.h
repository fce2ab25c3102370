#pragma once

// The vectors that attention over turbo types is written in: one header per instruction set, the same names in each.
//
//     LANES          floats of a vector; a vector of integers has as many dwords, or four times as many bytes
//     GEMM_ROWS      rows and
//     GEMM_VECS      vectors per row of the accumulators that fit in registers
//     LEVEL_BIAS     what levels(), lookup() tables and dot() add to the levels of keys: 128 where dot() wants them unsigned
//
//     dot(acc, k, q)              per lane: acc + four levels times four bytes of q
//     lookup_wide<N>(table, index)  bytes of a wide_table of N: 16, 32 or 64
//     gather_words<N>(w, row)     dword j of the row at row(i) goes to lane i of w[j]
//     load_words<N>(w, p, stride) the same for rows at p + i * stride
//     unpack(x, y)                one block of 32 values as floats
//     select_gt(a, b, x, y)       a > b ? x : y, so y where a or b is NaN
//     store_sums(p, x)            p[i] is the sum of the lanes of x[i], for four vectors
//     butterfly<D>(x)             lane i has x[i] + x[i + D] where bit D of i is clear, else x[i - D] - x[i]
//     pow2_scale(x, n)            x * 2^n for n that are whole and not below -126
//     dot_pairs(acc, a, b)        per lane: acc + two products of int16; HAS_DOT_PAIRS where that is faster than floats
//     to_pairs(even, odd)         rounds: lane i has both values i
//     sub_u16(a, b)               saturates
//     select_eq_i16(a, b, x, y)   a == b ? x : y
//     count_gt_i16(n, a, b)       a > b ? n + 1 : n
//     lookup_words(table, index)  of 8 words; the bytes of an index are 2i and 2i + 1, as 0x0100 | i * 0x0202
//     spread_bits(bits, x)        words of x where bits are set, else 0
//     gather_bits(x, bit)         a bit of each word
//
// Everything is in an anonymous namespace: a build with several CPU variants compiles this once for each.

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trellis-params.h"

#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#    define TURBO_INLINE static __forceinline
#else
#    define TURBO_INLINE static inline __attribute__((always_inline))
#endif

// A test can have pairs where they are not faster.
#if !defined(TURBO_TEST_PAIRS)
#    define TURBO_TEST_PAIRS false
#endif

// TURBO_SIMD_256: no wider vectors
#if defined(TURBO_SIMD_GENERIC)
#    include "simd/generic.h"
#elif !defined(TURBO_SIMD_256) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#    include "simd/avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    include "simd/avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#    include "simd/neon.h"
#else
#    include "simd/generic.h"
#endif

namespace {

inline void prefetch_l2(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
    __asm__ volatile("");  // GCC 12 leaves out calls of functions that do nothing but prefetch.
#else
    (void) p;
#endif
}

// The same four bytes in all lanes
inline vi splat_bytes4(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return splat_i32(x);
}

}  // namespace
