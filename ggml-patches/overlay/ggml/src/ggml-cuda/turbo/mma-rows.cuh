#pragma once

// Packed rows as operands of matrix instructions: tiles of 32 rows in shared memory, unpacked to fragments in registers.
//
// A row of matrix A is a key in scores and a channel of V in values. Both products sum over an order of their own: the 32 values of a block
// are summed in the order in which quarters of blocks unpack, keys in that of turbo_mma_key. So no value moves between lanes. What a fragment
// holds is said by functions here and nowhere else; matrix instructions of other makers differ in these only.

#include "mma-blocks.cuh"

#include <type_traits>

#ifdef TURBO_MMA

// Which of 8 keys is row r of a fragment. A lane has rows 2*part and 2*part + 1 of V, so keys part and part + 4: fewer bank conflicts.
static constexpr TURBO_HOST_DEVICE int turbo_mma_key(const int r) {
    return r / 2 + r % 2 * 4;
}

//
// tiles
//

// Words between rows of so many words, against bank conflicts: reads of K meet no bank twice then, or turbo3t 1.3 times; those of V
// 1 to 1.7 times. Without, it would be up to 2 and 3.3 times. A block of q8_0 is even further from the next, so 2 times are the least.
template <ggml_type type> static constexpr int turbo_mma_pad(const int words, const bool is_V) {
    return type == GGML_TYPE_Q8_0    ? (words == 17 ? 3 : 6) :
           words == 9 || words == 13 ? 1 :
           words == 26               ? 2 :
           words == 18               ? (is_V ? 4 : 2) :
           !is_V                     ? 0 :
           words == 10               ? 2 :
           words == 14               ? 10 :
           words == 28               ? 12 :
           words == 36               ? 4 :
                                       0;
}

// TURBO_TILE rows of D values of a packed type in shared memory.
template <ggml_type type, int D, bool is_V> struct turbo_mma_tile {
    static constexpr int bytes = D / turbo_block_values(type) * turbo_block_bytes<type>;              // of a row
    static constexpr int width = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;  // of a copy
    static constexpr int words = (bytes + 3) / 4 + turbo_mma_pad<type>((bytes + 3) / 4, is_V);        // from row to row
    static_assert(width == 2 || words * 4 % width == 0, "rows suit the copies");

    static constexpr int lanes         = bytes / width;  // for a row
    static constexpr int rows_per_pass = TURBO_WARP / lanes;
    static constexpr int n_passes      = (TURBO_TILE + rows_per_pass - 1) / rows_per_pass;

    const uint32_t * rows;

    const __device__ __forceinline__ uint32_t * row(const int key) const { return rows + key * words; }

    // Where this lane begins with a copy of whole rows: bytes from the first row on, and words in shared memory.
    static __device__ __forceinline__ int lane_bytes(const int stride) {
        return width > 2 ? threadIdx.x / lanes * stride + threadIdx.x % lanes * width : 0;
    }

    static __device__ __forceinline__ int lane_words() {
        return width > 2 ? threadIdx.x / lanes * words + threadIdx.x % lanes * (width / 4) : 0;
    }

    // Starts copies of whole rows, whose addresses suit the width. dst, src: of this lane.
    static __device__ __forceinline__ void load(uint32_t * dst, const char * src, const int stride) {
        if constexpr (width > 2) {
            if (rows_per_pass * lanes == TURBO_WARP || threadIdx.x < rows_per_pass * lanes) {
                load_passes(dst, src, stride);
            }
        }
    }

    // The last pass may have fewer rows than the others: it copies the last ones.
    static constexpr TURBO_HOST_DEVICE int first_row(const int pass) {
        return pass + 1 < n_passes ? pass * rows_per_pass : TURBO_TILE - rows_per_pass;
    }

    template <int i = 0>
    static __device__ __forceinline__ void load_passes(uint32_t * dst, const char * src, const int stride) {
        turbo_async_copy<width>(dst + first_row(i) * words, src);
        if constexpr (i + 1 < n_passes) {
            load_passes<i + 1>(dst, turbo_row_at<first_row(i + 1) - first_row(i)>(src, stride), stride);
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

// The same of f16, which stays in global memory: a lane reads 16 bytes where it needs them, to which rows are aligned.
template <int D, bool is_V> struct turbo_mma_tile<GGML_TYPE_F16, D, is_V> {
    static constexpr int words = 0;

    const char * rows;
    int64_t      stride;
    int          n_valid;

    // Values 8*i .. 8*i + 7 of a row.
    __device__ __forceinline__ void read(const int key, const int i, uint32_t (&x)[4]) const {
        __align__(16) uint32_t y[4];
        ggml_cuda_memcpy_1<16>(y, rows + min(key, n_valid - 1) * stride + i * 16);
#    pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[j] = y[j];
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

// Fragments of 16 keys. A group is 64 values, for which the query has a scale; n instructions sum it up. It is one block of a trellis type,
// two blocks of a scalar one, whose sums stay apart; of f16: 32 values.
template <ggml_type type, int D> struct turbo_mma_keys {
    static constexpr int group    = type == GGML_TYPE_F16 ? 32 : 64;
    static constexpr int n_groups = D / group;
    static constexpr int n        = 2;
    static constexpr int n_blocks = type == GGML_TYPE_F16 ? 1 : group / turbo_block_values(type);

    using tile = turbo_mma_tile<type, D, false>;

    static constexpr float scale_unit = type == GGML_TYPE_F16 ? 1.0f : turbo_mma_scale_unit<type>;

    // Operand A of the instructions of group b, and scales of its blocks, in scale_unit, of keys key0 + turbo_mma_key(row) and, 8 later, of
    // row + 8.
    template <int b>
    static __device__ __forceinline__ void load(const tile & t,
                                                const int    key0,
                                                uint32_t (&a)[n][4],
                                                float (&d)[n_blocks][2]) {
#    pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = key0 + 8 * r + turbo_mma_key(turbo_mma_row());
            if constexpr (type == GGML_TYPE_F16) {
                uint32_t x[4];
                t.read(key, 4 * b + turbo_mma_part(), x);
#    pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[i / 2][r + i % 2 * 2] = x[i];
                }
            } else {
                load_block<n_blocks * b, 0>(t.row(key), r, a, d);
                if constexpr (n_blocks == 2) {
                    load_block<n_blocks * b + 1, 1>(t.row(key), r, a, d);
                }
            }
        }
    }

    // Block b of a row, which is block m of its group.
    template <int b, int m>
    static __device__ __forceinline__ void load_block(const uint32_t * row,
                                                      const int        r,
                                                      uint32_t (&a)[n][4],
                                                      float (&d)[n_blocks][2]) {
        constexpr bool trellis = turbo_is_trellis<type>;
        constexpr int  n_of    = n / n_blocks;  // instructions of the block

        const int                             part = turbo_mma_part();
        const turbo_packed_block<type, b % 2> block(row, b);
        const uint32_t                        head = block.head();

        if constexpr (type == GGML_TYPE_Q8_0) {
            a[m][r]     = block.word(2 * part);
            a[m][r + 2] = block.word(2 * part + 1);
        } else {
            constexpr bool turned   = turbo_mma_is_turned<type, n_of, b % 2>;
            const auto     x        = turbo_mma_read<type, n_of>(block, head, part / 2, trellis ? part % 2 : part);
            const uint32_t books[2] = { turbo_permute(x.books, x.books, 0x9988),
                                        turbo_permute(x.books, x.books, 0xbbaa) };
#    pragma unroll
            for (int i = 0; i < n_of; ++i) {
                uint32_t w[2];
                turbo_mma_levels<type, TURBO_MMA_INT8>(x.nibbles[i], x.top[i], books, w);
                a[m + i][r]     = w[turned];
                a[m + i][r + 2] = w[!turned];
            }
        }
        d[m][r] = turbo_mma_scale<type>(head);
    }

    // Of the query's values 4*l .. 4*l + 3 of 32, in the order of turbo_group_order (f16: as they are, in two registers). half: of the group.
    static __device__ __forceinline__ turbo_mma_place place(const int half, const int l) {
        if constexpr (type == GGML_TYPE_F16) {
            return { l % 2, l / 2, 0 };
        } else if constexpr (turbo_is_trellis<type>) {
            return { l / 4, 2 * half + l / 2 % 2, l % 2 };
        } else {
            return { half, l / 2, l % 2 };
        }
    }

    // Instructions whose registers of operand B lie side by side, for one read of a lane: all, or one where the rest of the kernel leaves too few
    // registers.
    static constexpr int n_at_once = type == GGML_TYPE_F16 || (TURBO_MMA_SM86 && turbo_is_trellis<type>) ? 1 : n;

    // Where they begin in operand B of a block, [group][n / n_at_once][tile of columns][lane][n_at_once][2 registers], and where the scale is.
    template <int n_cols>
    static __device__ __forceinline__ int query_word(const int b, const int c, const int half, const int l) {
        const turbo_mma_place at = place(half, l);
        const int read = ((b * n + at.step) / n_at_once * (n_cols / 8) + c / 8) * TURBO_WARP + c % 8 * 4 + at.part;
        return (read * n_at_once + at.step % n_at_once) * 2 + at.reg;
    }

    template <int n_cols> static __device__ __forceinline__ int scale_of(const int b, const int c) {
        return b * n_cols + c;
    }
};

//
// values
//

// Operand A of fragments of V, two at a time: keys key0 + part + 4*m, m = 0 .. 3, which come from shared memory once.
template <ggml_type type, int n> struct turbo_mma_packed_fragments {
    using scaled = turbo_mma_scaled<type>;

    turbo_mma_indices<type, n> x[4];
    scaled                     scale[2];  // of keys 0 and 1, 2 and 3

    template <typename tile>
    static __device__ __forceinline__ turbo_mma_packed_fragments read(const tile & t, const int key0, const int ic) {
        constexpr int groups = turbo_block_values(type) / 32;  // of a block

        const int g  = ic * 2 * n + turbo_mma_row() / (4 / n);
        const int q0 = turbo_mma_row() % (4 / n);

        turbo_mma_packed_fragments f;
        uint32_t                   head[4];
#    pragma unroll
        for (int m = 0; m < 4; ++m) {
            const turbo_packed_block<type, -1> block(t.row(key0 + turbo_mma_part() + 4 * m), g / groups);
            head[m] = block.head();
            f.x[m]  = turbo_mma_read<type, n>(block, head[m], g % groups, q0);
        }
        f.scale[0] = scaled(head[0], head[1]);
        f.scale[1] = scaled(head[2], head[3]);
        return f;
    }

    // Fragments 2*i and 2*i + 1 of the chunk.
    __device__ __forceinline__ void get(const int i, uint32_t (&a)[2][4]) const {
        // half of the indices of a quarter; each of the words that come of it has two values of two keys
        const int      j       = i / 2;
        const uint32_t half    = i % 2 == 0 ? 0x5140 : 0x7362;
        const uint32_t segment = i % 2 == 0 ? 0xcc88 : 0xeeaa;
#    pragma unroll
        for (int m = 0; m < 4; m += 2) {
            const uint32_t nibbles  = turbo_permute(x[m].nibbles[j], x[m + 1].nibbles[j], half);
            const uint32_t top      = turbo_permute(x[m].top[j], x[m + 1].top[j], half);
            const uint32_t books[2] = { turbo_permute(x[m].books, x[m + 1].books, segment),
                                        turbo_permute(x[m].books, x[m + 1].books, segment + 0x1111) };

            uint32_t low[2], high[2] = {};
            turbo_mma_levels<type, scaled::as_f16 ? TURBO_MMA_F16_LOW : TURBO_MMA_FLIPPED>(nibbles, top, books, low);
            if constexpr (scaled::as_f16) {
                turbo_mma_levels<type, TURBO_MMA_F16_HIGH>(nibbles, top, books, high);
            }
#    pragma unroll
            for (int h = 0; h < 2; ++h) {
                a[h][m]     = scale[m / 2](low[h], high[h], false);
                a[h][m + 1] = scale[m / 2](low[h], high[h], true);
            }
        }
    }
};

// The same of q8_0, which has no indices.
template <int n> struct turbo_mma_packed_fragments<GGML_TYPE_Q8_0, n> {
    using scaled = turbo_mma_scaled<GGML_TYPE_Q8_0>;

    uint32_t x[4][n][2];
    scaled   scale[2];

    template <typename tile>
    static __device__ __forceinline__ turbo_mma_packed_fragments read(const tile & t, const int key0, const int ic) {
        turbo_mma_packed_fragments f;
        uint32_t                   head[4];
#    pragma unroll
        for (int m = 0; m < 4; ++m) {
            const turbo_packed_block<GGML_TYPE_Q8_0, -1> block(t.row(key0 + turbo_mma_part() + 4 * m),
                                                               ic * 2 * n + turbo_mma_row() / (4 / n));
            head[m] = block.head();
#    pragma unroll
            for (int i = 0; i < 2 * n; ++i) {
                f.x[m][i / 2][i % 2] = block.word(2 * (turbo_mma_row() % (4 / n) + i / 2 * 2) + i % 2);
            }
        }
        f.scale[0] = scaled(head[0], head[1]);
        f.scale[1] = scaled(head[2], head[3]);
        return f;
    }

    __device__ __forceinline__ void get(const int i, uint32_t (&a)[2][4]) const {
#    pragma unroll
        for (int m = 0; m < 4; m += 2) {
#    pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t bytes =
                    turbo_permute(x[m][i / 2][i % 2], x[m + 1][i / 2][i % 2], h == 0 ? 0x5410 : 0x7632) ^ 0x80808080u;
                a[h][m]     = scale[m / 2](bytes, 0, false);
                a[h][m + 1] = scale[m / 2](bytes, 0, true);
            }
        }
    }
};

// The same of f16: 16 bytes of each key serve four fragments, and are read when the first of them is wanted.
template <typename tile, int n> struct turbo_mma_f16_fragments {
    tile     t;
    int      key0, ic;
    uint32_t x[4][4];

    static __device__ __forceinline__ turbo_mma_f16_fragments read(const tile & t, const int key0, const int ic) {
        return { t, key0, ic, {} };
    }

    __device__ __forceinline__ void get(const int i, uint32_t (&a)[2][4]) {
        if (i % 2 == 0) {
            turbo_syncwarp();  // else the compiler moves more loads up than there are registers for
#    pragma unroll
            for (int m = 0; m < 4; ++m) {
                t.read(key0 + turbo_mma_part() + 4 * m, (ic * n + i / 2) * 8 + turbo_mma_row(), x[m]);
            }
        }
#    pragma unroll
        for (int h = 0; h < 2; ++h) {
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int k = 2 * i % 4 + h;
                a[h][r]     = turbo_permute(x[r / 2 * 2][k], x[r / 2 * 2 + 1][k], r % 2 == 0 ? 0x5410 : 0x7632);
            }
        }
    }
};

// Fragments of 16 keys of V, transposed: rows are channels. A lane has n quarters of blocks of each of its 4 keys, and channels in chunks of
// 64 * n, of which a fragment has 16.
template <ggml_type type, int D> struct turbo_mma_values {
    static constexpr int n        = D % 128 == 0 ? 2 : 1;
    static constexpr int chunk    = 64 * n;
    static constexpr int n_chunks = D / chunk;
    static constexpr int n_tiles  = chunk / 16;

    using tile = turbo_mma_tile<type, D, true>;

    // Which channel of a chunk is row row + 8 * r of fragment i.
    static __device__ __forceinline__ int channel(const int i, const int row, const int r) {
        if constexpr (type == GGML_TYPE_F16) {
            return i / 4 * 64 + 8 * row + 2 * (i % 4) + r;
        } else {
            const int q = row % (4 / n) + i / 4 * 2;
            return row / (4 / n) * 32 + turbo_group_order<type>(turbo_quarter_word(q, i / 2 % 2), 2 * (i % 2) + r);
        }
    }

    using fragments = std::
        conditional_t<type == GGML_TYPE_F16, turbo_mma_f16_fragments<tile, n>, turbo_mma_packed_fragments<type, n>>;
};

#endif  // TURBO_MMA
