#pragma once

// Decoding and encoding of turbo blocks on a GPU: what ggml-turbo.c does, bit for bit. Format: ggml-turbo.h.
//
// Decoding works on the words of a block in registers, without tables in memory: an index selects a byte of the codebook in a byte
// permute. NVIDIA's PRMT takes four selectors of 4 bits from the low half of a word, AMD's v_perm_b32 four of 8 bits, so the order in which
// 32 values cost the fewest instructions differs. It is the same for all types: turbo_value_order.
//
// Instructions from the words of a block in registers to 8 words of int8 (constants already in registers):
//                    turbo2    turbo3    turbo4
//     sm_80, sm_90       18        25        44
//     gfx1030 .. 1201    22        30        52    (gfx90a, gfx942: 60 for turbo4)
//
// Of common.cuh it needs types and shuffles only: it compiles with nvcc, with clang for HIP, and as plain C++ (tests/gpu/lanes).

#include "common.cuh"
#include "turbo/scalar.h"

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIP__) || defined(GGML_USE_MUSA)
#    define TURBO_HOST_DEVICE __host__ __device__ __forceinline__
#    define TURBO_DEVICE      __device__ __forceinline__
#else
#    define TURBO_HOST_DEVICE inline
#    define TURBO_DEVICE      inline
#endif

// bits of a selector of the byte permute
#if defined(GGML_USE_HIP)
#    define TURBO_SELECTOR_BITS 8
#else
#    define TURBO_SELECTOR_BITS 4
#endif

//
// types
//

// 4 bytes as a word, byte 0 lowest
static constexpr TURBO_HOST_DEVICE uint32_t turbo_pack4(int b0, int b1, int b2, int b3) {
    return (b0 & 0xffu) | (b1 & 0xffu) << 8 | (b2 & 0xffu) << 16 | (b3 & 0xffu) << 24;
}

// Values of a block
static constexpr TURBO_HOST_DEVICE int turbo_block_values(ggml_type type) {
    return type >= GGML_TYPE_TURBO2_T && type < GGML_TYPE_TURBO_COUNT ? QK_TRELLIS : QK_SCALAR;
}

// words: of a block, after d. magnitudes: half of the codebook.
template <ggml_type type> struct turbo_traits;

template <> struct turbo_traits<GGML_TYPE_TURBO2_0> {
    using block                     = block_turbo2_0;
    static constexpr int words      = 2;
    static constexpr int magnitudes = 2;
};

template <> struct turbo_traits<GGML_TYPE_TURBO3_0> {
    using block                     = block_turbo3_0;
    static constexpr int words      = 3;
    static constexpr int magnitudes = 4;
};

template <> struct turbo_traits<GGML_TYPE_TURBO4_0> {
    using block                     = block_turbo4_0;
    static constexpr int words      = 4;
    static constexpr int magnitudes = 8;
};

//
// order of decoded values
//

// Which value of the block, 0 .. 31, stands at a byte, 0 .. 3, of a word, 0 .. 7.
static constexpr TURBO_HOST_DEVICE int turbo_value_order(int word, int byte) {
    return TURBO_SELECTOR_BITS == 4 ? 2 * word + (byte >> 1) + 16 * (byte & 1) : 4 * word + byte;
}

// A quarter of a block, 0 .. 3, is what one word of nibbles decodes to: values 4q .. 4q+3 and 16+4q .. 16+4q+3.
// Its two words among the 8 of the block:
static constexpr TURBO_HOST_DEVICE int turbo_quarter_word(int quarter, int half) {
    return TURBO_SELECTOR_BITS == 4 ? 2 * quarter + half : quarter + 4 * half;
}

//
// byte permutes
//

// 4 of the 8 bytes of hi:lo, by selectors 0 .. 7: 4 nibbles in the low half of sel (CUDA), or its 4 bytes (HIP).
// In a nibble, bit 3 asks for the sign bit of the byte, 8 times.
static TURBO_DEVICE uint32_t turbo_permute(uint32_t lo, uint32_t hi, uint32_t sel) {
#if defined(GGML_USE_HIP) && defined(__HIP_DEVICE_COMPILE__)
    return __builtin_amdgcn_perm(hi, lo, sel);
#elif defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP)
    uint32_t r;  // __byte_perm() would first clear bit 3 of the selectors
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(lo), "r"(hi), "r"(sel));
    return r;
#else
    const uint64_t bytes = (uint64_t) hi << 32 | lo;
    uint32_t       r     = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t s    = sel >> TURBO_SELECTOR_BITS * i & (TURBO_SELECTOR_BITS == 4 ? 15 : 255);
        const uint32_t byte = bytes >> 8 * (s & 7) & 0xff;
        r |= (s & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
    }
    return r;
#endif
}

// What turbo_permute needs for both words of a quarter: the bits of mask of each nibble.
static TURBO_DEVICE void turbo_selectors(uint32_t nibbles, uint32_t mask, uint32_t & sel0, uint32_t & sel1) {
#if TURBO_SELECTOR_BITS == 4
    sel0 = nibbles & mask * 0x11111111u;
    sel1 = sel0 >> 16;
#else
    sel0 = nibbles & mask * 0x01010101u;
    sel1 = nibbles >> 4 & mask * 0x01010101u;
#endif
}

// What turbo_merge needs for both words of a quarter: where bit 3 of the nibbles is set.
static TURBO_DEVICE void turbo_high_bits(uint32_t nibbles, uint32_t & high0, uint32_t & high1) {
#if TURBO_SELECTOR_BITS == 4
    high0 = turbo_permute(nibbles << 4, nibbles, 0xd9c8);  // sign bits of bytes 0 and 1 of both, as bytes
    high1 = turbo_permute(nibbles << 4, nibbles, 0xfbea);  // of bytes 2 and 3
#else
    turbo_selectors(nibbles >> 1, 4, high0, high1);
#endif
}

// The bytes of b where the high bit is set, else those of a.
static TURBO_DEVICE uint32_t turbo_merge(uint32_t a, uint32_t b, uint32_t high) {
#if TURBO_SELECTOR_BITS == 4
    return (a & ~high) | (b & high);
#else
    return turbo_permute(a, b, high | 0x03020100u);
#endif
}

//
// lanes
//

// 32 lanes see what they have stored in shared memory so far.
static TURBO_DEVICE void turbo_syncwarp() {
#if defined(__HIP_DEVICE_COMPILE__)
    // lanes run in step, only the compiler must not move shared memory accesses
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
#elif !defined(__HIP__)
    __syncwarp();
#endif  // defined(__HIP_DEVICE_COMPILE__)
}

//
// decoding
//

// Which word of qs holds the indices of a quarter.
template <ggml_type type> static constexpr TURBO_HOST_DEVICE int turbo_quarter_qs(int quarter) {
    return type == GGML_TYPE_TURBO4_0 ? quarter : quarter & 1;
}

template <ggml_type type> struct turbo_decoder;

template <> struct turbo_decoder<GGML_TYPE_TURBO2_0> {
    static TURBO_DEVICE void quarter(uint32_t qs, uint32_t /*signs*/, int q, uint32_t & w0, uint32_t & w1) {
        constexpr int8_t   c[]   = { TURBO2_0_CODEBOOK };
        constexpr uint32_t table = turbo_pack4(c[0], c[1], c[2], c[3]);

        uint32_t sel0, sel1;
        turbo_selectors(qs >> 2 * (q >> 1), 3, sel0, sel1);
        w0 = turbo_permute(table, table, sel0);
        w1 = turbo_permute(table, table, sel1);
    }
};

template <> struct turbo_decoder<GGML_TYPE_TURBO3_0> {
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

template <> struct turbo_decoder<GGML_TYPE_TURBO4_0> {
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
static TURBO_DEVICE void turbo_decode_quarter(uint32_t qs, uint32_t signs, int q, int32_t w[2]) {
    uint32_t w0, w1;
    turbo_decoder<type>::quarter(qs, signs, q, w0, w1);
    w[0] = (int32_t) w0;
    w[1] = (int32_t) w1;
}

// All 32: byte b of w[i] belongs to value turbo_value_order(i, b). words: those of the block after d.
template <ggml_type type> static TURBO_DEVICE void turbo_decode_block(const uint32_t * words, int32_t w[8]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        int32_t pair[2];
        turbo_decode_quarter<type>(words[turbo_quarter_qs<type>(q)], words[turbo_traits<type>::words - 1], q, pair);
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

template <ggml_type type> struct turbo_steps;

template <> struct turbo_steps<GGML_TYPE_TURBO2_0> {
    static constexpr int count = TURBO2_0_N_STEPS;

    static constexpr TURBO_HOST_DEVICE int threshold(int step, int m) {
        constexpr int16_t rows[][1] = { TURBO2_0_THRESHOLDS };
        return rows[step][m];
    }

    static constexpr TURBO_HOST_DEVICE uint32_t magnitudes(int word) {
        constexpr int8_t c[] = { TURBO2_0_MAGNITUDES };
        return word == 0 ? turbo_pack4(c[0], c[1], 0, 0) : 0;
    }
};

template <> struct turbo_steps<GGML_TYPE_TURBO3_0> {
    static constexpr int count = TURBO3_0_N_STEPS;

    static constexpr TURBO_HOST_DEVICE int threshold(int step, int m) {
        constexpr int16_t rows[][3] = { TURBO3_0_THRESHOLDS };
        return rows[step][m];
    }

    static constexpr TURBO_HOST_DEVICE uint32_t magnitudes(int word) {
        constexpr int8_t c[] = { TURBO3_0_MAGNITUDES };
        return word == 0 ? turbo_pack4(c[0], c[1], c[2], c[3]) : 0;
    }
};

template <> struct turbo_steps<GGML_TYPE_TURBO4_0> {
    static constexpr int count = TURBO4_0_N_STEPS;

    static constexpr TURBO_HOST_DEVICE int threshold(int step, int m) {
        constexpr int16_t rows[][7] = { TURBO4_0_THRESHOLDS };
        return rows[step][m];
    }

    static constexpr TURBO_HOST_DEVICE uint32_t magnitudes(int word) {
        constexpr int8_t c[] = { TURBO4_0_MAGNITUDES };
        return word == 0 ? turbo_pack4(c[0], c[1], c[2], c[3]) : turbo_pack4(c[4], c[5], c[6], c[7]);
    }
};

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

static TURBO_DEVICE int32_t turbo_sum8(int32_t x) {
#pragma unroll
    for (int mask = 4; mask > 0; mask >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, mask, 32);
    }
    return x;
}

// Magnitudes are compared as integers: the order of the bit patterns is that of the numbers, NaN comes last.
static TURBO_DEVICE turbo_ints turbo_to_ints(const float x[4]) {
    const uint32_t max_finite = 0x7f7fffff;
    const uint32_t infinity   = 0x7f800000;

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
            fit.selectors += t[i] > turbo_steps<type>::threshold(step, m) ? 1u << TURBO_SELECTOR_BITS * i : 0;
        }
    }
    const uint32_t c4 =
        turbo_permute(turbo_steps<type>::magnitudes(0), turbo_steps<type>::magnitudes(1), fit.selectors);
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
    for (int step = 1; step < turbo_steps<type>::count; ++step) {
        const turbo_fit fit  = turbo_fit_step<type>(t, step);
        const float     gain = turbo_gain(fit);
        if (gain > best_gain) {  // the first of equals stays
            best      = fit;
            best_gain = gain;
        }
    }
    return best;
}

// Correctly rounded: HIP's __fsqrt_rn is the hardware's approximation, CUDA's sqrtf is one with -use_fast_math.
static TURBO_DEVICE float turbo_sqrt(float x) {
#if defined(GGML_USE_HIP)
    return sqrtf(x);
#else
    return __fsqrt_rn(x);
#endif
}

// d as turbo_block_scale (ggml-turbo-impl.h) has it
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
