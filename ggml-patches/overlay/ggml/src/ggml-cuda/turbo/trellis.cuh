#pragma once

// Unpacking of trellis-coded blocks on a GPU: what turbo/trellis.c does, bit for bit. Format: turbo/trellis.h.
//
// A half of a block, 32 values, unpacks to 8 words of int8 in the order of the scalar types (turbo_value_order), a quarter of it at a time:
// bits q and q + 4 of the bytes of coded and high, and those of low, are the indices of quarter q, as nibbles. Byte permutes take 8 levels
// at a time, and the results are merged by the index bits above and then by the codebook: 16, 32 or 64 levels.
//
// Instructions for half a block in registers (constants already there), sm_90: 57 (turbo2t), 104 (turbo3t), 183 (turbo4t).

#include "base.cuh"

//
// types
//

// words: of a block, after d and selectors: coded, low, high. level: those of the fine codebook, then those of the coarse one.
#define TURBO_TRELLIS_TRAITS(ENUM, NAME, C_NAME, FAMILY, BITS)          \
    template <> struct turbo_traits<GGML_TYPE_##ENUM> {                 \
        using block                    = block_##C_NAME;                \
        static constexpr int   bits    = BITS;                          \
        static constexpr int   words   = 2 * BITS;                      \
        static constexpr int   x_steps = ENUM##_X_STEPS;                \
        static constexpr float x_scale = ENUM##_X_SCALE;                \
        static constexpr float reach   = ENUM##_REACH;                  \
                                                                        \
        static constexpr TURBO_HOST_DEVICE int level(int i) {           \
            constexpr int8_t levels[] = { ENUM##_FINE, ENUM##_COARSE }; \
            return levels[i];                                           \
        }                                                               \
    };
GGML_TURBO_TRELLIS_TYPES_X(TURBO_TRELLIS_TRAITS)
#undef TURBO_TRELLIS_TRAITS

// of a codebook
template <ggml_type type> static constexpr int turbo_n_levels = 2 << turbo_traits<type>::bits;

static TURBO_DEVICE float turbo_trellis_scale(uint32_t code) {
    return __half2float(__ushort_as_half((unsigned short) (code << 7)));
}

//
// unpacking
//

// Which words of a block a half needs besides coded; a block has low or high or both.
template <ggml_type type> static constexpr TURBO_HOST_DEVICE int turbo_low_word(int half, int quarter) {
    return turbo_traits<type>::bits >= 3 ? 2 + 2 * half + quarter % 2 : 0;
}

template <ggml_type type> static constexpr TURBO_HOST_DEVICE int turbo_high_word(int half) {
    return turbo_traits<type>::bits != 3 ? turbo_traits<type>::words - 2 + half : 0;
}

// What the quarters of a half share.
struct turbo_trellis_half {
    uint32_t z0, z1;    // low bits of the indices
    uint32_t books[2];  // of turbo_merge: where the codebook is the coarse one, for both words of a quarter
};

// A half of the 64-bit word of coded bits, rotated to the left.
static TURBO_DEVICE uint32_t turbo_rotate_coded(uint32_t own, uint32_t other, int n) {
    return own << n | other >> (32 - n);
}

// own, other: the words of coded bits. selectors: those of the half in the low 4 bits.
static TURBO_DEVICE turbo_trellis_half turbo_read_half(uint32_t own, uint32_t other, uint32_t selectors) {
    turbo_trellis_half half;
    half.z0 = turbo_rotate_coded(own, other, 2);
    half.z1 = own ^ turbo_rotate_coded(own, other, 1) ^ turbo_rotate_coded(own, other, 3);

    const uint32_t bytes = (selectors & 15) * 0x00204081u & 0x01010101u;  // bit b goes to byte b
    turbo_high_bits(bytes * 0x88u, half.books[0], half.books[1]);
    return half;
}

// The levels at sel among n from first on. merge: what turbo_merge needs for bit 3 of the indices, bit 4, .., codebook.
template <ggml_type type, int first, int n>
static TURBO_DEVICE uint32_t turbo_select_levels(uint32_t sel, const uint32_t * merge) {
    if constexpr (n == 8) {
        constexpr uint32_t lo = turbo_pack4(turbo_traits<type>::level(first + 0), turbo_traits<type>::level(first + 1),
                                            turbo_traits<type>::level(first + 2), turbo_traits<type>::level(first + 3));
        constexpr uint32_t hi = turbo_pack4(turbo_traits<type>::level(first + 4), turbo_traits<type>::level(first + 5),
                                            turbo_traits<type>::level(first + 6), turbo_traits<type>::level(first + 7));
        return turbo_permute(lo, hi, sel);
    } else {
        return turbo_merge(turbo_select_levels<type, first, n / 2>(sel, merge),
                           turbo_select_levels<type, first + n / 2, n / 2>(sel, merge), merge[n / 32]);
    }
}

// Levels of a quarter of a half, two words of int8: those that turbo_quarter_word counts. low, high: the words that turbo_low_word and
// turbo_high_word count; if the type has none, anything. q need not be a constant.
template <ggml_type type>
static TURBO_DEVICE void turbo_unpack_trellis_quarter(const turbo_trellis_half & half,
                                                      uint32_t                   low,
                                                      uint32_t                   high,
                                                      int                        q,
                                                      int32_t                    w[2]) {
    constexpr int bits = turbo_traits<type>::bits;

    uint32_t nibbles = (half.z0 >> q & 0x11111111u) | (half.z1 >> q & 0x11111111u) << 1;
    if constexpr (bits == 2) {
        nibbles |= (high >> q & 0x11111111u) << 2;
    } else {
        nibbles |= (low >> 2 * (q >> 1) & 0x33333333u) << 2;
    }

    uint32_t sel[2];
    uint32_t merge[2][3];
    turbo_selectors(nibbles, 7, sel[0], sel[1]);
    if constexpr (bits >= 3) {
        turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
    }
    if constexpr (bits == 4) {
        turbo_high_bits(high << (3 - q), merge[0][1], merge[1][1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        merge[i][bits - 2] = half.books[i];
        w[i]               = (int32_t) turbo_select_levels<type, 0, 2 * turbo_n_levels<type>>(sel[i], merge[i]);
    }
}

// All 32 of a half: byte b of w[i] belongs to its value turbo_value_order(i, b). words: those of the block after d and selectors.
template <ggml_type type>
static TURBO_DEVICE void turbo_unpack_trellis_half(const uint32_t * words, uint32_t selectors, int half, int32_t w[8]) {
    const turbo_trellis_half shared = turbo_read_half(words[half], words[1 - half], selectors >> 4 * half);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        int32_t pair[2];
        turbo_unpack_trellis_quarter<type>(shared, words[turbo_low_word<type>(half, q)],
                                           words[turbo_high_word<type>(half)], q, pair);
        w[turbo_quarter_word(q, 0)] = pair[0];
        w[turbo_quarter_word(q, 1)] = pair[1];
    }
}
