#pragma once

// Packed rows as operand B of AMD's matrix instructions: tiles of 32 rows in shared memory, unpacked to fragments in registers.
//
// A line of B is a key in scores and a channel of V in values; lines of A are columns. Scores sum over an order of their own, in which a lane
// makes its half of an operand from what it unpacks: two quarters of a block. Values go through shared memory, since a register of operand B
// has the same channel of two keys.

#include "decode-warp.cuh"
#include "wmma-blocks.cuh"

#ifdef TURBO_WMMA

//
// tiles
//

// TURBO_TILE rows of D values of a packed type, one after the other in shared memory.
template <ggml_type type, int D> struct turbo_wmma_tile {
    using spans  = turbo_spans<type, D, 1, false>;
    using loader = turbo_tile_loader<spans, TURBO_TILE, spans::n, false, 24>;

    static constexpr int words = spans::n * spans::words;  // of a row
    static_assert(spans::n == 1 || spans::words * 4 == spans::bytes, "no gaps between spans");

    const uint32_t * rows;

    const __device__ __forceinline__ uint32_t * row(const int key) const { return rows + key * words; }
};

// The same of f16, which stays in global memory, aligned to 16 bytes: a lane reads up to 16 of them where it needs them.
template <int D> struct turbo_wmma_tile<GGML_TYPE_F16, D> {
    static constexpr int words = 0;

    const char * rows;
    int64_t      stride;
    int          n_valid;

    // n registers from byte at on.
    template <int n> __device__ __forceinline__ void read(const int key, const int at, uint32_t * x) const {
        __align__(16) uint32_t y[n];
        ggml_cuda_memcpy_1<4 * n>(y, rows + min(key, n_valid - 1) * stride + at);
#    pragma unroll
        for (int i = 0; i < n; ++i) {
            x[i] = y[i];
        }
    }
};

//
// keys
//

// Fragments of 16 keys. A group is the values of a block, which share a scale, and n instructions sum them up; of f16: 32 values.
template <ggml_type type, int D> struct turbo_wmma_keys {
    static constexpr bool packed   = type != GGML_TYPE_F16;
    static constexpr int  group    = packed ? turbo_block_values(type) : 32;
    static constexpr int  n_groups = D / group;
    static constexpr int  n        = group / 16;
    static constexpr int  n_own    = packed ? 2 : 4;  // registers that hold half of an operand
    static constexpr int  n_regs   = n_own * TURBO_WMMA_COPIES;

    static constexpr float scale_unit = 1.0f;  // of scales that load gives

    using tile = turbo_wmma_tile<type, D>;

    // Operand B of the instructions of group b, and the scale. key: of this lane's line
    template <int b>
    static __device__ __forceinline__ void load(const tile & t, const int key, uint32_t (&x)[n][n_regs], float & d) {
        if constexpr (packed) {
            const turbo_packed_block<type, b % 2> block(t.row(key), b);
#    pragma unroll
            for (int s = 0; s < group / 32; ++s) {
                uint32_t w[2][2];
                turbo_wmma_unpack<type, 0>(block, s, turbo_wmma_half(), w);
                turbo_wmma_operand(x[2 * s], w[0]);
                turbo_wmma_operand(x[2 * s + 1], w[1]);
            }
            d = __half2float(turbo_wmma_scale<type>(block.head()));
        } else {
#    pragma unroll
            for (int i = 0; i < n; ++i) {
#    pragma unroll
                for (int j = 0; j < TURBO_WMMA_COPIES; ++j) {
                    const int h = TURBO_WMMA_COPIES == 2 ? j : turbo_wmma_half();
                    t.template read<4>(key, (b * group + i * 16 + h * 8) * (int) sizeof(half), &x[i][4 * j]);
                }
            }
        }
    }

    // Where the query's values 4*l .. 4*l + 3 of 32, in the order of turbo_group_order (f16: as they are, in two registers), begin in
    // operand A of a block, [group][column][half][instruction][register of a half], and where the scale is. s: of the 32 in the group.
    template <int n_cols>
    static __device__ __forceinline__ int query_word(const int b, const int c, const int s, const int l) {
        const int half = packed ? l % 2 : l / 2 % 2;
        const int step = packed ? 2 * s + l / 2 % 2 : l / 4;
        const int reg  = packed ? l / 4 : l % 2 * 2;
        return (((b * n_cols + c) * 2 + half) * n + step) * n_own + reg;
    }

    template <int n_cols> static __device__ __forceinline__ int scale_of(const int b, const int c) {
        return (b * 2 + c % 2) * (n_cols / 2) + c / 2;
    }
};

//
// values
//

// Fragments of V: 16 channels and 16 keys. Keys x and x + 16 of a tile share a register.
template <ggml_type type, int D> struct turbo_wmma_values {
    static constexpr bool packed   = type != GGML_TYPE_F16;
    static constexpr int  chunk    = D % 128 == 0 ? 128 : 64;
    static constexpr int  n_chunks = D / chunk;
    static constexpr int  n        = chunk / 16;  // fragments of a chunk, and channels of a lane

    // Packed values are unpacked to shared memory, where each lane has 32 channels of two keys: all of them, or half of them, in one pass.
    static constexpr int groups      = chunk / 32;
    static constexpr int pairs       = TURBO_WARP / groups;  // of keys
    static constexpr int n_passes    = 16 / pairs;           // for a tile and a chunk
    static constexpr int group_words = 32 * pairs + pairs;   // [channel][pair], and room against bank conflicts
    static constexpr int tile_words  = packed ? groups * group_words : 0;

    using tile = turbo_wmma_tile<type, D>;

    // Which channel of a chunk is line line of fragment i. In f16 a lane has neighbours.
    static __device__ __forceinline__ int channel(const int i, const int line) {
        return packed ? 16 * i + line : n * line + i;
    }

    // Unpacks chunk ic of pairs of keys from pass * pairs on.
    static __device__ __forceinline__ void unpack(const tile & t, const int pass, const int ic, uint32_t * dst) {
        constexpr int block_groups = turbo_block_values(type) / 32;

        const int lane = turbo_wmma_here<(D > 128)>((int) threadIdx.x);
        const int key  = pass * pairs + lane % pairs;
        const int g    = ic * groups + lane / pairs;

        dst += lane / pairs * group_words + lane % pairs;

        uint32_t w[2][2][2][2];  // [key][q0][quarter q0 + 2*j][word]
        uint32_t d[2];
#    pragma unroll
        for (int i = 0; i < 2; ++i) {
            const turbo_packed_block<type, -1> block(t.row(key + 16 * i), g / block_groups);
            turbo_wmma_unpack<type, 0x80>(block, g % block_groups, 0, w[i][0]);
            turbo_wmma_unpack<type, 0x80>(block, g % block_groups, 1, w[i][1]);
            d[i] = __half_as_ushort(turbo_wmma_scale<type>(block.head()));
        }
        const uint32_t d2 = d[0] | d[1] << 16;
#    pragma unroll
        for (int q = 0; q < 4; ++q) {
#    pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t a = w[0][q % 2][q / 2][j];
                const uint32_t b = w[1][q % 2][q / 2][j];

#    pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t bytes =
                        turbo_permute(a, b, i < 2 ? 0x05010400 : 0x07030602);  // two channels of both keys
                    const uint32_t bits = turbo_permute(bytes, 0x64646464, i % 2 == 0 ? 0x04010400 : 0x04030402);

                    dst[turbo_value_order(turbo_quarter_word(q, j), i) * pairs] = turbo_wmma_scaled(bits, d2);
                }
            }
            turbo_sched_fence();
        }
    }

    // Operand B of fragments f0 .. f0 + 3, for pairs of keys pair0 .. pair0 + 7 of a tile. unpacked: what unpack has left, of the pass that
    // has them.
    static __device__ __forceinline__ void load(const tile &     t,
                                                const uint32_t * unpacked,
                                                int              pair0,
                                                const int        ic,
                                                const int        f0,
                                                uint32_t (&x)[4][TURBO_WMMA_F16]) {
        pair0 += TURBO_WMMA_COPIES == 2 ? 0 : 4 * turbo_wmma_half();
        if constexpr (packed) {
            const uint32_t * src = unpacked + turbo_wmma_line() * pairs + pair0 % pairs;
#    pragma unroll
            for (int i = 0; i < 4; ++i) {
                turbo_copy<sizeof(x[i])>(x[i], src + (f0 + i) / 2 * group_words + i % 2 * 16 * pairs);
            }
        } else {
#    pragma unroll
            for (int r = 0; r < TURBO_WMMA_F16; ++r) {
                read_f16(t, pair0 + r, ic, f0, r, x);
            }
        }
    }

    // Register r of four fragments.
    static __device__ __forceinline__ void read_f16(const tile & t,
                                                    const int    pair,
                                                    const int    ic,
                                                    const int    f0,
                                                    const int    r,
                                                    uint32_t (&x)[4][TURBO_WMMA_F16]) {
        const int at = (ic * chunk + n * turbo_wmma_line() + f0) * (int) sizeof(half);

        uint32_t y[2][2];
        t.template read<2>(pair, at, y[0]);
        t.template read<2>(pair + 16, at, y[1]);
#    pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i][r] = turbo_permute(y[0][i / 2], y[1][i / 2], i % 2 == 0 ? 0x05040100 : 0x07060302);
        }
    }
};

#endif  // TURBO_WMMA
