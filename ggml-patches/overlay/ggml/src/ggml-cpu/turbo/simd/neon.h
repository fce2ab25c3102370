#pragma once

// simd.h for NEON with the dot products of ARMv8.2. Included by it.

#include <arm_neon.h>

namespace {

constexpr const char * SIMD_NAME = "neon-dotprod";

constexpr int LANES      = 4;
constexpr int GEMM_ROWS  = 6;
constexpr int GEMM_VECS  = 4;
constexpr int LEVEL_BIAS = 0;

constexpr bool HAS_DOT_PAIRS = TURBO_TEST_PAIRS;  // more instructions than with floats

using vf = float32x4_t;
using vi = int32x4_t;

//
// floats
//

inline vf splat(float x) {
    return vdupq_n_f32(x);
}

inline vf load(const float * p) {
    return vld1q_f32(p);
}

inline void store(float * p, vf x) {
    vst1q_f32(p, x);
}

inline vf load_half(const ggml_half * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

inline vf add(vf a, vf b) {
    return vaddq_f32(a, b);
}

inline vf sub(vf a, vf b) {
    return vsubq_f32(a, b);
}

inline vf mul(vf a, vf b) {
    return vmulq_f32(a, b);
}

inline vf div(vf a, vf b) {
    return vdivq_f32(a, b);
}

inline vf fma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}

inline vf max(vf a, vf b) {
    return vmaxq_f32(a, b);
}

inline vf min(vf a, vf b) {
    return vminq_f32(a, b);
}

inline vf round(vf a) {
    return vrndnq_f32(a);
}

inline vf select_gt(vf a, vf b, vf x, vf y) {
    return vbslq_f32(vcgtq_f32(a, b), x, y);
}

template <int D> inline vf butterfly(vf x) {
    static const uint32_t upper[2][4] = {
        { 0, ~0u, 0,   ~0u },
        { 0, 0,   ~0u, ~0u }
    };
    const vf other = D == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
    return vbslq_f32(vld1q_u32(upper[D - 1]), vsubq_f32(other, x), vaddq_f32(x, other));
}

inline float max_lane(vf a) {
    return vmaxvq_f32(a);
}

inline float sum_lanes(vf a) {
    return vaddvq_f32(a);
}

inline void store_sums(float * p, const vf * x) {
    store(p, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
}

inline vf pow2_scale(vf x, vf n) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return mul(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}

//
// integers
//

inline vi as_int(vf x) {
    return vreinterpretq_s32_f32(x);
}

inline vi max_i32(vi a, vi b) {
    return vmaxq_s32(a, b);
}

inline vi add_i32(vi a, vi b) {
    return vaddq_s32(a, b);
}

inline vi sub_i32(vi a, vi b) {
    return vsubq_s32(a, b);
}

inline vi min_u32(vi a, vi b) {
    return vreinterpretq_s32_u32(vminq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
}

inline vi load_u16(const uint16_t * p) {
    return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p)));
}

inline vi splat_i32(int32_t x) {
    return vdupq_n_s32(x);
}

inline vi load_i32(const int32_t * p) {
    return vld1q_s32(p);
}

inline void store_i32(int32_t * p, vi x) {
    vst1q_s32(p, x);
}

inline vi splat_i8(int8_t x) {
    return vreinterpretq_s32_s8(vdupq_n_s8(x));
}

inline vf to_float(vi x) {
    return vcvtq_f32_s32(x);
}

inline vi bias_levels(vi x) {
    return x;
}

inline vf as_float(vi x) {
    return vreinterpretq_f32_s32(x);
}

inline vi dot(vi acc, vi k, vi q) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(k), vreinterpretq_s8_s32(q));
}

inline int8x16_t lookup_table(const int8_t * p) {
    return vld1q_s8(p);
}

inline vi lookup(int8x16_t table, vi index) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(table, vreinterpretq_u8_s32(index)));
}

inline vi bit_and(vi a, vi b) {
    return vandq_s32(a, b);
}

inline vi bit_or(vi a, vi b) {
    return vorrq_s32(a, b);
}

inline vi bit_xor(vi a, vi b) {
    return veorq_s32(a, b);
}

inline vi bit_select(vi mask, vi a, vi b) {
    return vbslq_s32(vreinterpretq_u32_s32(mask), a, b);
}

template <int N> inline vi shift_right(vi x) {
    const uint32x4_t u = vreinterpretq_u32_s32(x);
    if constexpr (N > 0) {
        return vreinterpretq_s32_u32(vshrq_n_u32(u, N));
    } else {
        return vreinterpretq_s32_u32(vshlq_n_u32(u, -N));
    }
}

//
// words: 2 * LANES int16, lane i has words 2i and 2i + 1
//

inline int16x8_t as_i16(vi x) {
    return vreinterpretq_s16_s32(x);
}

inline uint16x8_t as_u16(vi x) {
    return vreinterpretq_u16_s32(x);
}

inline vi load_words16(const int16_t * p) {
    return vreinterpretq_s32_s16(vld1q_s16(p));
}

inline void store_words16(int16_t * p, vi x) {
    vst1q_s16(p, as_i16(x));
}

inline vi splat_i16(int16_t x) {
    return vreinterpretq_s32_s16(vdupq_n_s16(x));
}

inline vi swap_words(vi x) {
    return vreinterpretq_s32_s16(vrev32q_s16(as_i16(x)));
}

inline vi add_i16(vi a, vi b) {
    return vreinterpretq_s32_s16(vaddq_s16(as_i16(a), as_i16(b)));
}

inline vi sub_i16(vi a, vi b) {
    return vreinterpretq_s32_s16(vsubq_s16(as_i16(a), as_i16(b)));
}

inline vi sub_u16(vi a, vi b) {
    return vreinterpretq_s32_u16(vqsubq_u16(as_u16(a), as_u16(b)));
}

inline vi min_u16(vi a, vi b) {
    return vreinterpretq_s32_u16(vminq_u16(as_u16(a), as_u16(b)));
}

inline vi abs_i16(vi x) {
    return vreinterpretq_s32_s16(vabsq_s16(as_i16(x)));
}

template <int N> inline vi shift_left_i16(vi x) {
    return vreinterpretq_s32_s16(vshlq_n_s16(as_i16(x), N));
}

inline vi select_eq_i16(vi a, vi b, vi x, vi y) {
    return vreinterpretq_s32_s16(vbslq_s16(vceqq_s16(as_i16(a), as_i16(b)), as_i16(x), as_i16(y)));
}

inline vi count_gt_i16(vi n, vi a, vi b) {
    return vreinterpretq_s32_u16(vsubq_u16(as_u16(n), vcgtq_s16(as_i16(a), as_i16(b))));
}

inline vi lookup_words(const int16_t * table, vi index) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s16(vld1q_s16(table)), vreinterpretq_u8_s32(index)));
}

inline uint16x8_t bit_of_word() {
    static const uint16_t bits[] = { 1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7 };
    return vld1q_u16(bits);
}

inline vi spread_bits(uint32_t bits, vi x) {
    return vreinterpretq_s32_u16(vandq_u16(vtstq_u16(vdupq_n_u16((uint16_t) bits), bit_of_word()), as_u16(x)));
}

inline uint32_t gather_bits(vi x, int bit) {
    return vaddvq_u16(vandq_u16(vtstq_u16(as_u16(x), vdupq_n_u16((uint16_t) (1 << bit))), bit_of_word()));
}

template <int N> struct wide_table {
    int8x16x4_t x;
};

template <int N> inline wide_table<N> make_wide_table(const level_table & levels) {
    wide_table<N> table;
    for (int i = 0; i < 4; ++i) {
        table.x.val[i] = vld1q_s8(levels.x + 16 * i);
    }
    return table;
}

template <int N> inline vi lookup_wide(const wide_table<N> & table, vi index) {
    const uint8x16_t i = vreinterpretq_u8_s32(index);
    if constexpr (N == 16) {
        return vreinterpretq_s32_s8(vqtbl1q_s8(table.x.val[0], i));
    } else if constexpr (N == 32) {
        return vreinterpretq_s32_s8(vqtbl2q_s8(
            {
                { table.x.val[0], table.x.val[1] }
        },
            i));
    } else {
        return vreinterpretq_s32_s8(vqtbl4q_s8(table.x, i));
    }
}

inline vi dot_pairs(vi acc, vi a, vi b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return vaddq_s32(acc, vpaddq_s32(low, vmull_high_s16(x, y)));
}

inline vi to_pairs(vf even, vf odd) {
    return vbslq_s32(vdupq_n_u32(0xffff), vcvtnq_s32_f32(even), vshlq_n_s32(vcvtnq_s32_f32(odd), 16));
}

inline void store_i16(int16_t * p, vf x) {
    vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(x)));
}

//
// transposed loads
//

template <int N> inline vi load_row(const char * p) {
    if constexpr (N == 4) {
        return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *) p));
    } else {
        int32_t x[4] = { 0, 0, 0, 0 };
        memcpy(x, p, N * sizeof(int32_t));
        return vld1q_s32(x);
    }
}

inline int64x2_t as_pairs(vi x) {
    return vreinterpretq_s64_s32(x);
}

template <int N, class F> TURBO_INLINE void gather_words(vi * w, F row) {
    if constexpr (N > 4) {
        gather_words<4>(w, row);
        gather_words<N - 4>(w + 4, [&](int i) { return row(i) + 16; });
    } else {
        vi r[4];
        for (int i = 0; i < 4; ++i) {
            r[i] = load_row<N>(row(i));
        }
        const int64x2_t even01 = as_pairs(vtrn1q_s32(r[0], r[1])), odd01 = as_pairs(vtrn2q_s32(r[0], r[1]));
        const int64x2_t even23 = as_pairs(vtrn1q_s32(r[2], r[3])), odd23 = as_pairs(vtrn2q_s32(r[2], r[3]));
        w[0] = vreinterpretq_s32_s64(vtrn1q_s64(even01, even23));
        w[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd01, odd23));
        if constexpr (N > 2) {
            w[2] = vreinterpretq_s32_s64(vtrn2q_s64(even01, even23));
        }
        if constexpr (N > 3) {
            w[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd01, odd23));
        }
    }
}

template <int N> inline void load_words(vi * w, const char * p, size_t stride) {
    gather_words<N>(w, [=](int i) { return p + i * stride; });
}

//
// blocks as floats
//

inline float half_to_float(ggml_half h) {
    float16_t f;
    memcpy(&f, &h, sizeof(f));
    return f;
}

inline void levels_to_float(int8x16_t levels, float d, vf * y) {
    const int16x8_t low = vmovl_s8(vget_low_s8(levels)), high = vmovl_s8(vget_high_s8(levels));
    y[0] = vmulq_n_f32(to_float(vmovl_s16(vget_low_s16(low))), d);
    y[1] = vmulq_n_f32(to_float(vmovl_s16(vget_high_s16(low))), d);
    y[2] = vmulq_n_f32(to_float(vmovl_s16(vget_low_s16(high))), d);
    y[3] = vmulq_n_f32(to_float(vmovl_s16(vget_high_s16(high))), d);
}

// 2-bit indices: values 0 .. 15 and 16 .. 31
inline void expand_2bit(const uint8_t * qs, uint8x16_t * index) {
    const uint8x8_t  q     = vld1_u8(qs);
    const uint8x16_t pairs = vcombine_u8(q, vshr_n_u8(q, 2));
    index[0]               = vandq_u8(pairs, vdupq_n_u8(3));
    index[1]               = vandq_u8(vshrq_n_u8(pairs, 4), vdupq_n_u8(3));
}

inline void unpack(const block_turbo2_0 & x, vf * y) {
    static constexpr int8_t codebook[16] = { TURBO2_0_CODEBOOK };
    const int8x16_t         table        = vld1q_s8(codebook);
    uint8x16_t              index[2];
    expand_2bit(x.qs, index);
    for (int i = 0; i < 2; ++i) {
        levels_to_float(vqtbl1q_s8(table, index[i]), half_to_float(x.d), y + 4 * i);
    }
}

// Bit i / 4 of byte i % 4 of the signs is the high bit of index i.
inline void unpack(const block_turbo3_0 & x, vf * y) {
    static constexpr int8_t codebook[16] = { TURBO3_0_CODEBOOK };
    static constexpr int8_t to_bit_0[16] = { 0, 0, 0, 0, -1, -1, -1, -1, -2, -2, -2, -2, -3, -3, -3, -3 };
    const int8x16_t         table        = vld1q_s8(codebook);
    uint8x16_t              index[2];
    expand_2bit(x.qs, index);
    uint32_t signs;
    memcpy(&signs, x.signs, sizeof(signs));
    const uint8x16_t s = vshlq_u8(vreinterpretq_u8_u32(vdupq_n_u32(signs)), vld1q_s8(to_bit_0));
    index[0]           = vorrq_u8(index[0], vshlq_n_u8(vandq_u8(s, vdupq_n_u8(1)), 2));
    index[1]           = vorrq_u8(index[1], vshlq_n_u8(vandq_u8(vshrq_n_u8(s, 4), vdupq_n_u8(1)), 2));
    for (int i = 0; i < 2; ++i) {
        levels_to_float(vqtbl1q_s8(table, index[i]), half_to_float(x.d), y + 4 * i);
    }
}

inline void unpack(const block_turbo4_0 & x, vf * y) {
    static constexpr int8_t codebook[16] = { TURBO4_0_CODEBOOK };
    const int8x16_t         table        = vld1q_s8(codebook);
    const uint8x16_t        q            = vld1q_u8(x.qs);
    levels_to_float(vqtbl1q_s8(table, vandq_u8(q, vdupq_n_u8(15))), half_to_float(x.d), y);
    levels_to_float(vqtbl1q_s8(table, vshrq_n_u8(q, 4)), half_to_float(x.d), y + 4);
}

inline void unpack(const block_q8_0 & x, vf * y) {
    levels_to_float(vld1q_s8(x.qs), half_to_float(x.d), y);
    levels_to_float(vld1q_s8(x.qs + 16), half_to_float(x.d), y + 4);
}

inline void unpack(const block_q4_0 & x, vf * y) {
    const uint8x16_t q = vld1q_u8(x.qs);
    const int8x16_t  s = vdupq_n_s8(8);
    levels_to_float(vsubq_s8(vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15))), s), half_to_float(x.d), y);
    levels_to_float(vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(q, 4)), s), half_to_float(x.d), y + 4);
}

// Half of a block of a trellis type; four values to a dword, as in its words
template <int BITS, int HALF> inline void unpack(const trellis_half<BITS, HALF> & x, vf * y) {
    const trellis_path w     = trellis_unpack_block(BITS, x.bytes);
    const auto         table = make_wide_table<4 << BITS>(TRELLIS_LEVELS<BITS, 0>);
    const vi           ones  = splat_i8(1);
    for (int i = 0; i < 2; ++i) {
        const int32_t   first = -4 * i;
        const int32_t   by[4] = { first, first - 1, first - 2, first - 3 };
        const int32x4_t shift = vld1q_s32(by);
        const auto      bits  = [&](uint64_t word, int at) {
            const uint32x4_t shifted = vshlq_u32(vdupq_n_u32((uint32_t) (word >> 32 * HALF)), shift);
            return vshlq_s32(bit_and(vreinterpretq_s32_u32(shifted), ones), vdupq_n_s32(at));
        };
        vi index = splat_i32((int32_t) (trellis_spread(w.selectors >> 4 * HALF) << (BITS + 1)));
        index    = bit_or(index, bits(trellis_high_subset_bits(w.coded), 1));
        index    = bit_or(index, bits(trellis_low_subset_bits(w.coded), 0));
        if constexpr (BITS >= 3) {
            const int32_t    pairs[4] = { first, first, first - 2, first - 2 };
            const uint32x4_t low      = vshlq_u32(vreinterpretq_u32_u64(vdupq_n_u64(w.low[HALF])), vld1q_s32(pairs));
            index = bit_or(index, shift_right<-2>(bit_and(vreinterpretq_s32_u32(low), splat_i8(3))));
        }
        if constexpr (BITS != 3) {
            index = bit_or(index, bits(w.high, BITS == 2 ? 2 : 4));
        }
        levels_to_float(vreinterpretq_s8_s32(lookup_wide(table, index)),
                        trellis_scale_of(x.bytes[0]) / TRELLIS_LEVEL_STEPS, y + 4 * i);
    }
}

}  // namespace
