#pragma once

// simd.h for AVX2 with FMA and F16C; AVX-VNNI if there is. Included by it.

#include "../scalar-avx2.h"

namespace {

constexpr int LANES     = 8;
constexpr int GEMM_ROWS = 6;
constexpr int GEMM_VECS = 2;

using vf = __m256;
using vi = __m256i;

//
// floats
//

inline vf splat(float x) {
    return _mm256_set1_ps(x);
}

inline vf load(const float * p) {
    return _mm256_loadu_ps(p);
}

inline void store(float * p, vf x) {
    _mm256_storeu_ps(p, x);
}

inline vf load_half(const ggml_half * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

inline vf add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}

inline vf sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}

inline vf mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}

inline vf div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}

inline vf fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}

inline vf max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}

inline vf min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}

inline vf round(vf a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline vf select_gt(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

inline vf pow2_scale(vf x, vf n) {
    const vi exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

template <int D> inline vf butterfly(vf x) {
    constexpr int upper = D == 1 ? 0xaa : D == 2 ? 0xcc : 0xf0;
    const vf      other = D == 1 ? _mm256_permute_ps(x, 0xb1) :
                          D == 2 ? _mm256_permute_ps(x, 0x4e) :
                                   _mm256_permute2f128_ps(x, x, 0x01);
    return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), upper);
}

inline float max_lane(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float sum_lanes(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline void store_sums(float * p, const vf * x) {
    const vf s = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

//
// integers
//

inline vi as_int(vf x) {
    return _mm256_castps_si256(x);
}

inline vi max_i32(vi a, vi b) {
    return _mm256_max_epi32(a, b);
}

inline vi load_u16(const uint16_t * p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
}

inline vi add_i32(vi a, vi b) {
    return _mm256_add_epi32(a, b);
}

inline vi sub_i32(vi a, vi b) {
    return _mm256_sub_epi32(a, b);
}

inline vi min_u32(vi a, vi b) {
    return _mm256_min_epu32(a, b);
}

inline vi splat_i32(int32_t x) {
    return _mm256_set1_epi32(x);
}

inline vi load_i32(const int32_t * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

inline void store_i32(int32_t * p, vi x) {
    _mm256_storeu_si256((__m256i *) p, x);
}

inline vi splat_i8(int8_t x) {
    return _mm256_set1_epi8(x);
}

inline vf to_float(vi x) {
    return _mm256_cvtepi32_ps(x);
}

inline vf as_float(vi x) {
    return _mm256_castsi256_ps(x);
}

#if defined(__AVXVNNI__)

constexpr const char * SIMD_NAME  = "avx2-vnni";
constexpr int          LEVEL_BIAS = 128;

constexpr bool HAS_DOT_PAIRS = true;

inline vi bias_levels(vi x) {
    return _mm256_xor_si256(x, splat_i8((int8_t) 0x80));
}

inline vi dot(vi acc, vi k, vi q) {
    return _mm256_dpbusd_avx_epi32(acc, k, q);
}

inline vi dot_pairs(vi acc, vi a, vi b) {
    return _mm256_dpwssd_avx_epi32(acc, a, b);
}

#else

constexpr const char * SIMD_NAME  = "avx2";
constexpr int          LEVEL_BIAS = 0;

constexpr bool HAS_DOT_PAIRS = TURBO_TEST_PAIRS;  // two instructions for what takes as many with floats

inline vi bias_levels(vi x) {
    return x;
}

// Pair sums are at most 2 * 128 * 127: no saturation.
inline vi dot(vi acc, vi k, vi q) {
    const vi pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(k), _mm256_sign_epi8(q, k));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline vi dot_pairs(vi acc, vi a, vi b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

#endif

inline vi lookup_table(const int8_t * p) {
    return bias_levels(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)));
}

// Indices are 0 .. 15.
inline vi lookup(vi table, vi index) {
    return _mm256_shuffle_epi8(table, index);
}

inline vi bit_and(vi a, vi b) {
    return _mm256_and_si256(a, b);
}

inline vi bit_or(vi a, vi b) {
    return _mm256_or_si256(a, b);
}

inline vi bit_xor(vi a, vi b) {
    return _mm256_xor_si256(a, b);
}

inline vi bit_select(vi mask, vi a, vi b) {
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

template <int N> inline vi shift_right(vi x) {
    if constexpr (N >= 0) {
        return _mm256_srli_epi32(x, N);
    } else {
        return _mm256_slli_epi32(x, -N);
    }
}

//
// words: 2 * LANES int16, lane i has words 2i and 2i + 1
//

inline vi load_words16(const int16_t * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

inline void store_words16(int16_t * p, vi x) {
    _mm256_storeu_si256((__m256i *) p, x);
}

inline vi splat_i16(int16_t x) {
    return _mm256_set1_epi16(x);
}

inline vi swap_words(vi x) {
    const __m128i other = _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(other));
}

inline vi add_i16(vi a, vi b) {
    return _mm256_add_epi16(a, b);
}

inline vi sub_i16(vi a, vi b) {
    return _mm256_sub_epi16(a, b);
}

inline vi sub_u16(vi a, vi b) {
    return _mm256_subs_epu16(a, b);
}

inline vi min_u16(vi a, vi b) {
    return _mm256_min_epu16(a, b);
}

inline vi abs_i16(vi x) {
    return _mm256_abs_epi16(x);
}

template <int N> inline vi shift_left_i16(vi x) {
    return _mm256_slli_epi16(x, N);
}

inline vi select_eq_i16(vi a, vi b, vi x, vi y) {
    return _mm256_blendv_epi8(y, x, _mm256_cmpeq_epi16(a, b));
}

inline vi count_gt_i16(vi n, vi a, vi b) {
    return _mm256_sub_epi16(n, _mm256_cmpgt_epi16(a, b));
}

inline vi lookup_words(const int16_t * table, vi index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table)), index);
}

inline vi spread_bits(uint32_t bits, vi x) {
    const vi bit = _mm256_setr_epi16(1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 10,
                                     1 << 11, 1 << 12, 1 << 13, 1 << 14, (int16_t) (1 << 15));
    return _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(splat_i16((int16_t) bits), bit), bit), x);
}

inline uint32_t gather_bits(vi x, int bit) {
    const vi      signs = _mm256_sll_epi16(x, _mm_cvtsi32_si128(15 - bit));
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(signs), _mm256_extracti128_si256(signs, 1));
    return (uint32_t) _mm_movemask_epi8(bytes);
}

template <int N> struct wide_table {
    vi x[N / 16];
};

template <int N> inline wide_table<N> make_wide_table(const level_table & levels) {
    wide_table<N> table;
    for (int i = 0; i < N / 16; ++i) {
        table.x[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels.x + i));
    }
    return table;
}

// A byte of the second part where bit BIT of the index is set: bit 7 of a byte decides, what moves into its low bits does not.
template <int BIT> inline vi select_part(vi index, vi first, vi second) {
    return _mm256_blendv_epi8(first, second, _mm256_slli_epi16(index, 7 - BIT));
}

template <int N> inline vi lookup_wide(const wide_table<N> & table, vi index) {
    vi part[N / 16];
    for (int i = 0; i < N / 16; ++i) {
        part[i] = _mm256_shuffle_epi8(table.x[i], index);
    }
    if constexpr (N == 16) {
        return part[0];
    } else if constexpr (N == 32) {
        return select_part<4>(index, part[0], part[1]);
    } else {
        return select_part<5>(index, select_part<4>(index, part[0], part[1]), select_part<4>(index, part[2], part[3]));
    }
}

inline vi to_pairs(vf even, vf odd) {
    return _mm256_blend_epi16(_mm256_cvtps_epi32(even), _mm256_slli_epi32(_mm256_cvtps_epi32(odd), 16), 0xaa);
}

inline void store_i16(int16_t * p, vf x) {
    const vi i = _mm256_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *) p, _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}

//
// transposed loads
//

template <int N> inline __m128i load_row(const char * p) {
    if constexpr (N == 4) {
        return _mm_loadu_si128((const __m128i *) p);
    } else if constexpr (N == 3) {
        return _mm_maskload_epi32((const int *) p, _mm_setr_epi32(-1, -1, -1, 0));
    } else {
        return _mm_loadl_epi64((const __m128i *) p);
    }
}

// Lane l of the i-th vector of rows is row 4l + i, so that transposing within lanes leaves the rows in order.
template <int N, class F> TURBO_INLINE void gather_words(vi * w, F row) {
    if constexpr (N > 4) {
        gather_words<4>(w, row);
        gather_words<N - 4>(w + 4, [&](int i) { return row(i) + 16; });
    } else {
        vi r[4];
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_row<N>(row(i))), load_row<N>(row(4 + i)), 1);
        }
        const vi lo01 = _mm256_unpacklo_epi32(r[0], r[1]);
        const vi lo23 = _mm256_unpacklo_epi32(r[2], r[3]);
        w[0]          = _mm256_unpacklo_epi64(lo01, lo23);
        w[1]          = _mm256_unpackhi_epi64(lo01, lo23);
        if constexpr (N > 2) {
            const vi hi01 = _mm256_unpackhi_epi32(r[0], r[1]);
            const vi hi23 = _mm256_unpackhi_epi32(r[2], r[3]);
            w[2]          = _mm256_unpacklo_epi64(hi01, hi23);
            if constexpr (N > 3) {
                w[3] = _mm256_unpackhi_epi64(hi01, hi23);
            }
        }
    }
}

template <int N> inline void load_words(vi * w, const char * p, size_t stride) {
    gather_words<N>(w, [=](int i) { return p + i * stride; });
}

//
// blocks as floats
//

inline void levels_to_float(vi levels, float scale, vf * y) {
    const vf      d   = splat(scale);
    const __m128i low = _mm256_castsi256_si128(levels), high = _mm256_extracti128_si256(levels, 1);
    y[0] = mul(d, to_float(_mm256_cvtepi8_epi32(low)));
    y[1] = mul(d, to_float(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8))));
    y[2] = mul(d, to_float(_mm256_cvtepi8_epi32(high)));
    y[3] = mul(d, to_float(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8))));
}

inline void unpack(const block_turbo2_0 & x, vf * y) {
    levels_to_float(levels_turbo2(&x), _cvtsh_ss(x.d), y);
}

inline void unpack(const block_turbo3_0 & x, vf * y) {
    levels_to_float(levels_turbo3(&x), _cvtsh_ss(x.d), y);
}

inline void unpack(const block_turbo4_0 & x, vf * y) {
    levels_to_float(levels_turbo4(&x), _cvtsh_ss(x.d), y);
}

inline void unpack(const block_q8_0 & x, vf * y) {
    levels_to_float(_mm256_loadu_si256((const __m256i *) x.qs), _cvtsh_ss(x.d), y);
}

inline void unpack(const block_q4_0 & x, vf * y) {
    levels_to_float(_mm256_sub_epi8(expand_4bit(x.qs), splat_i8(8)), _cvtsh_ss(x.d), y);
}

// Half of a block of a trellis type; four values to a dword, as in its words
template <int BITS, int HALF> inline void unpack(const trellis_half<BITS, HALF> & x, vf * y) {
    const trellis_path w    = trellis_unpack_block(BITS, x.bytes);
    const vi           j    = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto         bits = [&](uint64_t word, int at) {
        const vi shifted = _mm256_srlv_epi32(splat_i32((int32_t) (word >> 32 * HALF)), j);
        return _mm256_slli_epi32(bit_and(shifted, splat_i8(1)), at);
    };
    vi index = splat_i32((int32_t) (trellis_spread(w.selectors >> 4 * HALF) << (BITS + 1)));
    index    = bit_or(index, bits(trellis_high_subset_bits(w.coded), 1));
    index    = bit_or(index, bits(trellis_low_subset_bits(w.coded), 0));
    if constexpr (BITS >= 3) {
        const vi low =
            _mm256_srlv_epi32(_mm256_set1_epi64x((int64_t) w.low[HALF]), _mm256_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6));
        index = bit_or(index, _mm256_slli_epi32(bit_and(low, splat_i8(3)), 2));
    }
    if constexpr (BITS != 3) {
        index = bit_or(index, bits(w.high, BITS == 2 ? 2 : 4));
    }
    levels_to_float(lookup_wide(make_wide_table<4 << BITS>(TRELLIS_LEVELS<BITS, 0>), index),
                    trellis_scale_of(x.bytes[0]) / TRELLIS_LEVEL_STEPS, y);
}

}  // namespace
