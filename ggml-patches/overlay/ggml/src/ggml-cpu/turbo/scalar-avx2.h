#pragma once

// AVX2 building blocks of turbo.c, which says what each is for. turbo-neon.h has the same.

#include "simd-mappings.h"
#include "turbo/scalar-impl.h"

#include <immintrin.h>
#include <string.h>

typedef __m256i simd_bytes;  // one byte for each value
typedef __m256i simd_sums;   // eight partial sums
typedef __m128i simd_four;   // int32

//
// levels
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
TURBO_INLINE simd_bytes levels_turbo2(const block_turbo2_0 * x) {
    const __m128i table = _mm_setr_epi8(TURBO2_0_CODEBOOK, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), expand_2bit(x->qs));
}

TURBO_INLINE simd_bytes levels_turbo3(const block_turbo3_0 * x) {
    const __m128i table = _mm_setr_epi8(TURBO3_0_CODEBOOK, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i index = _mm256_or_si256(expand_2bit(x->qs), expand_signs(x->signs));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
}

TURBO_INLINE simd_bytes levels_turbo4(const block_turbo4_0 * x) {
    const __m128i table = _mm_setr_epi8(TURBO4_0_CODEBOOK);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), expand_4bit(x->qs));
}

//
// dot product
//

// Pair sums of |level| * (+-y) are at most 2 * 104 * 127 and do not saturate.
TURBO_INLINE simd_sums dot_levels(simd_bytes levels, const int8_t * y) {
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

TURBO_INLINE simd_four sums_of_four(const simd_sums * v) {
    const __m256i lanes = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}

TURBO_INLINE void add_products(double * acc, const float * d, simd_four sums) {
    const __m256d product = _mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(d)), _mm256_cvtepi32_pd(sums));
    _mm256_storeu_pd(acc, _mm256_add_pd(_mm256_loadu_pd(acc), product));
}

//
// encoder
//

// Within t[0..1] and in the bytes of `negative` the values have the order that packs leaves:
// 0-3 8-11 (16-19 24-27) 4-7 12-15 (20-23 28-31).
typedef struct {
    __m256i t[2];
    __m256i negative;  // 0xff where the sign bit is set
} simd_ints;

TURBO_INLINE __m256i magnitude_bits(const float * x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *) x), _mm256_set1_epi32(0x7fffffff));
}

TURBO_INLINE uint32_t max_magnitude_bits(const float * x) {
    const __m256i v = _mm256_max_epi32(_mm256_max_epi32(magnitude_bits(x), magnitude_bits(x + 8)),
                                       _mm256_max_epi32(magnitude_bits(x + 16), magnitude_bits(x + 24)));
    __m128i       m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m               = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m               = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return (uint32_t) _mm_cvtsi128_si32(m);
}

TURBO_INLINE simd_ints simd_block_to_ints(const float * x, float scale) {
    __m256i raw[4];
    __m256i t[4];
    for (int i = 0; i < 4; ++i) {
        raw[i]               = _mm256_loadu_si256((const __m256i *) (x + 8 * i));
        const __m256i finite = _mm256_min_epi32(magnitude_bits(x + 8 * i), _mm256_set1_epi32(TURBO_FLT_MAX_BITS));
        t[i]                 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(finite), _mm256_set1_ps(scale)));
    }
    simd_ints b;
    b.t[0]     = _mm256_packs_epi32(t[0], t[1]);
    b.t[1]     = _mm256_packs_epi32(t[2], t[3]);
    b.negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), _mm256_packs_epi16(_mm256_packs_epi32(raw[0], raw[1]),
                                                                              _mm256_packs_epi32(raw[2], raw[3])));
    return b;
}

TURBO_INLINE simd_bytes magnitude_indices(const int16_t * thresholds, int n, const simd_ints * b) {
    __m256i m0 = _mm256_setzero_si256();
    __m256i m1 = _mm256_setzero_si256();
    for (int k = 0; k < n - 1; ++k) {
        const __m256i threshold = _mm256_set1_epi16(thresholds[k]);
        m0                      = _mm256_sub_epi16(m0, _mm256_cmpgt_epi16(b->t[0], threshold));
        m1                      = _mm256_sub_epi16(m1, _mm256_cmpgt_epi16(b->t[1], threshold));
    }
    return _mm256_packs_epi16(m0, m1);
}

TURBO_INLINE void fit_sums(const int8_t *    magnitudes,
                           simd_bytes        m,
                           const simd_ints * b,
                           simd_sums *       tc,
                           simd_sums *       cc) {
    const __m128i table = _mm_loadu_si128((const __m128i *) magnitudes);
    const __m256i c     = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), m);
    const __m256i c0    = _mm256_unpacklo_epi8(c, _mm256_setzero_si256());
    const __m256i c1    = _mm256_unpackhi_epi8(c, _mm256_setzero_si256());
    *tc                 = _mm256_add_epi32(_mm256_madd_epi16(b->t[0], c0), _mm256_madd_epi16(b->t[1], c1));
    *cc                 = _mm256_add_epi32(_mm256_madd_epi16(c0, c0), _mm256_madd_epi16(c1, c1));
}

TURBO_INLINE void store_four(int32_t * p, simd_four v) {
    _mm_storeu_si128((__m128i *) p, v);
}

TURBO_INLINE int best_of_four(simd_four tc, simd_four cc) {
    const __m128 ftc  = _mm_cvtepi32_ps(tc);
    const __m128 gain = _mm_div_ps(_mm_mul_ps(ftc, ftc), _mm_cvtepi32_ps(cc));
    __m128       max  = _mm_max_ps(gain, _mm_shuffle_ps(gain, gain, _MM_SHUFFLE(1, 0, 3, 2)));
    max               = _mm_max_ps(max, _mm_shuffle_ps(max, max, _MM_SHUFFLE(2, 3, 0, 1)));
    const int is_max  = _mm_movemask_ps(_mm_cmpeq_ps(gain, max));
    return (is_max & 1) ? 0 : (is_max & 2) ? 1 : (is_max & 4) ? 2 : 3;
}

TURBO_INLINE int32_t sum_of_squares(const simd_ints * b) {
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(b->t[0], b->t[0]), _mm256_madd_epi16(b->t[1], b->t[1]));
    __m128i       s   = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s                 = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s                 = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
}

TURBO_INLINE simd_bytes signed_indices(simd_bytes m, int n, const simd_ints * b) {
    const __m256i flip  = _mm256_and_si256(b->negative, _mm256_set1_epi8((char) (2 * n - 1)));
    const __m256i index = _mm256_xor_si256(_mm256_or_si256(m, _mm256_set1_epi8((char) n)), flip);
    return _mm256_permutevar8x32_epi32(index, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

TURBO_INLINE void pack_2bit(simd_bytes index, uint8_t * qs) {
    const __m256i low     = _mm256_and_si256(index, _mm256_set1_epi8(3));
    const __m256i shifted = _mm256_sllv_epi64(low, _mm256_setr_epi64x(0, 2, 4, 6));
    const __m128i half    = _mm_or_si128(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    _mm_storel_epi64((__m128i *) qs, _mm_or_si128(half, _mm_srli_si128(half, 8)));
}

// movemask takes bits in the order of bytes: bring the values k, k + 4 .. k + 28 of signs[k] together.
TURBO_INLINE void pack_signs(simd_bytes index, uint8_t * signs) {
    const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i lanes     = _mm256_shuffle_epi8(index, _mm256_broadcastsi128_si256(transpose));
    const __m256i ordered   = _mm256_permutevar8x32_epi32(lanes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const int     bits      = _mm256_movemask_epi8(_mm256_slli_epi16(ordered, 5));
    memcpy(signs, &bits, QK_SCALAR / 8);
}

TURBO_INLINE void pack_4bit(simd_bytes index, uint8_t * qs) {
    const __m128i high = _mm_slli_epi16(_mm256_extracti128_si256(index, 1), 4);
    _mm_storeu_si128((__m128i *) qs, _mm_or_si128(_mm256_castsi256_si128(index), high));
}
