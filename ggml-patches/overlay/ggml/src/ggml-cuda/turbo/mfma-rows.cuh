#pragma once

// Packed rows as operand A of the matrix instructions of AMD's CDNA3: tiles of 64 rows in shared memory, unpacked to fragments in registers.
//
// A row of A is a key in scores and a channel of V in values; columns of B are columns of the block. In scores a lane has a quarter of a block
// of the key of its line (trellis types: two quarters of one half), which is what one unpacking gives. In values it has the quarter of its line
// of four keys, which are its part of the sum over keys. So no value moves between lanes, and probabilities, which come out of the scores with
// a column in a lane, are operand B as they are.

#include "mfma.cuh"
#include "wmma-rows.cuh"

#ifdef TURBO_MFMA

static constexpr int TURBO_MFMA_TILE = 2 * TURBO_TILE;  // keys of a tile: those of both halves of the wave

//
// quarters
//

// Quarter q of a block, or of one of the halves of a trellis block: the two words that turbo_quarter_word counts. half and q may differ
// between lanes.
template <ggml_type type, uint32_t flip, int parity>
static __device__ __forceinline__ void turbo_mfma_unpack(const turbo_packed_block<type, parity> & block,
                                                         const int                                half,
                                                         const int                                q,
                                                         uint32_t (&w)[2]) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        GGML_UNUSED(half);
#    pragma unroll
        for (int i = 0; i < 2; ++i) {
            w[i] = block.word(turbo_quarter_word(q, i)) ^ flip * 0x01010101u;
        }
    } else {
        constexpr bool trellis = turbo_is_trellis<type>;
        constexpr int  bits    = turbo_traits<type>::bits;
        constexpr int  words   = turbo_traits<type>::words;

        uint32_t nibbles     = 0;
        uint32_t merge[2][3] = {};
        if constexpr (!trellis && bits == 4) {
            nibbles = block.word(q);
        } else {
            // the lower two bits of indices, in place, and those above
            uint32_t pairs, above = 0;
            if constexpr (trellis) {
                const turbo_trellis_half shared =
                    turbo_read_half(block.word(half), block.word(1 - half), block.head() >> (8 + 4 * half));
                pairs = (shared.z0 >> q & 0x11111111u) | (turbo_wmma_rotate(shared.z1, 1 - q) & 0x22222222u);
                merge[0][bits - 2] = shared.books[0];
                merge[1][bits - 2] = shared.books[1];
            } else {
                pairs = block.word(q % 2) >> q / 2 * 2 & 0x33333333u;
            }
            if constexpr (trellis && bits >= 3) {
                above = turbo_wmma_rotate(block.word(2 + 2 * half + q % 2), 2 - q / 2 * 2);
            } else if constexpr (trellis || bits == 3) {
                above = turbo_wmma_rotate(block.word(trellis ? words - 2 + half : words - 1), 2 - q);
            }
            nibbles = pairs | (above & 0xccccccccu);
        }
        if constexpr (bits == 4 || (trellis && bits == 3)) {
            turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
        }
        if constexpr (trellis && bits == 4) {
            turbo_high_bits(turbo_wmma_rotate(block.word(words - 2 + half), 3 - q), merge[0][1], merge[1][1]);
        }

        uint32_t sel[2];
        turbo_selectors(nibbles, 7, sel[0], sel[1]);
#    pragma unroll
        for (int i = 0; i < 2; ++i) {
            w[i] = turbo_wmma_lookup<type, flip>(sel[i], merge[i]);
        }
    }
}

//
// keys
//

// Fragments of 16 keys. A group is the values of a block, which share a scale, and n instructions sum them up; of f16: 32 values.
template <ggml_type type, int D> struct turbo_mfma_keys {
    static constexpr bool packed   = type != GGML_TYPE_F16;
    static constexpr int  group    = packed ? turbo_block_values(type) : 32;
    static constexpr int  n_groups = D / group;
    static constexpr int  n        = packed ? group / 32 : 2;

    static constexpr float scale_unit = 1.0f;  // of those that scale gives

    using tile = turbo_wmma_tile<type, D>;

    // Operand A of the instructions of group b. key: of this lane's line
    template <int b> static __device__ __forceinline__ void load(const tile & t, const int key, uint32_t (&x)[n][2]) {
        if constexpr (packed) {
            const turbo_packed_block<type, b % 2> block(t.row(key), b);
            if constexpr (turbo_is_trellis<type>) {
                turbo_wmma_unpack<type, 0>(block, turbo_mfma_part() / 2, turbo_mfma_part() % 2, x);
            } else {
                turbo_mfma_unpack<type, 0>(block, 0, turbo_mfma_part(), x[0]);
            }
        } else {
            uint32_t y[4];
            t.template read<4>(key, (b * group + 8 * turbo_mfma_part()) * (int) sizeof(half), y);
#    pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i / 2][i % 2] = y[i];
            }
        }
    }

    // Of group b.
    template <int b> static __device__ __forceinline__ half scale(const tile & t, const int key) {
        return turbo_wmma_scale<type>(turbo_packed_block<type, b % 2>(t.row(key), b).head());
    }

    // Where the query's values 4*l .. 4*l + 3 of 32, in the order of turbo_group_order (f16: as they are, in two registers), begin in
    // operand B of a group, [group][column][part][instruction][register], and where the scale is. s: of the 32 in the group.
    template <int n_cols>
    static __device__ __forceinline__ int query_word(const int b, const int c, const int s, const int l) {
        const int part = !packed ? l / 2 : n == 2 ? 2 * s + l % 2 : l % 4;
        const int step = !packed ? l % 2 : n == 2 ? l / 2 % 2 : 0;
        const int reg  = packed ? l / 4 : 0;
        return (((b * n_cols + c) * 4 + part) * n + step) * 2 + reg;
    }

    template <int n_cols> static __device__ __forceinline__ int scale_of(const int b, const int c) {
        return b * n_cols + c;
    }
};

//
// values
//

// Fragments of V: 16 channels and 16 keys.
template <ggml_type type, int D> struct turbo_mfma_values {
    static constexpr bool packed   = type != GGML_TYPE_F16;
    static constexpr int  chunk    = D % 128 == 0 ? 128 : 64;
    static constexpr int  n_chunks = D / chunk;
    static constexpr int  n =
        chunk / 16;  // fragments of a chunk, and channels of a lane: a quarter of a block, or half of one
    static constexpr int quarters = chunk / 8;

    using tile = turbo_wmma_tile<type, D>;

    // Which channel of a chunk is line line of fragment i. In f16 a lane has neighbours.
    static __device__ __forceinline__ int channel(const int i, const int line) {
        if constexpr (packed) {
            const int q = line % quarters;
            return q / 4 * 32 + turbo_value_order(turbo_quarter_word(q % 4, i / 4 + line / quarters), i % 4);
        } else {
            return n * line + i;
        }
    }

    // Operand A of the fragments of chunk ic, of keys key0 .. key0 + 15.
    static __device__ __forceinline__ void load(const tile & t, const int key0, const int ic, uint32_t (&x)[n][2]) {
        const int line = turbo_wmma_line();
        const int key  = key0 + 4 * turbo_mfma_part();
        if constexpr (packed) {
            constexpr int block_groups = turbo_block_values(type) / 32;

            const int q = line % quarters;
            const int g = ic * (chunk / 32) + q / 4;

#    pragma unroll
            for (int r = 0; r < 2; ++r) {
                uint32_t w[2][2];
                uint32_t d[2];
#    pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const turbo_packed_block<type, -1> block(t.row(key + 2 * r + k), g / block_groups);
                    turbo_mfma_unpack<type, 0x80>(block, g % block_groups, q % 4, w[k]);
                    d[k] = __half_as_ushort(turbo_wmma_scale<type>(block.head()));
                    if constexpr (n == 4) {
                        w[k][0] ^= (w[k][0] ^ w[k][1]) & (line < quarters ? 0 : 0xffffffff);
                    }
                }
                const uint32_t d2 = d[0] | d[1] << 16;
#    pragma unroll
                for (int i = 0; i < n; ++i) {
                    // two channels of both keys
                    const uint32_t bytes = turbo_permute(w[0][i / 4], w[1][i / 4], i % 4 < 2 ? 0x05010400 : 0x07030602);
                    const uint32_t bits  = turbo_permute(bytes, 0x64646464, i % 2 == 0 ? 0x04010400 : 0x04030402);

                    x[i][r] = turbo_wmma_scaled(bits, d2);
                }
                turbo_sched_fence();
            }
        } else {
            uint32_t y[4][n / 2];
#    pragma unroll
            for (int k = 0; k < 4; ++k) {
                t.template read<n / 2>(key + k, (ic * chunk + n * line) * (int) sizeof(half), y[k]);
            }
#    pragma unroll
            for (int i = 0; i < n; ++i) {
#    pragma unroll
                for (int r = 0; r < 2; ++r) {
                    x[i][r] = turbo_permute(y[2 * r][i / 2], y[2 * r + 1][i / 2], i % 2 == 0 ? 0x05040100 : 0x07060302);
                }
            }
        }
    }
};

#endif  // TURBO_MFMA
