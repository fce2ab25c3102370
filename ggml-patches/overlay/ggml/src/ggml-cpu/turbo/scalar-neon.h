#pragma once

// NEON building blocks of turbo.c, which says what each is for; with the dot products of ARMv8.2 if there are any. turbo-avx2.h has the
// same.

#include "simd-mappings.h"
#include "turbo/scalar-impl.h"

#include <arm_neon.h>
#include <string.h>

typedef uint8x16x2_t simd_bytes;  // one byte for each value
typedef int32x4_t    simd_sums;   // four partial sums
typedef int32x4_t    simd_four;

//
// levels
//

TURBO_INLINE simd_bytes lookup(const int8_t * table, simd_bytes index) {
    const uint8x16_t t = vreinterpretq_u8_s8(vld1q_s8(table));
    index.val[0]       = vqtbl1q_u8(t, index.val[0]);
    index.val[1]       = vqtbl1q_u8(t, index.val[1]);
    return index;
}

TURBO_INLINE simd_bytes expand_2bit(const uint8_t * qs) {
    const uint8x8_t  q      = vld1_u8(qs);
    const uint8x16_t packed = vcombine_u8(q, vshr_n_u8(q, 2));
    simd_bytes       index;
    index.val[0] = vandq_u8(packed, vdupq_n_u8(3));
    index.val[1] = vandq_u8(vshrq_n_u8(packed, 4), vdupq_n_u8(3));
    return index;
}

TURBO_INLINE simd_bytes levels_turbo2(const block_turbo2_0 * x) {
    static const int8_t codebook[16] = { TURBO2_0_CODEBOOK };
    return lookup(codebook, expand_2bit(x->qs));
}

// Bit i of each byte of the signs belongs to the i-th dword: move it to bit 2, the high bit of the index.
TURBO_INLINE simd_bytes levels_turbo3(const block_turbo3_0 * x) {
    static const int8_t codebook[16] = { TURBO3_0_CODEBOOK };
    static const int8_t shift[2][16] = {
        { 2,  2,  2,  2,  1,  1,  1,  1,  0,  0,  0,  0,  -1, -1, -1, -1 },
        { -2, -2, -2, -2, -3, -3, -3, -3, -4, -4, -4, -4, -5, -5, -5, -5 },
    };
    uint32_t signs;
    memcpy(&signs, x->signs, sizeof(signs));
    const uint8x16_t s     = vreinterpretq_u8_u32(vdupq_n_u32(signs));
    simd_bytes       index = expand_2bit(x->qs);
    for (int i = 0; i < 2; ++i) {
        index.val[i] = vorrq_u8(index.val[i], vandq_u8(vshlq_u8(s, vld1q_s8(shift[i])), vdupq_n_u8(4)));
    }
    return lookup(codebook, index);
}

TURBO_INLINE simd_bytes levels_turbo4(const block_turbo4_0 * x) {
    static const int8_t codebook[16] = { TURBO4_0_CODEBOOK };
    const uint8x16_t    q            = vld1q_u8(x->qs);
    simd_bytes          index;
    index.val[0] = vandq_u8(q, vdupq_n_u8(15));
    index.val[1] = vshrq_n_u8(q, 4);
    return lookup(codebook, index);
}

//
// dot product
//

// Of int8. Sums of two products are at most 2 * 104 * 127 and fit in int16.
TURBO_INLINE simd_sums dot_bytes(simd_bytes a, simd_bytes b) {
    const int8x16_t a0 = vreinterpretq_s8_u8(a.val[0]), a1 = vreinterpretq_s8_u8(a.val[1]);
    const int8x16_t b0 = vreinterpretq_s8_u8(b.val[0]), b1 = vreinterpretq_s8_u8(b.val[1]);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), a0, b0), a1, b1);
#else
    const int16x8_t low  = vmlal_s8(vmull_high_s8(a0, b0), vget_low_s8(a0), vget_low_s8(b0));
    const int16x8_t high = vmlal_s8(vmull_high_s8(a1, b1), vget_low_s8(a1), vget_low_s8(b1));
    return vpadalq_s16(vpaddlq_s16(low), high);
#endif
}

TURBO_INLINE simd_sums dot_levels(simd_bytes levels, const int8_t * y) {
    simd_bytes q;
    q.val[0] = vreinterpretq_u8_s8(vld1q_s8(y));
    q.val[1] = vreinterpretq_u8_s8(vld1q_s8(y + 16));
    return dot_bytes(levels, q);
}

TURBO_INLINE simd_four sums_of_four(const simd_sums * v) {
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

TURBO_INLINE void add_products(double * acc, const float * d, simd_four sums) {
    const float32x4_t d4   = vld1q_f32(d);
    const float64x2_t low  = vcvtq_f64_s64(vmovl_s32(vget_low_s32(sums)));
    const float64x2_t high = vcvtq_f64_s64(vmovl_high_s32(sums));
    vst1q_f64(acc, vfmaq_f64(vld1q_f64(acc), vcvt_f64_f32(vget_low_f32(d4)), low));
    vst1q_f64(acc + 2, vfmaq_f64(vld1q_f64(acc + 2), vcvt_high_f64_f32(d4), high));
}

//
// encoder
//

typedef struct {
    int16x8_t  t[4];
    simd_bytes negative;  // 0xff where the sign bit is set
} simd_ints;

TURBO_INLINE uint32x4_t bits_of_four(const float * x) {
    return vreinterpretq_u32_f32(vld1q_f32(x));
}

TURBO_INLINE uint32x4_t magnitude_bits(const float * x) {
    return vandq_u32(bits_of_four(x), vdupq_n_u32(0x7fffffff));
}

TURBO_INLINE uint32_t max_magnitude_bits(const float * x) {
    uint32x4_t max = magnitude_bits(x);
    for (int i = 4; i < QK_SCALAR; i += 4) {
        max = vmaxq_u32(max, magnitude_bits(x + i));
    }
    return vmaxvq_u32(max);
}

TURBO_INLINE int16x4_t four_to_ints(const float * x, float scale) {
    const float32x4_t finite = vreinterpretq_f32_u32(vminq_u32(magnitude_bits(x), vdupq_n_u32(TURBO_FLT_MAX_BITS)));
    return vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(finite, scale)));
}

// High halves of eight values
TURBO_INLINE uint8x16_t high_halves(const float * x) {
    const uint16x8_t low  = vreinterpretq_u16_u32(bits_of_four(x));
    const uint16x8_t high = vreinterpretq_u16_u32(bits_of_four(x + 4));
    return vreinterpretq_u8_u16(vuzp2q_u16(low, high));
}

TURBO_INLINE simd_ints simd_block_to_ints(const float * x, float scale) {
    simd_ints b;
    for (int i = 0; i < 4; ++i) {
        b.t[i] = vcombine_s16(four_to_ints(x + 8 * i, scale), four_to_ints(x + 8 * i + 4, scale));
    }
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t top = vuzp2q_u8(high_halves(x + 16 * i), high_halves(x + 16 * i + 8));
        b.negative.val[i]    = vcltzq_s8(vreinterpretq_s8_u8(top));
    }
    return b;
}

TURBO_INLINE simd_bytes magnitude_indices(const int16_t * thresholds, int n, const simd_ints * b) {
    uint16x8_t m[4];
    for (int i = 0; i < 4; ++i) {
        m[i] = vdupq_n_u16(0);
        for (int k = 0; k < n - 1; ++k) {
            m[i] = vsubq_u16(m[i], vcgtq_s16(b->t[i], vdupq_n_s16(thresholds[k])));
        }
    }
    simd_bytes bytes;
    bytes.val[0] = vcombine_u8(vmovn_u16(m[0]), vmovn_u16(m[1]));
    bytes.val[1] = vcombine_u8(vmovn_u16(m[2]), vmovn_u16(m[3]));
    return bytes;
}

TURBO_INLINE void fit_sums(const int8_t *    magnitudes,
                           simd_bytes        m,
                           const simd_ints * b,
                           simd_sums *       tc,
                           simd_sums *       cc) {
    const simd_bytes c   = lookup(magnitudes, m);
    int32x4_t        sum = vdupq_n_s32(0);
    for (int i = 0; i < 4; ++i) {
        const uint8x16_t half = c.val[i / 2];
        const int16x8_t  ci   = vreinterpretq_s16_u16(vmovl_u8(i % 2 ? vget_high_u8(half) : vget_low_u8(half)));
        sum                   = vmlal_s16(sum, vget_low_s16(b->t[i]), vget_low_s16(ci));
        sum                   = vmlal_high_s16(sum, b->t[i], ci);
    }
    *tc = sum;
    *cc = dot_bytes(c, c);
}

TURBO_INLINE void store_four(int32_t * p, simd_four v) {
    vst1q_s32(p, v);
}

TURBO_INLINE int best_of_four(simd_four tc, simd_four cc) {
    static const uint32_t step[4] = { 0, 1, 2, 3 };
    const float32x4_t     ftc     = vcvtq_f32_s32(tc);
    const float32x4_t     gain    = vdivq_f32(vmulq_f32(ftc, ftc), vcvtq_f32_s32(cc));
    const uint32x4_t      is_max  = vceqq_f32(gain, vdupq_n_f32(vmaxvq_f32(gain)));
    return (int) vminvq_u32(vornq_u32(vld1q_u32(step), is_max));
}

TURBO_INLINE int32_t sum_of_squares(const simd_ints * b) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < 4; ++i) {
        sum = vmlal_s16(sum, vget_low_s16(b->t[i]), vget_low_s16(b->t[i]));
        sum = vmlal_high_s16(sum, b->t[i], b->t[i]);
    }
    return vaddvq_s32(sum);
}

TURBO_INLINE simd_bytes signed_indices(simd_bytes m, int n, const simd_ints * b) {
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t flip = vandq_u8(b->negative.val[i], vdupq_n_u8((uint8_t) (2 * n - 1)));
        m.val[i]              = veorq_u8(vorrq_u8(m.val[i], vdupq_n_u8((uint8_t) n)), flip);
    }
    return m;
}

TURBO_INLINE void pack_2bit(simd_bytes index, uint8_t * qs) {
    const uint8x16_t low   = vandq_u8(index.val[0], vdupq_n_u8(3));
    const uint8x16_t high  = vandq_u8(index.val[1], vdupq_n_u8(3));
    const uint8x16_t pairs = vsliq_n_u8(low, high, 4);
    vst1_u8(qs, vorr_u8(vget_low_u8(pairs), vshl_n_u8(vget_high_u8(pairs), 2)));
}

// The high bits of the i-th dword become bits i of its bytes; then no two dwords have a bit in common, and their sum is all of them.
TURBO_INLINE void pack_signs(simd_bytes index, uint8_t * signs) {
    static const int8_t shift[16] = { 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3 };
    const uint8x16_t    bits      = vsliq_n_u8(vshrq_n_u8(index.val[0], 2), vshrq_n_u8(index.val[1], 2), 4);
    const uint32_t      all       = vaddvq_u32(vreinterpretq_u32_u8(vshlq_u8(bits, vld1q_s8(shift))));
    memcpy(signs, &all, sizeof(all));
}

TURBO_INLINE void pack_4bit(simd_bytes index, uint8_t * qs) {
    vst1q_u8(qs, vsliq_n_u8(index.val[0], index.val[1], 4));
}
