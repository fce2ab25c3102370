#pragma once

// simd.h for AVX-512 with VNNI. Included by it.

#include <immintrin.h>

// GCC 12 sees the undefined operands of its own intrinsics (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace {

constexpr const char * SIMD_NAME = "avx512-vnni";

constexpr int LANES      = 16;
constexpr int GEMM_ROWS  = 12;
constexpr int GEMM_VECS  = 2;
constexpr int LEVEL_BIAS = 128;

using vf = __m512;
using vi = __m512i;

//
// floats
//

inline vf splat(float x) {
    return _mm512_set1_ps(x);
}

inline vf load(const float * p) {
    return _mm512_loadu_ps(p);
}

inline void store(float * p, vf x) {
    _mm512_storeu_ps(p, x);
}

inline vf load_half(const ggml_half * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

inline vf add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}

inline vf sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}

inline vf mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}

inline vf div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}

inline vf fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}

inline vf max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}

inline vf min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}

inline vf round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline vf pow2_scale(vf x, vf n) {
    return _mm512_scalef_ps(x, n);
}

inline vf select_gt(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

template <int D> inline vf butterfly(vf x) {
    constexpr __mmask16 upper = D == 1 ? 0xaaaa : D == 2 ? 0xcccc : D == 4 ? 0xf0f0 : 0xff00;
    const vf            other = D == 1 ? _mm512_permute_ps(x, 0xb1) :
                                D == 2 ? _mm512_permute_ps(x, 0x4e) :
                                D == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1) :
                                         _mm512_shuffle_f32x4(x, x, 0x4e);
    return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

inline float max_lane(vf a) {
    return _mm512_reduce_max_ps(a);
}

inline float sum_lanes(vf a) {
    return _mm512_reduce_add_ps(a);
}

// Lanes 0, 1 and 2, 3 of each four: sums of neighbours of a, then of b
inline vf add_neighbours(vf a, vf b) {
    return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

inline void store_sums(float * p, const vf * x) {
    const vf     fours  = add_neighbours(add_neighbours(x[0], x[1]), add_neighbours(x[2], x[3]));
    const __m256 eights = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(eights), _mm256_extractf128_ps(eights, 1)));
}

//
// integers
//

inline vi as_int(vf x) {
    return _mm512_castps_si512(x);
}

inline vi max_i32(vi a, vi b) {
    return _mm512_max_epi32(a, b);
}

inline vi splat_i32(int32_t x) {
    return _mm512_set1_epi32(x);
}

inline vi load_i32(const int32_t * p) {
    return _mm512_loadu_si512(p);
}

inline void store_i32(int32_t * p, vi x) {
    _mm512_storeu_si512(p, x);
}

inline vi splat_i8(int8_t x) {
    return _mm512_set1_epi8(x);
}

inline vf to_float(vi x) {
    return _mm512_cvtepi32_ps(x);
}

inline vf as_float(vi x) {
    return _mm512_castsi512_ps(x);
}

inline vi load_u16(const uint16_t * p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p));
}

inline vi dot(vi acc, vi k, vi q) {
    return _mm512_dpbusd_epi32(acc, k, q);
}

inline vi bias_levels(vi x) {
    return _mm512_xor_si512(x, splat_i8((int8_t) 0x80));
}

inline vi lookup_table(const int8_t * p) {
    return bias_levels(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)));
}

// Indices are 0 .. 15.
inline vi lookup(vi table, vi index) {
    return _mm512_shuffle_epi8(table, index);
}

inline vi bit_and(vi a, vi b) {
    return _mm512_and_si512(a, b);
}

inline vi bit_or(vi a, vi b) {
    return _mm512_or_si512(a, b);
}

inline vi bit_xor(vi a, vi b) {
    return _mm512_xor_si512(a, b);
}

inline vi bit_select(vi mask, vi a, vi b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

template <int N> inline vi shift_right(vi x) {
    if constexpr (N >= 0) {
        return _mm512_srli_epi32(x, N);
    } else {
        return _mm512_slli_epi32(x, -N);
    }
}

#if defined(__AVX512VBMI__)

template <int N> struct wide_table {
    vi x;
};

template <int N> inline wide_table<N> make_wide_table(const level_table & levels) {
    return { _mm512_loadu_si512(levels.x) };
}

template <int N> inline vi lookup_wide(const wide_table<N> & table, vi index) {
    return _mm512_permutexvar_epi8(index, table.x);
}

#else

template <int N> struct wide_table {
    vi x[N / 16];
};

template <int N> inline wide_table<N> make_wide_table(const level_table & levels) {
    wide_table<N> table;
    for (int i = 0; i < N / 16; ++i) {
        table.x[i] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) levels.x + i));
    }
    return table;
}

template <int N> inline vi lookup_wide(const wide_table<N> & table, vi index) {
    vi res = _mm512_shuffle_epi8(table.x[0], index);
    for (int i = 1; i < N / 16; ++i) {
        const vi high = bit_and(index, splat_i8(0x30));
        res = _mm512_mask_shuffle_epi8(res, _mm512_cmpeq_epi8_mask(high, splat_i8(16 * i)), table.x[i], index);
    }
    return res;
}

#endif

//
// pairs of int16
//

constexpr bool HAS_DOT_PAIRS = true;

// With the intrinsic, GCC 12 copies and spills the accumulators: 36 ms instead of 28 for 128 queries and 2,048 keys.
inline vi dot_pairs(vi acc, vi a, vi b) {
#if defined(__GNUC__)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#else
    return _mm512_dpwssd_epi32(acc, a, b);
#endif
}

inline vi to_pairs(vf even, vf odd) {
    const vi high = _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtps_epi32(even), high);
}

inline void store_i16(int16_t * p, vf x) {
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

//
// transposed loads
//

template <int N> inline __m128i load_row(const char * p) {
    if constexpr (N == 4) {
        return _mm_loadu_si128((const __m128i *) p);
    } else {
        return _mm_maskz_loadu_epi32((1 << N) - 1, p);
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
            r[i] = _mm512_castsi128_si512(load_row<N>(row(i)));
            r[i] = _mm512_inserti32x4(r[i], load_row<N>(row(4 + i)), 1);
            r[i] = _mm512_inserti32x4(r[i], load_row<N>(row(8 + i)), 2);
            r[i] = _mm512_inserti32x4(r[i], load_row<N>(row(12 + i)), 3);
        }
        const vi lo01 = _mm512_unpacklo_epi32(r[0], r[1]);
        const vi lo23 = _mm512_unpacklo_epi32(r[2], r[3]);
        w[0]          = _mm512_unpacklo_epi64(lo01, lo23);
        w[1]          = _mm512_unpackhi_epi64(lo01, lo23);
        if constexpr (N > 2) {
            const vi hi01 = _mm512_unpackhi_epi32(r[0], r[1]);
            const vi hi23 = _mm512_unpackhi_epi32(r[2], r[3]);
            w[2]          = _mm512_unpacklo_epi64(hi01, hi23);
            if constexpr (N > 3) {
                w[3] = _mm512_unpackhi_epi64(hi01, hi23);
            }
        }
    }
}

template <int N> inline void load_words(vi * w, const char * p, size_t stride) {
    gather_words<N>(w, [=](int i) { return p + i * stride; });
}

//
// blocks as floats: an index in each dword, and a table of floats. vpermps looks at the low four bits of an index only.
//

inline vf splat_half(ggml_half d) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((int16_t) d));
}

// 8 bytes twice, as dwords: values 8p + j of pair p / 2 need bits 2p of byte j
inline vi bytes_twice(const uint8_t * qs) {
    int64_t x;
    memcpy(&x, qs, sizeof(x));
    return _mm512_cvtepu8_epi32(_mm_set1_epi64x(x));
}

inline vi shift_pair(vi x, int even, int odd) {
    return _mm512_srlv_epi32(x, _mm512_inserti64x4(splat_i32(even), _mm256_set1_epi32(odd), 1));
}

inline void unpack(const block_turbo2_0 & x, vf * y) {
    static constexpr float table[] = { TURBO2_0_CODEBOOK, TURBO2_0_CODEBOOK, TURBO2_0_CODEBOOK, TURBO2_0_CODEBOOK };

    const vf dt = mul(load(table), splat_half(x.d));
    const vi q  = bytes_twice(x.qs);
    y[0]        = _mm512_permutexvar_ps(shift_pair(q, 0, 2), dt);
    y[1]        = _mm512_permutexvar_ps(shift_pair(q, 4, 6), dt);
}

// Bit i / 4 of byte i % 4 of the signs is the high bit of index i: rotate it to bit 2.
inline void unpack(const block_turbo3_0 & x, vf * y) {
    static constexpr float table[] = { TURBO3_0_CODEBOOK, TURBO3_0_CODEBOOK };

    const vi to = _mm512_setr_epi32(30, 6, 14, 22, 31, 7, 15, 23, 0, 8, 16, 24, 1, 9, 17, 25);
    const vf dt = mul(load(table), splat_half(x.d));
    const vi q  = bytes_twice(x.qs);
    int32_t  signs;
    memcpy(&signs, x.signs, sizeof(signs));
    const vi s    = _mm512_rorv_epi32(splat_i32(signs), to);
    const vi high = splat_i32(4);
    y[0]          = _mm512_permutexvar_ps(bit_select(high, s, shift_pair(q, 0, 2)), dt);
    y[1]          = _mm512_permutexvar_ps(bit_select(high, _mm512_srli_epi32(s, 4), shift_pair(q, 4, 6)), dt);
}

inline void unpack_nibbles(const float * table, ggml_half d, const uint8_t * qs, vf * y) {
    const vf dt = mul(load(table), splat_half(d));
    const vi q  = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) qs));
    y[0]        = _mm512_permutexvar_ps(q, dt);
    y[1]        = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), dt);
}

inline void unpack(const block_turbo4_0 & x, vf * y) {
    static constexpr float table[] = { TURBO4_0_CODEBOOK };
    unpack_nibbles(table, x.d, x.qs, y);
}

inline void unpack(const block_q8_0 & x, vf * y) {
    const vf d = splat_half(x.d);
    for (int i = 0; i < 2; ++i) {
        y[i] = mul(d, to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x.qs + i))));
    }
}

inline void unpack(const block_q4_0 & x, vf * y) {
    static constexpr float table[] = { -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7 };
    unpack_nibbles(table, x.d, x.qs, y);
}

// Half of a block of a trellis type; four values to a dword, as in its words
template <int BITS, int HALF> inline void unpack(const trellis_half<BITS, HALF> & x, vf * y) {
    const trellis_path w    = trellis_unpack_block(BITS, x.bytes);
    const __m256i      j    = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i      ones = _mm256_set1_epi8(1);
    const auto         bits = [&](uint64_t word, int at) {
        const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32((int32_t) (word >> 32 * HALF)), j);
        return _mm256_slli_epi32(_mm256_and_si256(shifted, ones), at);
    };
    __m256i index = _mm256_set1_epi32((int32_t) (trellis_spread(w.selectors >> 4 * HALF) << (BITS + 1)));
    index         = _mm256_or_si256(index, bits(trellis_high_subset_bits(w.coded), 1));
    index         = _mm256_or_si256(index, bits(trellis_low_subset_bits(w.coded), 0));
    if constexpr (BITS >= 3) {
        const __m256i low =
            _mm256_srlv_epi32(_mm256_set1_epi64x((int64_t) w.low[HALF]), _mm256_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6));
        index = _mm256_or_si256(index, _mm256_slli_epi32(_mm256_and_si256(low, _mm256_set1_epi8(3)), 2));
    }
    if constexpr (BITS != 3) {
        index = _mm256_or_si256(index, bits(w.high, BITS == 2 ? 2 : 4));
    }
    const vi levels = lookup_wide(make_wide_table<4 << BITS>(TRELLIS_LEVELS<BITS, 0>), _mm512_castsi256_si512(index));
    const vf d      = splat(trellis_scale_of(x.bytes[0]) / TRELLIS_LEVEL_STEPS);
    for (int i = 0; i < 2; ++i) {
        const __m128i four_dwords = i == 0 ? _mm512_castsi512_si128(levels) : _mm512_extracti32x4_epi32(levels, 1);
        y[i]                      = mul(d, to_float(_mm512_cvtepi8_epi32(four_dwords)));
    }
}

}  // namespace
