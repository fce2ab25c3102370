#pragma once

// AVX2 building blocks of turbo.c: look-up of levels, integer dot product of a block, encoder of a block.

#include "ggml-turbo-impl.h"
#include "simd-mappings.h"

#include <immintrin.h>
#include <string.h>

//
// decoder
//

// 8 bytes of 2-bit indices -> 32 bytes in the order of the values
TURBO_INLINE __m256i expand_2bit(const uint8_t * qs) {
    int64_t packed;
    memcpy(&packed, qs, sizeof(packed));
    const __m256i shifted = _mm256_srlv_epi64(_mm256_set1_epi64x(packed), _mm256_setr_epi64x(0, 2, 4, 6));
    return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

// Sign bits of turbo3 -> 4 where the bit is set, in the order of the values: bit i of each byte belongs to the i-th dword
TURBO_INLINE __m256i expand_signs(const uint8_t * signs) {
    int32_t packed;
    memcpy(&packed, signs, sizeof(packed));
    const __m256i bit    = _mm256_setr_epi32(0x01010101, 0x02020202, 0x04040404, 0x08080808, 0x10101010, 0x20202020,
                                             0x40404040, (int32_t) 0x80808080);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_set1_epi32(packed), bit), bit);
    return _mm256_and_si256(is_set, _mm256_set1_epi8(4));
}

// 16 bytes of 4-bit indices -> 32 bytes in the order of the values
TURBO_INLINE __m256i expand_4bit(const uint8_t * qs) {
    const __m128i packed = _mm_loadu_si128((const __m128i *) qs);
    const __m256i both   = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// Level of each value. pshufb looks up within a lane of 16 bytes, so the table is there twice.
TURBO_INLINE __m256i levels_turbo2(const block_turbo2_0 * x) {
    const __m128i table = _mm_setr_epi8(TURBO2_CODEBOOK, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), expand_2bit(x->qs));
}

TURBO_INLINE __m256i levels_turbo3(const block_turbo3_0 * x) {
    const __m128i table = _mm_setr_epi8(TURBO3_CODEBOOK, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i index = _mm256_or_si256(expand_2bit(x->qs), expand_signs(x->signs));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
}

TURBO_INLINE __m256i levels_turbo4(const block_turbo4_0 * x) {
    const __m128i table = _mm_setr_epi8(TURBO4_CODEBOOK);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), expand_4bit(x->qs));
}

//
// dot product
//

// Eight partial sums of a block. Pair sums of |level| * (+-y) are at most 2 * 104 * 127 and do not saturate.
TURBO_INLINE __m256i dot_levels(__m256i levels, const int8_t * y) {
    const __m256i q         = _mm256_loadu_si256((const __m256i *) y);
    const __m256i magnitude = _mm256_abs_epi8(levels);
    const __m256i signed_q  = _mm256_sign_epi8(q, levels);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, signed_q);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), magnitude, signed_q);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_q), _mm256_set1_epi16(1));
#endif
}

// Four vectors -> the sum of each
TURBO_INLINE __m128i sums_of_four(const __m256i * v) {
    const __m256i lanes = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}

//
// encoder: the arithmetic of ggml-turbo.c; equal bits are a test
//

// A block as integers. Within t[0..1] and in the bytes of `negative` the values have the order that packs leaves:
// 0-3 8-11 (16-19 24-27) 4-7 12-15 (20-23 28-31).
typedef struct {
    __m256i t[2];
    __m256i negative;  // 0xff where the sign bit is set
    float   unit;
} turbo_ints_avx2;

TURBO_INLINE uint32_t max_of_eight(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m         = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m         = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return (uint32_t) _mm_cvtsi128_si32(m);
}

// False for a block without integers: *special is then its d.
TURBO_INLINE bool block_to_ints_avx2(const float * x, turbo_ints_avx2 * b, ggml_half * special) {
    __m256i raw[4];
    __m256i magnitude[4];
    for (int i = 0; i < 4; ++i) {
        raw[i]       = _mm256_loadu_si256((const __m256i *) (x + 8 * i));
        magnitude[i] = _mm256_and_si256(raw[i], _mm256_set1_epi32(0x7fffffff));
    }
    uint32_t max = max_of_eight(
        _mm256_max_epi32(_mm256_max_epi32(magnitude[0], magnitude[1]), _mm256_max_epi32(magnitude[2], magnitude[3])));
    if (max > 0x7f800000) {
        *special = TURBO_HALF_NAN;
        return false;
    }
    max = max < 0x7f7fffff ? max : 0x7f7fffff;
    float amax;
    memcpy(&amax, &max, sizeof(amax));
    if (amax < TURBO_AMAX_MIN) {
        *special = 0;
        return false;
    }

    b->unit            = amax / (float) TURBO_T_MAX;
    const __m256 scale = _mm256_set1_ps((float) TURBO_T_MAX / amax);
    __m256i      t[4];
    for (int i = 0; i < 4; ++i) {
        const __m256i finite = _mm256_min_epi32(magnitude[i], _mm256_set1_epi32(0x7f7fffff));
        t[i]                 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(finite), scale));
    }
    b->t[0]     = _mm256_packs_epi32(t[0], t[1]);
    b->t[1]     = _mm256_packs_epi32(t[2], t[3]);
    b->negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), _mm256_packs_epi16(_mm256_packs_epi32(raw[0], raw[1]),
                                                                               _mm256_packs_epi32(raw[2], raw[3])));
    return true;
}

TURBO_INLINE __m256i magnitude_indices(const int16_t * thresholds, int n, const __m256i * t) {
    __m256i m0 = _mm256_setzero_si256();
    __m256i m1 = _mm256_setzero_si256();
    for (int k = 0; k < n - 1; ++k) {
        const __m256i threshold = _mm256_set1_epi16(thresholds[k]);
        m0                      = _mm256_sub_epi16(m0, _mm256_cmpgt_epi16(t[0], threshold));
        m1                      = _mm256_sub_epi16(m1, _mm256_cmpgt_epi16(t[1], threshold));
    }
    return _mm256_packs_epi16(m0, m1);
}

// Index of the largest of four gains <t,c>^2 / |c|^2, the first of equals
TURBO_INLINE int best_of_four(__m128i tc, __m128i cc) {
    const __m128 ftc  = _mm_cvtepi32_ps(tc);
    const __m128 gain = _mm_div_ps(_mm_mul_ps(ftc, ftc), _mm_cvtepi32_ps(cc));
    __m128       max  = _mm_max_ps(gain, _mm_shuffle_ps(gain, gain, _MM_SHUFFLE(1, 0, 3, 2)));
    max               = _mm_max_ps(max, _mm_shuffle_ps(max, max, _MM_SHUFFLE(2, 3, 0, 1)));
    const int is_max  = _mm_movemask_ps(_mm_cmpeq_ps(gain, max));
    return (is_max & 1) ? 0 : (is_max & 2) ? 1 : (is_max & 4) ? 2 : 3;
}

TURBO_INLINE int32_t sum_of_squares(const __m256i * t) {
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(t[0], t[0]), _mm256_madd_epi16(t[1], t[1]));
    __m128i       s   = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s                 = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s                 = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
}

// Encodes one block: writes d, returns the indices in the order of the values. n: magnitudes, half of the codebook;
// magnitudes: as bytes; thresholds: one row per step, n - 1 numbers each.
TURBO_INLINE __m256i encode_block_avx2(int                   n,
                                       __m128i               magnitudes,
                                       const int16_t *       thresholds,
                                       enum ggml_turbo_scale scale,
                                       const float *         x,
                                       ggml_half *           d) {
    turbo_ints_avx2 b;
    if (!block_to_ints_avx2(x, &b, d)) {
        return _mm256_setzero_si256();
    }

    __m256i m[4];
    __m256i tc[4];
    __m256i cc[4];
    for (int step = 0; step < 4; ++step) {
        m[step]          = magnitude_indices(thresholds + step * (n - 1), n, b.t);
        const __m256i c  = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(magnitudes), m[step]);
        const __m256i c0 = _mm256_unpacklo_epi8(c, _mm256_setzero_si256());
        const __m256i c1 = _mm256_unpackhi_epi8(c, _mm256_setzero_si256());
        tc[step]         = _mm256_add_epi32(_mm256_madd_epi16(b.t[0], c0), _mm256_madd_epi16(b.t[1], c1));
        cc[step]         = _mm256_add_epi32(_mm256_madd_epi16(c0, c0), _mm256_madd_epi16(c1, c1));
    }
    int32_t       tcs[4];
    int32_t       ccs[4];
    const __m128i tc4 = sums_of_four(tc);
    const __m128i cc4 = sums_of_four(cc);
    _mm_storeu_si128((__m128i *) tcs, tc4);
    _mm_storeu_si128((__m128i *) ccs, cc4);
    const int best = best_of_four(tc4, cc4);

    const int32_t tt = scale == GGML_TURBO_SCALE_LEAST_SQUARES ? 0 : sum_of_squares(b.t);
    *d               = GGML_CPU_FP32_TO_FP16(turbo_block_scale(scale, tcs[best], ccs[best], tt, b.unit));
    if (*d == 0) {
        return _mm256_setzero_si256();
    }

    // n + m for the positive half; for the negative half n - 1 - m, which is n + m with all bits flipped
    const __m256i flip  = _mm256_and_si256(b.negative, _mm256_set1_epi8((char) (2 * n - 1)));
    const __m256i index = _mm256_xor_si256(_mm256_or_si256(m[best], _mm256_set1_epi8((char) n)), flip);
    return _mm256_permutevar8x32_epi32(index, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

TURBO_INLINE void pack_2bit_avx2(__m256i index, uint8_t * qs) {
    const __m256i low     = _mm256_and_si256(index, _mm256_set1_epi8(3));
    const __m256i shifted = _mm256_sllv_epi64(low, _mm256_setr_epi64x(0, 2, 4, 6));
    const __m128i half    = _mm_or_si128(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    _mm_storel_epi64((__m128i *) qs, _mm_or_si128(half, _mm_srli_si128(half, 8)));
}

// movemask takes bits in the order of bytes: bring the values k, k + 4 .. k + 28 of signs[k] together.
TURBO_INLINE void pack_signs_avx2(__m256i index, uint8_t * signs) {
    const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i lanes     = _mm256_shuffle_epi8(index, _mm256_broadcastsi128_si256(transpose));
    const __m256i ordered   = _mm256_permutevar8x32_epi32(lanes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const int     bits      = _mm256_movemask_epi8(_mm256_slli_epi16(ordered, 5));
    memcpy(signs, &bits, QK_TURBO / 8);
}

TURBO_INLINE void pack_4bit_avx2(__m256i index, uint8_t * qs) {
    const __m128i high = _mm_slli_epi16(_mm256_extracti128_si256(index, 1), 4);
    _mm_storeu_si128((__m128i *) qs, _mm_or_si128(_mm256_castsi256_si128(index), high));
}
