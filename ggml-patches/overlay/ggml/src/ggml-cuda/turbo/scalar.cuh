#pragma once

// Unpacking and encoding of blocks of the scalar types on a GPU: what turbo/scalar.c does, bit for bit. Format: turbo/scalar.h.
//
// Instructions from the words of a block in registers to 8 words of int8 (constants already in registers):
//                    turbo2    turbo3    turbo4
//     sm_80, sm_90       18        25        44
//     gfx1030 .. 1201    22        30        52    (gfx90a, gfx942: 60 for turbo4)

#include "base.cuh"

//
// types
//

// bits: of a value, and words of a block after d. level: of the codebook. magnitudes: half of it.
// threshold, magnitude_word: rows of the scale search, and four magnitudes as a word; beyond the last they are 0.
#define TURBO_SCALAR_TRAITS(ENUM, NAME, C_NAME, FAMILY, BITS)                                   \
    template <> struct turbo_traits<GGML_TYPE_##ENUM> {                                         \
        using block                     = block_##C_NAME;                                       \
        static constexpr int bits       = BITS;                                                 \
        static constexpr int words      = BITS;                                                 \
        static constexpr int magnitudes = 1 << (BITS - 1);                                      \
        static constexpr int n_steps    = ENUM##_N_STEPS;                                       \
                                                                                                \
        static constexpr TURBO_HOST_DEVICE int level(int i) {                                   \
            constexpr int8_t levels[] = { ENUM##_CODEBOOK };                                    \
            return levels[i];                                                                   \
        }                                                                                       \
                                                                                                \
        static constexpr TURBO_HOST_DEVICE int threshold(int step, int m) {                     \
            constexpr int16_t rows[][(1 << (BITS - 1)) - 1] = { ENUM##_THRESHOLDS };            \
            return rows[step][m];                                                               \
        }                                                                                       \
                                                                                                \
        static constexpr TURBO_HOST_DEVICE uint32_t magnitude_word(int word) {                  \
            constexpr int8_t c[8] = { ENUM##_MAGNITUDES };                                      \
            return turbo_pack4(c[4 * word], c[4 * word + 1], c[4 * word + 2], c[4 * word + 3]); \
        }                                                                                       \
    };
GGML_TURBO_SCALAR_TYPES_X(TURBO_SCALAR_TRAITS)
#undef TURBO_SCALAR_TRAITS

//
// unpacking
//

// Which word of qs holds the indices of a quarter.
template <ggml_type type> static constexpr TURBO_HOST_DEVICE int turbo_quarter_qs(int quarter) {
    return type == GGML_TYPE_TURBO4_0 ? quarter : quarter & 1;
}

template <ggml_type type> struct turbo_unpacker;

template <> struct turbo_unpacker<GGML_TYPE_TURBO2_0> {
    static TURBO_DEVICE void quarter(uint32_t qs, uint32_t /*signs*/, int q, uint32_t & w0, uint32_t & w1) {
        constexpr int8_t   c[]   = { TURBO2_0_CODEBOOK };
        constexpr uint32_t table = turbo_pack4(c[0], c[1], c[2], c[3]);

        uint32_t sel0, sel1;
        turbo_selectors(qs >> 2 * (q >> 1), 3, sel0, sel1);
        w0 = turbo_permute(table, table, sel0);
        w1 = turbo_permute(table, table, sel1);
    }
};

template <> struct turbo_unpacker<GGML_TYPE_TURBO3_0> {
    static TURBO_DEVICE void quarter(uint32_t qs, uint32_t signs, int q, uint32_t & w0, uint32_t & w1) {
        constexpr int8_t   c[]    = { TURBO3_0_CODEBOOK };
        constexpr uint32_t table0 = turbo_pack4(c[0], c[1], c[2], c[3]);
        constexpr uint32_t table1 = turbo_pack4(c[4], c[5], c[6], c[7]);

        // bit q of each nibble of the signs is the high bit of an index
        const uint32_t low  = qs >> 2 * (q >> 1);
        const uint32_t high = q < 3 ? signs << (2 - q) : signs >> 1;

        uint32_t sel0, sel1;
        turbo_selectors((low & 0x33333333u) | (high & 0xccccccccu), 7, sel0, sel1);
        w0 = turbo_permute(table0, table1, sel0);
        w1 = turbo_permute(table0, table1, sel1);
    }
};

template <> struct turbo_unpacker<GGML_TYPE_TURBO4_0> {
    static TURBO_DEVICE void quarter(uint32_t qs, uint32_t /*signs*/, int /*q*/, uint32_t & w0, uint32_t & w1) {
        constexpr int8_t   c[]    = { TURBO4_0_CODEBOOK };
        constexpr uint32_t table0 = turbo_pack4(c[0], c[1], c[2], c[3]);
        constexpr uint32_t table1 = turbo_pack4(c[4], c[5], c[6], c[7]);
        constexpr uint32_t table2 = turbo_pack4(c[8], c[9], c[10], c[11]);
        constexpr uint32_t table3 = turbo_pack4(c[12], c[13], c[14], c[15]);

        uint32_t sel0, sel1, high0, high1;
        turbo_selectors(qs, 7, sel0, sel1);
        turbo_high_bits(qs, high0, high1);
        w0 = turbo_merge(turbo_permute(table0, table1, sel0), turbo_permute(table2, table3, sel0), high0);
        w1 = turbo_merge(turbo_permute(table0, table1, sel1), turbo_permute(table2, table3, sel1), high1);
    }
};

// Codebook values of a quarter, two words of int8: those that turbo_quarter_word counts. qs: word turbo_quarter_qs of qs,
// little-endian; signs: only turbo3 has them. q need not be a constant.
template <ggml_type type>
static TURBO_DEVICE void turbo_unpack_quarter(uint32_t qs, uint32_t signs, int q, int32_t w[2]) {
    uint32_t w0, w1;
    turbo_unpacker<type>::quarter(qs, signs, q, w0, w1);
    w[0] = (int32_t) w0;
    w[1] = (int32_t) w1;
}

// All 32: byte b of w[i] belongs to value turbo_value_order(i, b). words: those of the block after d.
template <ggml_type type> static TURBO_DEVICE void turbo_unpack_block(const uint32_t * words, int32_t w[8]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        int32_t pair[2];
        turbo_unpack_quarter<type>(words[turbo_quarter_qs<type>(q)], words[turbo_traits<type>::words - 1], q, pair);
        w[turbo_quarter_word(q, 0)] = pair[0];
        w[turbo_quarter_word(q, 1)] = pair[1];
    }
}

//
// encoding
//
// Eight neighbouring lanes encode a block. Lane l of them holds values l, l+8, l+16 and l+24, which share a byte of qs (turbo4: two
// bytes). Sums over the block are integers, so their order does not matter; each operation on floats is rounded by itself, also
// with -use_fast_math. All lanes of the warp must take part.

// The values of a lane as integers: |x[i]| is about t[i] * unit.
struct turbo_ints {
    int32_t t[4];
    float   unit;
    bool    is_nan;
    bool    is_zero;
};

// A choice of magnitudes for t: their indices, 4 selectors of turbo_permute, and sums over the block.
struct turbo_fit {
    uint32_t selectors;
    int32_t  tc;  // <t,c>
    int32_t  cc;  // |c|^2
};

// Magnitudes are compared as integers: the order of the bit patterns is that of the numbers, NaN comes last.
static TURBO_DEVICE turbo_ints turbo_to_ints(const float x[4]) {
    const uint32_t max_finite = TURBO_FLT_MAX_BITS;
    const uint32_t infinity   = TURBO_INFINITY_BITS;

    uint32_t a[4];
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = __float_as_uint(x[i]) & 0x7fffffff;
        amax = max(amax, a[i]);
    }
#pragma unroll
    for (int mask = 4; mask > 0; mask >>= 1) {
        amax = max(amax, __shfl_xor_sync(0xffffffff, amax, mask, 32));
    }

    const float f = __uint_as_float(min(amax, max_finite));

    turbo_ints b;
    b.is_nan  = amax > infinity;
    b.is_zero = f < SCALAR_AMAX_MIN;

    const float finite = b.is_zero ? 1.0f : f;
    const float scale  = __fdiv_rn((float) SCALAR_T_MAX, finite);
    b.unit             = __fdiv_rn(finite, (float) SCALAR_T_MAX);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        b.t[i] = __float2int_rn(__fmul_rn(__uint_as_float(min(a[i], max_finite)), scale));
    }
    return b;
}

template <ggml_type type> static TURBO_DEVICE turbo_fit turbo_fit_step(const int32_t t[4], int step) {
    turbo_fit fit = { 0, 0, 0 };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < turbo_traits<type>::magnitudes - 1; ++m) {
            fit.selectors += t[i] > turbo_traits<type>::threshold(step, m) ? 1u << TURBO_SELECTOR_BITS * i : 0;
        }
    }
    const uint32_t c4 =
        turbo_permute(turbo_traits<type>::magnitude_word(0), turbo_traits<type>::magnitude_word(1), fit.selectors);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int32_t c = c4 >> 8 * i & 0xff;
        fit.tc += t[i] * c;
        fit.cc += c * c;
    }
    fit.tc = turbo_sum8(fit.tc);
    fit.cc = turbo_sum8(fit.cc);
    return fit;
}

// <t,c>^2 / |c|^2: what the best scale takes off the squared error
static TURBO_DEVICE float turbo_gain(const turbo_fit & fit) {
    return __fdiv_rn(__fmul_rn((float) fit.tc, (float) fit.tc), (float) fit.cc);
}

template <ggml_type type> static TURBO_DEVICE turbo_fit turbo_best_fit(const int32_t t[4]) {
    turbo_fit best      = turbo_fit_step<type>(t, 0);
    float     best_gain = turbo_gain(best);
#pragma unroll
    for (int step = 1; step < turbo_traits<type>::n_steps; ++step) {
        const turbo_fit fit  = turbo_fit_step<type>(t, step);
        const float     gain = turbo_gain(fit);
        if (gain > best_gain) {  // the first of equals stays
            best      = fit;
            best_gain = gain;
        }
    }
    return best;
}

// d as turbo_block_scale (turbo/scalar-impl.h) has it
static TURBO_DEVICE half turbo_scale(ggml_turbo_scale rule, const turbo_fit & fit, int32_t tt, float unit) {
    const float num   = (float) (rule == GGML_TURBO_SCALE_LEAST_SQUARES ? fit.tc : tt);
    const float den   = (float) (rule == GGML_TURBO_SCALE_INNER_PRODUCT ? fit.tc : fit.cc);
    const float ratio = __fdiv_rn(num, den);
    const float d     = __fmul_rn(rule == GGML_TURBO_SCALE_MATCHED_NORM ? turbo_sqrt(ratio) : ratio, unit);
    return __float2half_rn(fminf(d, SCALAR_HALF_MAX));
}

// What a lane stores: d, and the indices of its 4 values as selectors.
struct turbo_code {
    uint16_t d;
    uint32_t indices;

    TURBO_DEVICE uint32_t operator[](int i) const { return indices >> TURBO_SELECTOR_BITS * i & 15; }
};

template <ggml_type type> static TURBO_DEVICE turbo_code turbo_encode(const float x[4], ggml_turbo_scale rule) {
    const turbo_ints b   = turbo_to_ints(x);
    const turbo_fit  fit = turbo_best_fit<type>(b.t);
    const int32_t    tt  = turbo_sum8(b.t[0] * b.t[0] + b.t[1] * b.t[1] + b.t[2] * b.t[2] + b.t[3] * b.t[3]);
    const uint16_t   d   = __half_as_ushort(turbo_scale(rule, fit, tt, b.unit));

    if (b.is_nan || b.is_zero || d == 0) {
        return { (uint16_t) (b.is_nan ? SCALAR_HALF_NAN : 0), 0 };
    }

    // of n magnitudes, the m-th has index n + m = m ^ n, or n - 1 - m = m ^ (n - 1) where negative
    constexpr uint32_t n    = turbo_traits<type>::magnitudes;
    uint32_t           flip = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        flip |= (__float_as_uint(x[i]) >> 31 ? n - 1 : n) << TURBO_SELECTOR_BITS * i;
    }
    return { d, fit.selectors ^ flip };
}

static TURBO_DEVICE void turbo_store_indices(block_turbo2_0 * block, int lane, const turbo_code & code, bool store) {
    if (store) {
        block->qs[lane] = (uint8_t) (code[0] | code[1] << 2 | code[2] << 4 | code[3] << 6);
    }
}

static TURBO_DEVICE void turbo_store_indices(block_turbo3_0 * block, int lane, const turbo_code & code, bool store) {
    // bits 0, 2, 4, 6 of signs[k] come from lane k, the others from lane k + 4
    uint32_t signs = (code[0] >> 2) | (code[1] >> 2) << 2 | (code[2] >> 2) << 4 | (code[3] >> 2) << 6;
    signs |= __shfl_xor_sync(0xffffffff, signs, 4, 32) << 1;
    if (store) {
        block->qs[lane] = (uint8_t) ((code[0] & 3) | (code[1] & 3) << 2 | (code[2] & 3) << 4 | (code[3] & 3) << 6);
    }
    if (store && lane < 4) {
        block->signs[lane] = (uint8_t) signs;
    }
}

static TURBO_DEVICE void turbo_store_indices(block_turbo4_0 * block, int lane, const turbo_code & code, bool store) {
    if (store) {
        block->qs[lane]     = (uint8_t) (code[0] | code[2] << 4);
        block->qs[lane + 8] = (uint8_t) (code[1] | code[3] << 4);
    }
}

template <typename block_t>
static TURBO_DEVICE void turbo_store(block_t * block, int lane, const turbo_code & code, bool store) {
    turbo_store_indices(block, lane, code, store);
    if (store && lane == 0) {
        block->d = __ushort_as_half(code.d);
    }
}

// x: values lane, lane+8, lane+16, lane+24 of a block, lane = 0 .. 7. Lanes without a block take part with store = false.
template <ggml_type type>
static TURBO_DEVICE void turbo_encode_block(const float                          x[4],
                                            ggml_turbo_scale                     rule,
                                            int                                  lane,
                                            bool                                 store,
                                            typename turbo_traits<type>::block * block) {
    turbo_store(block, lane, turbo_encode<type>(x, rule), store);
}
