#pragma once

// Packed rows as operands of matrix instructions: tiles of 32 rows in shared memory, unpacked to fragments in registers.
//
// A row of matrix A is a key in scores and a channel of V in values. Both products sum over an order of their own: the 32 values of a block
// are summed in the order in which quarters of blocks unpack, keys in that of turbo_mma_key. So no value moves between lanes. What a fragment
// holds is said by functions here and nowhere else; matrix instructions of other makers differ in these only.

#include "decode-warp.cuh"
#include "mma.cuh"

#ifdef TURBO_MMA

// Which of 8 keys is row r of a fragment. A lane has rows 2*part and 2*part + 1 of V, so keys part and part + 4: fewer bank conflicts.
static constexpr TURBO_HOST_DEVICE int turbo_mma_key(const int r) {
    return r / 2 + r % 2 * 4;
}

//
// blocks
//

// Block b of a row. Blocks are an odd number of 2-byte units, so they begin at a word and in the middle of one in turns.
// parity: of b where the compiler knows it, else -1: b may differ between lanes.
template <ggml_type type, int parity> struct turbo_mma_block {
    static_assert(turbo_block_bytes<type> % 4 == 2, "blocks begin in the middle of words in turns");

    const uint32_t * first;  // the word where it begins
    int              odd;

    __device__ __forceinline__ turbo_mma_block(const uint32_t * row, const int b) :
        first(row + b * turbo_block_bytes<type> / 4),
        odd(parity < 0 ? b % 2 : parity) {}

    // the 2 bytes before the words
    __device__ __forceinline__ uint32_t head() const { return ((const uint16_t *) first)[odd]; }

    __device__ __forceinline__ uint32_t word(const int i) const {
        if constexpr (parity == 1) {
            return first[i + 1];
        } else {
            return __funnelshift_rc(first[i], first[i + 1], 16 + odd * 16);
        }
    }
};

// To the left by n modulo 32.
static __device__ __forceinline__ uint32_t turbo_rotate(const uint32_t x, const int n) {
    return __funnelshift_l(x, x, n);
}

template <ggml_type type>
static constexpr int turbo_mma_n_levels =
    turbo_is_trellis<type> ? 4 << turbo_traits<type>::bits : 1 << turbo_traits<type>::bits;

// Levels among n from first on (trellis types: of the fine codebook, then of the coarse one), as bytes: 4 selectors of turbo_permute and, for more than 8, what turbo_merge needs of further bits.
// flip: these bits of each are flipped.
template <ggml_type type, uint32_t flip, int first = 0, int n = turbo_mma_n_levels<type>>
static __device__ __forceinline__ uint32_t turbo_mma_lookup(const uint32_t sel, const uint32_t * merge) {
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
        return turbo_merge(turbo_mma_lookup<type, flip, first, n / 2>(sel, merge),
                           turbo_mma_lookup<type, flip, first + n / 2, n / 2>(sel, merge), merge[n / 32]);
    }
}

// Quarters q0 and, if n is 2, q0 + 2 of a block, or of one of the halves of a trellis block: two words each, those that turbo_quarter_word
// counts. half and q0 may differ between lanes.
template <ggml_type type, uint32_t flip, int n, int parity>
static __device__ __forceinline__ void turbo_mma_unpack(const turbo_mma_block<type, parity> & block,
                                                        const int                             half,
                                                        const int                             q0,
                                                        uint32_t (&w)[n][2]) {
    constexpr int bits  = turbo_traits<type>::bits;
    constexpr int words = turbo_traits<type>::words;

    // pairs: of bits, of quarter q0 in the low halves of nibbles, of q0 + 2 in the high ones
    uint32_t           pairs = 0, low = 0, high = 0;
    turbo_trellis_half shared = {};
    if constexpr (turbo_is_trellis<type>) {
        shared = turbo_read_half(block.word(half), block.word(1 - half), block.head() >> (8 + 4 * half));
        pairs  = (shared.z0 >> q0 & 0x55555555u) | (turbo_rotate(shared.z1, 1 - q0) & 0xaaaaaaaau);
        low    = bits >= 3 ? block.word(2 + 2 * half + q0 % 2) : 0;
        high   = bits != 3 ? block.word(words - 2 + half) : 0;
    } else if constexpr (bits < 4) {
        pairs = block.word(q0 % 2);
        high  = bits == 3 ? block.word(words - 1) : 0;
        pairs = n == 2 ? pairs : pairs >> 2 * (q0 / 2);
    }
#    pragma unroll
    for (int j = 0; j < n; ++j) {
        const int q = q0 + 2 * j;

        uint32_t nibbles     = 0;
        uint32_t merge[2][3] = {};
        if constexpr (!turbo_is_trellis<type> && bits == 4) {
            nibbles = block.word(q);
            turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
        } else {
            uint32_t above = 0;  // the pair, in the high halves of nibbles
            if constexpr (turbo_is_trellis<type> && bits >= 3) {
                above = turbo_rotate(low, n == 2 ? 2 - 2 * j : 2 - q0 / 2 * 2);
            } else if constexpr (bits == 3 || turbo_is_trellis<type>) {
                above = turbo_rotate(high, 2 - q);
            }
            constexpr uint32_t used = turbo_is_trellis<type> && bits >= 3 ? 0xccccccccu : 0x44444444u;

            nibbles = (pairs >> 2 * j & 0x33333333u) | (above & used);
            if constexpr (turbo_is_trellis<type> && bits >= 3) {
                turbo_high_bits(nibbles, merge[0][0], merge[1][0]);
            }
            if constexpr (turbo_is_trellis<type> && bits == 4) {
                turbo_high_bits(turbo_rotate(high, 3 - q), merge[0][1], merge[1][1]);
            }
        }

        uint32_t sel[2];
        turbo_selectors(nibbles, 7, sel[0], sel[1]);
#    pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (turbo_is_trellis<type>) {
                merge[i][bits - 2] = shared.books[i];
            }
            w[j][i] = turbo_mma_lookup<type, flip>(sel[i], merge[i]);
        }
    }
}

template <ggml_type type> static __device__ __forceinline__ half turbo_mma_scale(const uint32_t head) {
    if constexpr (turbo_is_trellis<type>) {
        return __float2half(turbo_trellis_scale(head & 0xff) * (1.0f / TRELLIS_LEVEL_STEPS));
    } else {
        return __ushort_as_half((unsigned short) head);
    }
}

//
// tiles
//

// TURBO_TILE rows of D values of a packed type in shared memory.
template <ggml_type type, int D> struct turbo_mma_tile {
    static constexpr int bytes = D / turbo_block_values(type) * turbo_block_bytes<type>;              // of a row
    static constexpr int width = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;  // of a copy
    static constexpr int words = width == 2 ? (bytes + 3) / 4 : bytes / 4;                            // of a row

    static constexpr int lanes         = bytes / width;                                               // for a row
    static constexpr int rows_per_pass = TURBO_WARP / lanes;
    static constexpr int n_passes      = (TURBO_TILE + rows_per_pass - 1) / rows_per_pass;

    const uint32_t * rows;

    const __device__ __forceinline__ uint32_t * row(const int key) const { return rows + key * words; }

    // Starts copies of whole rows, whose addresses suit the width.
    static __device__ __forceinline__ void load(uint32_t * dst, const char * src, const int stride) {
        if constexpr (width > 2) {
            const int row0 = threadIdx.x / lanes;
            const int col  = threadIdx.x % lanes;
            if (row0 >= rows_per_pass) {
                return;
            }
            src += row0 * stride + col * width;
            dst += row0 * words + col * (width / 4);
#    pragma unroll
            for (int i = 0; i < n_passes; ++i) {
                // the last pass may have fewer rows than the others: it copies the last ones
                const int row = min(i * rows_per_pass, TURBO_TILE - rows_per_pass);
                turbo_async_copy<width>(dst + row * words, src + (int64_t) row * stride);
            }
        }
    }

    // Copies rows at any address. Those from n_valid on are read as the last valid one.
    static __device__ __forceinline__ void copy(uint32_t * dst, const char * src, const int stride, const int n_valid) {
        constexpr int units = bytes / 2;
#    pragma unroll 4
        for (int i0 = 0; i0 < TURBO_TILE * units; i0 += TURBO_WARP) {
            const int i   = i0 + threadIdx.x;
            const int row = i / units;
            const int col = i % units;

            ((uint16_t *) (dst + row * words))[col] =
                ((const uint16_t *) (src + (int64_t) min(row, n_valid - 1) * stride))[col];
        }
    }
};

// The same of f16, which stays in global memory: a lane reads 16 bytes where it needs them.
template <int D> struct turbo_mma_tile<GGML_TYPE_F16, D> {
    static constexpr int words = 0;

    const char * rows;
    int64_t      stride;
    int          n_valid;
    bool         aligned;  // to 16 bytes

    // Values 8*i .. 8*i + 7 of a row.
    __device__ __forceinline__ void read(const int key, const int i, uint32_t (&x)[4]) const {
        const char * src = rows + min(key, n_valid - 1) * stride + i * 16;
        if (aligned) {
            __align__(16) uint32_t y[4];
            ggml_cuda_memcpy_1<16>(y, src);
#    pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[j] = y[j];
            }
        } else {
#    pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[j] = ((const uint16_t *) src)[2 * j] | (uint32_t) ((const uint16_t *) src)[2 * j + 1] << 16;
            }
        }
    }
};

//
// keys
//

// Where some values of a query stand in operand B: which instruction of the group, which part, which register.
struct turbo_mma_place {
    int step, part, reg;
};

// Fragments of 16 keys. A group is the values of a block, which share a scale, and n instructions sum them up; of f16: 32 values.
template <ggml_type type, int D> struct turbo_mma_keys {
    static constexpr int group    = type == GGML_TYPE_F16 ? 32 : turbo_block_values(type);
    static constexpr int n_groups = D / group;
    static constexpr int n        = type == GGML_TYPE_F16 ? 2 : group / 32;

    using tile = turbo_mma_tile<type, D>;

    // Operand A of the instructions of group b, and the scales of keys key0 + turbo_mma_key(row) and, 8 later, of row + 8.
    template <int b>
    static __device__ __forceinline__ void load(const tile & t, const int key0, uint32_t (&a)[n][4], float (&d)[2]) {
        const int part = turbo_mma_part();
#    pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = key0 + 8 * r + turbo_mma_key(turbo_mma_row());
            if constexpr (type == GGML_TYPE_F16) {
                uint32_t x[4];
                t.read(key, 4 * b + part, x);
#    pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[i / 2][r + i % 2 * 2] = x[i];
                }
            } else {
                constexpr bool                     trellis = turbo_is_trellis<type>;
                const turbo_mma_block<type, b % 2> block(t.row(key), b);

                uint32_t w[n][2];
                turbo_mma_unpack<type, 0, n>(block, part / 2, trellis ? part % 2 : part, w);
#    pragma unroll
                for (int i = 0; i < n; ++i) {
                    a[i][r]     = w[i][0];
                    a[i][r + 2] = w[i][1];
                }
                d[r] = __half2float(turbo_mma_scale<type>(block.head()));
            }
        }
    }

    // Of the query's values 4*l .. 4*l + 3 of 32, in the order of turbo_group_order (f16: as they are, in two registers). half: of the group.
    static __device__ __forceinline__ turbo_mma_place place(const int half, const int l) {
        if constexpr (type == GGML_TYPE_F16) {
            return { l % 2, l / 2, 0 };
        } else if constexpr (turbo_is_trellis<type>) {
            return { l / 4, 2 * half + l / 2 % 2, l % 2 };
        } else {
            return { 0, l / 2, l % 2 };
        }
    }
};

//
// values
//

// Fragments of 16 keys of V, transposed: rows are channels. A lane has n quarters of blocks of each of its 4 keys, and channels in chunks of
// 64 * n, of which a fragment has 16.
template <ggml_type type, int D> struct turbo_mma_values {
    static constexpr int n        = D % 128 == 0 ? 2 : 1;
    static constexpr int chunk    = 64 * n;
    static constexpr int n_chunks = D / chunk;
    static constexpr int n_tiles  = chunk / 16;

    using tile = turbo_mma_tile<type, D>;

    // Which channel of a chunk is row row + 8 * r of fragment i.
    static __device__ __forceinline__ int channel(const int i, const int row, const int r) {
        if constexpr (type == GGML_TYPE_F16) {
            return i / 4 * 64 + 8 * row + 2 * (i % 4) + r;
        } else {
            const int q = row % (4 / n) + i / 4 * 2;
            return row / (4 / n) * 32 + turbo_value_order(turbo_quarter_word(q, i / 2 % 2), 2 * (i % 2) + r);
        }
    }

    // Operand A of keys key0 + part + 4*m.
    static __device__ __forceinline__ void load(const tile & t,
                                                const int    key0,
                                                const int    ic,
                                                uint32_t (&a)[n_tiles][4]) {
        if constexpr (type == GGML_TYPE_F16) {
            load_f16(t, key0, ic, a);
        } else {
            load_packed(t, key0, ic, a);
        }
    }

    static __device__ __forceinline__ void load_packed(const tile & t,
                                                       const int    key0,
                                                       const int    ic,
                                                       uint32_t (&a)[n_tiles][4]) {
        constexpr int groups = turbo_block_values(type) / 32;  // of a block

        const int g  = ic * chunk / 32 + turbo_mma_row() / (4 / n);
        const int q0 = turbo_mma_row() % (4 / n);
#    pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            uint32_t w[2][n][2];
            half     d[2];
#    pragma unroll
            for (int m = 0; m < 2; ++m) {
                const turbo_mma_block<type, -1> block(t.row(key0 + turbo_mma_part() + 4 * (2 * pair + m)), g / groups);
                turbo_mma_unpack<type, 0x80, n>(block, g % groups, q0, w[m]);
                d[m] = turbo_mma_scale<type>(block.head());
            }
            const half2 d2 = __halves2half2(d[0], d[1]);
#    pragma unroll
            for (int i = 0; i < n_tiles; ++i) {
                const uint32_t bytes = turbo_permute(w[0][i / 4][i / 2 % 2], w[1][i / 4][i / 2 % 2],
                                                     i % 2 == 0 ? 0x5140 : 0x7362);  // two values of both keys
                a[i][2 * pair]       = scaled(turbo_permute(bytes, 0x64646464, 0x4140), d2);
                a[i][2 * pair + 1]   = scaled(turbo_permute(bytes, 0x64646464, 0x4342), d2);
            }
        }
    }

    // x: the bits of 1024 + 128 + level, as half2; two instructions, since 1152 * d is no f16
    static __device__ __forceinline__ uint32_t scaled(const uint32_t x, const half2 d) {
        half2 h;
        memcpy(&h, &x, sizeof(h));
        h = (h + make_half2(-1152.0f, -1152.0f)) * d;
        uint32_t y;
        memcpy(&y, &h, sizeof(y));
        return y;
    }

    static __device__ __forceinline__ void load_f16(const tile & t,
                                                    const int    key0,
                                                    const int    ic,
                                                    uint32_t (&a)[n_tiles][4]) {
#    pragma unroll
        for (int j = 0; j < n; ++j) {
            uint32_t x[4][4];
#    pragma unroll
            for (int m = 0; m < 4; ++m) {
                t.read(key0 + turbo_mma_part() + 4 * m, (ic * n + j) * 8 + turbo_mma_row(), x[m]);
            }
#    pragma unroll
            for (int i = 0; i < 4; ++i) {
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    a[4 * j + i][r] = turbo_permute(x[r / 2 * 2][i], x[r / 2 * 2 + 1][i], r % 2 == 0 ? 0x5410 : 0x7632);
                }
            }
        }
    }
};

#endif  // TURBO_MMA
