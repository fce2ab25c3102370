#pragma once

// The vectors that attention over turbo types is written in: one header per instruction set, the same names in each.
//
//     LANES          floats of a vector; a vector of integers has as many dwords, or four times as many bytes
//     GEMM_ROWS      rows and
//     GEMM_VECS      vectors per row of the accumulators that fit in registers
//     LEVEL_BIAS     what levels(), lookup() tables and dot() add to the levels of keys: 128 where dot() wants them unsigned
//
//     dot(acc, k, q)              per lane: acc + four levels times four bytes of q
//     load_words<N>(w, p, stride) dword j of the row at p + i * stride goes to lane i of w[j]
//     decode(x, y)                one block of 32 values as floats
//     select_gt(a, b, x, y)       a > b ? x : y, so y where a or b is NaN
//     butterfly<D>(x)             lane i has x[i] + x[i + D] where bit D of i is clear, else x[i - D] - x[i]
//     pow2_scale(x, n)            x * 2^n for n that are whole and not below -126
//     dot_pairs(acc, a, b)        per lane: acc + two products of int16; HAS_DOT_PAIRS where that is faster than floats
//     to_pairs(even, odd)         rounds: lane i has both values i
//
// Everything is in an anonymous namespace: a build with several CPU variants compiles this once for each.

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "turbo.h"

#include <cstdint>
#include <cstring>

// A test can have pairs where they are not faster.
#if !defined(TURBO_TEST_PAIRS)
#    define TURBO_TEST_PAIRS false
#endif

#if defined(TURBO_SIMD_GENERIC)
#    include "turbo-simd-generic.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#    include "turbo-simd-avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    include "turbo-simd-avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#    include "turbo-simd-neon.h"
#else
#    include "turbo-simd-generic.h"
#endif

namespace {

inline void prefetch_l2(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
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
