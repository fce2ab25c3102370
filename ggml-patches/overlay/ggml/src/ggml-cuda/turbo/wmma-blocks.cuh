#pragma once

// Blocks of packed rows in shared memory, unpacked by quarters to operands of AMD's matrix instructions.

#include "packed-block.cuh"

#ifdef TURBO_WMMA

static_assert(TURBO_SELECTOR_BITS == 8, "which quarter has which values");

// To the left by n modulo 32.
static __device__ __forceinline__ uint32_t turbo_wmma_rotate(const uint32_t x, const int n) {
    return x << (n & 31) | x >> (-n & 31);
}

template <ggml_type type>
static constexpr int turbo_wmma_n_levels =
    turbo_is_trellis<type> ? 4 << turbo_traits<type>::bits : 1 << turbo_traits<type>::bits;

// Levels among n from first on, as bytes: 4 selectors of turbo_permute and, for more than 8, what turbo_merge needs of further bits.
// flip: these bits of each are flipped.
template <ggml_type type, uint32_t flip, int first = 0, int n = turbo_wmma_n_levels<type>>
static __device__ __forceinline__ uint32_t turbo_wmma_lookup(const uint32_t sel, const uint32_t * merge) {
    if constexpr (n <= 8) {
        constexpr int      high = first + n - 4;
        constexpr uint32_t a    = turbo_pack4(turbo_traits<type>::level(first), turbo_traits<type>::level(first + 1),
                                              turbo_traits<type>::level(first + 2), turbo_traits<type>::level(first + 3)) ^
                               flip * 0x01010101u;
        constexpr uint32_t b = turbo_pack4(turbo_traits<type>::level(high), turbo_traits<type>::level(high + 1),
                                           turbo_traits<type>::level(high + 2), turbo_traits<type>::level(high + 3)) ^
                               flip * 0x01010101u;
        return turbo_permute(a, b, sel);
    } else {
        return turbo_merge(turbo_wmma_lookup<type, flip, first, n / 2>(sel, merge),
                           turbo_wmma_lookup<type, flip, first + n / 2, n / 2>(sel, merge), merge[n / 32]);
    }
}

// Quarters q0 and q0 + 2 of a block, or of one of the halves of a trellis block: two words each, those that turbo_quarter_word counts. half
// and q0 may differ between lanes.
template <ggml_type type, uint32_t flip, int parity>
static __device__ __forceinline__ void turbo_wmma_unpack_packed(const turbo_packed_block<type, parity> & block,
                                                                const int                                half,
                                                                const int                                q0,
                                                                uint32_t (&w)[2][2]) {
    constexpr int bits  = turbo_traits<type>::bits;
    constexpr int words = turbo_traits<type>::words;

    // pairs: of bits, of quarter q0 in the low halves of nibbles, of q0 + 2 in the high ones
    uint32_t           pairs = 0, low = 0, high = 0;
    turbo_trellis_half shared = {};
    if constexpr (turbo_is_trellis<type>) {
        shared = turbo_read_half(block.word(half), block.word(1 - half), block.head() >> (8 + 4 * half));
        pairs  = (shared.z0 >> q0 & 0x55555555u) | (turbo_wmma_rotate(shared.z1, 1 - q0) & 0xaaaaaaaau);
        low    = bits >= 3 ? block.word(2 + 2 * half + q0) : 0;
        high   = bits != 3 ? block.word(words - 2 + half) : 0;
    } else if constexpr (bits < 4) {
        pairs = block.word(q0);
        high  = bits == 3 ? block.word(words - 1) : 0;
    }
#    pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int q = q0 + 2 * j;

        uint32_t nibbles     = 0;
        uint32_t merge[2][3] = {};
        if constexpr (!turbo_is_trellis<type> && bits == 4) {
            nibbles = block.word(q);
            turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
        } else {
            uint32_t above = 0;  // the pair, in the high halves of nibbles
            if constexpr (turbo_is_trellis<type> && bits >= 3) {
                above = turbo_wmma_rotate(low, 2 - 2 * j);
            } else if constexpr (bits == 3 || turbo_is_trellis<type>) {
                above = turbo_wmma_rotate(high, 2 - q);
            }
            // bit 3 need not be of the index: so both masks together need one instruction
            nibbles = (pairs >> 2 * j & 0x33333333u) | (above & 0xccccccccu);
            if constexpr (turbo_is_trellis<type> && bits >= 3) {
                turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
            }
            if constexpr (turbo_is_trellis<type> && bits == 4) {
                turbo_high_bits(turbo_wmma_rotate(high, 3 - q), merge[0][1], merge[1][1]);
            }
        }

        uint32_t sel[2];
        turbo_selectors(nibbles, 7, sel[0], sel[1]);
#    pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (turbo_is_trellis<type>) {
                merge[i][bits - 2] = shared.books[i];
            }
            w[j][i] = turbo_wmma_lookup<type, flip>(sel[i], merge[i]);
        }
    }
}

// The same of any type in blocks. q8_0 is in order already, which is that of unpacked words.
template <ggml_type type, uint32_t flip, int parity>
static __device__ __forceinline__ void turbo_wmma_unpack(const turbo_packed_block<type, parity> & block,
                                                         const int                                half,
                                                         const int                                q0,
                                                         uint32_t (&w)[2][2]) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        GGML_UNUSED(half);
#    pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[i / 2][i % 2] = block.word(turbo_quarter_word(q0 + i / 2 * 2, i % 2)) ^ flip * 0x01010101u;
        }
    } else {
        turbo_wmma_unpack_packed<type, flip>(block, half, q0, w);
    }
}

template <ggml_type type> static __device__ __forceinline__ half turbo_wmma_scale(const uint32_t head) {
    if constexpr (turbo_is_trellis<type>) {
        return __float2half(turbo_trellis_scale(head & 0xff) * (1.0f / TRELLIS_LEVEL_STEPS));
    } else {
        return __ushort_as_half((unsigned short) head);
    }
}

#endif  // TURBO_WMMA
