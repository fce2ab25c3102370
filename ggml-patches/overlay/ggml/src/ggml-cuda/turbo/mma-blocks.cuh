#pragma once

// Blocks of packed types in shared memory, as matrix instructions want them: quarters of blocks from words to indices, from indices to
// levels, from levels to values in f16. What is in which lane is said in mma-rows.cuh.

#include "decode-warp.cuh"
#include "packed-block.cuh"

#ifdef TURBO_MMA

//
// blocks
//

// To the left by n modulo 32.
static __device__ __forceinline__ uint32_t turbo_rotate(const uint32_t x, const int n) {
    return __funnelshift_l(x, x, n);
}

// Whether turbo_mma_read gives the halves of nibbles in each other's place. A word that begins in the middle of one is shifted by 16 more, and so
// are others then: lanes have one number for both.
template <ggml_type type, int n, int parity>
static constexpr bool turbo_mma_is_turned =
    parity == 1 && n == 1 && !turbo_is_trellis<type> && turbo_traits<type>::bits < 4;

// Word i of a block to the right by n, which may be negative. Any bits come in. An odd block's halves are in each other's place.
template <ggml_type type, int parity>
static __device__ __forceinline__ uint32_t turbo_shifted_word(const turbo_packed_block<type, parity> & block,
                                                              const int                                i,
                                                              const int                                n) {
    if constexpr (parity == 0) {
        return __funnelshift_rc(block.first[i], block.first[i + 1], 16 + n);
    } else if constexpr (parity == 1) {
        const uint32_t x = block.word(i);
        return __funnelshift_r(x, x, 16 + n);
    } else {
        return turbo_rotate(block.word(i), -n);
    }
}

// Indices of values as they are packed.
template <ggml_type type, int n> struct turbo_mma_indices {
    uint32_t nibbles[n];  // of quarters: up to 4 bits of each index
    uint32_t top[n];      // bit 3 of a nibble: bit 4 of the index, if it has as many
    uint32_t books;       // trellis types, bit 7 of byte s: whether segment s of the half has the coarse codebook
};

// Bits of the subset of a half's stations, of quarter q0 (0 or 1) in the low halves of nibbles, of q0 + 2 in the high ones: z0, z1 of
// turbo_read_half, shifted. own, other: words of coded bits.
static __device__ __forceinline__ uint32_t turbo_mma_subsets(const uint32_t own, const uint32_t other, const int q0) {
    const uint32_t z0 = __funnelshift_l(other, own, 2 - q0);
    const uint32_t z1 = __funnelshift_l(other, own, 1 - q0) ^ z0 ^ __funnelshift_l(other, own, 4 - q0);
    return turbo_select<0x55555555u>(z0, z1);
}

// Of quarters q0 and, if n is 2, q0 + 2 of a block, or of one of the halves of a trellis block. half and q0 may differ between lanes.
template <ggml_type type, int n, int parity>
static __device__ __forceinline__ turbo_mma_indices<type, n>
turbo_mma_read(const turbo_packed_block<type, parity> & block, const uint32_t head, const int half, const int q0) {
    constexpr bool trellis = turbo_is_trellis<type>;
    constexpr int  bits    = turbo_traits<type>::bits;
    constexpr int  words   = turbo_traits<type>::words;

    turbo_mma_indices<type, n> x  = {};
    [[maybe_unused]] const int q1 = n == 2 ? q0 : q0 % 2;
    [[maybe_unused]] const int above =
        n == 2 ? 0 : q0 / 2 * 2;  // where the bits of q0 begin among those of q1 and q1 + 2

    [[maybe_unused]] uint32_t pairs = 0;
    if constexpr (trellis) {
        x.books = (head >> (8 + 4 * half) & 15) * 0x10204080u;  // bit s goes to byte s
        pairs   = turbo_mma_subsets(block.word(half), block.word(1 - half), q1) >> above;
    } else if constexpr (bits < 4) {
        pairs = n == 2 ? block.word(q1) : turbo_shifted_word(block, q1, above);
    }

    if constexpr (!trellis && bits == 4) {
#    pragma unroll
        for (int j = 0; j < n; ++j) {
            x.nibbles[j] = block.word(q0 + 2 * j);
        }
    } else if constexpr (trellis && bits >= 3) {
        const uint32_t low = block.word(2 + 2 * half + q1);
        x.nibbles[0]       = turbo_select<0x33333333u>(pairs, turbo_rotate(low, 2 - above));
        if constexpr (n == 2) {
            x.nibbles[1] = turbo_select<0x33333333u>(pairs >> 2, low);
        }
    } else if constexpr (!trellis && bits == 2) {
#    pragma unroll
        for (int j = 0; j < n; ++j) {
            x.nibbles[j] = pairs >> 2 * j & 0x33333333u;
        }
    } else if constexpr (n == 1) {
        const uint32_t high = turbo_shifted_word(block, trellis ? 2 + half : words - 1, q0 - 2) & 0x44444444u;
        x.nibbles[0]        = (pairs & 0x33333333u) | high;
    } else {
        // bit q0 of a nibble goes to bit 2, and bit q0 + 2 to bit 0 of the nibble above, beside the pair of q0 + 2
        const uint32_t high = turbo_rotate(block.word(trellis ? 2 + half : words - 1), 2 - q0) & 0x55555555u;
        x.nibbles[0]        = turbo_select<0x33333333u>(pairs, high);
        x.nibbles[1]        = turbo_rotate(turbo_select<0xccccccccu>(pairs, high), 30);
    }

    if constexpr (trellis && bits == 4) {
        const uint32_t high = block.word(words - 2 + half);
#    pragma unroll
        for (int j = 0; j < n; ++j) {
            x.top[j] = turbo_rotate(high, 3 - q0 - 2 * j);
        }
    }
    return x;
}

//
// levels
//

// Levels of a codebook; trellis types: of both.
template <ggml_type type> static constexpr int turbo_mma_count_levels() {
    if constexpr (type == GGML_TYPE_Q8_0) {
        return 256;
    } else {
        return turbo_is_trellis<type> ? 4 << turbo_traits<type>::bits : 1 << turbo_traits<type>::bits;
    }
}

template <ggml_type type> static constexpr int turbo_mma_n_levels = turbo_mma_count_levels<type>();

// What a lookup makes of a level: int8, the same with its sign bit flipped, or the lower or the upper byte of an f16.
enum turbo_mma_form { TURBO_MMA_INT8, TURBO_MMA_FLIPPED, TURBO_MMA_F16_LOW, TURBO_MMA_F16_HIGH };

static constexpr TURBO_HOST_DEVICE int turbo_mma_f16_bits(const int level) {
    const int magnitude = level < 0 ? -level : level;
    int       exponent  = 0;
    while (magnitude >> exponent > 1) {
        ++exponent;
    }
    return magnitude == 0 ? 0 : (level < 0) << 15 | (15 + exponent) << 10 | ((magnitude << (10 - exponent)) & 0x3ff);
}

template <ggml_type type, turbo_mma_form form> static constexpr TURBO_HOST_DEVICE int turbo_mma_byte(const int i) {
    const int level = turbo_traits<type>::level(i);
    return form == TURBO_MMA_INT8    ? level :
           form == TURBO_MMA_FLIPPED ? level ^ 0x80 :
           form == TURBO_MMA_F16_LOW ? turbo_mma_f16_bits(level) & 0xff :
                                       turbo_mma_f16_bits(level) >> 8;
}

// Of levels first .. first + 3, as a word.
template <ggml_type type, turbo_mma_form form>
static constexpr TURBO_HOST_DEVICE uint32_t turbo_mma_bytes(const int first) {
    return turbo_pack4(turbo_mma_byte<type, form>(first), turbo_mma_byte<type, form>(first + 1),
                       turbo_mma_byte<type, form>(first + 2), turbo_mma_byte<type, form>(first + 3));
}

// Levels among n from first on (trellis types: of the fine codebook, then of the coarse one), as bytes: 4 selectors of turbo_permute and,
// for more than 8, what turbo_merge needs of further bits.
template <ggml_type type, turbo_mma_form form, int first = 0, int n = turbo_mma_n_levels<type>>
static __device__ __forceinline__ uint32_t turbo_mma_lookup(const uint32_t sel, const uint32_t * merge) {
    if constexpr (n <= 8) {
        constexpr uint32_t a = turbo_mma_bytes<type, form>(first);
        constexpr uint32_t b = turbo_mma_bytes<type, form>(first + n - 4);
        return turbo_permute(a, b, sel);
    } else {
        return turbo_merge(turbo_mma_lookup<type, form, first, n / 2>(sel, merge),
                           turbo_mma_lookup<type, form, first + n / 2, n / 2>(sel, merge), merge[n / 32]);
    }
}

// Of 8 indices: bytes of the low 4 of them, and of the others. books: of turbo_merge, for both words.
template <ggml_type type, turbo_mma_form form>
static __device__ __forceinline__ void turbo_mma_levels(const uint32_t nibbles,
                                                        const uint32_t top,
                                                        const uint32_t (&books)[2],
                                                        uint32_t (&w)[2]) {
    constexpr bool trellis = turbo_is_trellis<type>;
    constexpr int  bits    = turbo_traits<type>::bits;

    uint32_t merge[2][3] = {};
    if constexpr (bits == 4 || (trellis && bits == 3)) {
        turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
    }
    if constexpr (trellis && bits == 4) {
        turbo_high_bits(top, merge[0][1], merge[1][1]);
    }
    uint32_t sel[2] = { nibbles, nibbles >> 16 };
    if constexpr (bits > (trellis ? 2 : 3)) {
        turbo_selectors(nibbles, 7, sel[0], sel[1]);  // bit 3 is of an index, too
    }
#    pragma unroll
    for (int i = 0; i < 2; ++i) {
        if constexpr (trellis) {
            merge[i][bits - 2] = books[i];
        }
        w[i] = turbo_mma_lookup<type, form>(sel[i], merge[i]);
    }
}

// Scale of a block in units of turbo_mma_scale_unit. head: of the block.
template <ggml_type type>
static constexpr float turbo_mma_scale_unit = turbo_is_trellis<type> ? 1.0f / TRELLIS_LEVEL_STEPS : 1.0f;

template <ggml_type type> static __device__ __forceinline__ float turbo_mma_scale(const uint32_t head) {
    // a bit behind the scale of a trellis type becomes the sign
    return turbo_is_trellis<type> ? fabsf(turbo_trellis_scale(head)) :
                                    __half2float(__ushort_as_half((unsigned short) head));
}

// Values of two keys in f16, from bytes (key 0, key 0, key 1, key 1) that turbo_mma_levels gives.
template <ggml_type type> struct turbo_mma_scaled {
    static constexpr bool trellis = turbo_is_trellis<type>;
    static constexpr bool as_f16  = turbo_mma_n_levels<type> <= 8;  // looked up as such

    // Else bytes become f16 behind an upper byte, as 1024 + 128 + level or, of trellis types, 16 + 2 + level / 64.
    static constexpr float    bias  = trellis ? -1152.0f / TRELLIS_LEVEL_STEPS : -1152.0f;
    static constexpr uint32_t upper = trellis ? 0x4c4c4c4c : 0x64646464;
    static_assert(TRELLIS_LEVEL_STEPS == 64, "upper byte of trellis types");

    half2 d;
    half2 d_bias;  // trellis types: has 8 bits, so it is exact

    turbo_mma_scaled() = default;

    __device__ __forceinline__ turbo_mma_scaled(const uint32_t head0, const uint32_t head1) {
        uint32_t heads = turbo_permute(head0, head1, 0x5410);
        if constexpr (trellis) {
            heads = heads << 7 & 0x7f807f80u;  // see turbo_trellis_scale
        }
        memcpy(&d, &heads, sizeof(d));
        d_bias = __hmul2(d, make_half2(bias, bias));
    }

    // low, high: bytes; second: of both keys the second one. high: of f16 only
    __device__ __forceinline__ uint32_t operator()(const uint32_t low, const uint32_t high, const bool second) const {
        const uint32_t bits = as_f16 ? turbo_permute(low, high, second ? 0x7351 : 0x6240) :
                                       turbo_permute(low, upper, second ? 0x4341 : 0x4240);
        half2          h;
        memcpy(&h, &bits, sizeof(h));
        if constexpr (as_f16) {
            h = __hmul2(h, d);
        } else if constexpr (trellis) {
            h = __hfma2(h, d, d_bias);
        } else {
            h = __hmul2(__hadd2(h, make_half2(bias, bias)), d);  // not one step: bias * d would be rounded
        }
        uint32_t y;
        memcpy(&y, &h, sizeof(y));
        return y;
    }
};

#endif  // TURBO_MMA
