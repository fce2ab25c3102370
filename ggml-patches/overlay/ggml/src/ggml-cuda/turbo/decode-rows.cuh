#pragma once

// How a warp brings a tile of packed cache rows into shared memory, and how its lanes read blocks from there.
//
// A row is cut into spans of two blocks; of three or one where the blocks of a row are an odd number, which are one span then (head
// size 96; of trellis types, whose blocks have 64 values, also 64, 192 and 576). Blocks are 2 bytes off the 4-byte grid in turns, pairs of
// them are not, and the words of a pair are an odd number (turbo2 5, turbo3 7, turbo4 9, q8_0 17; turbo2t 9, turbo3t 13, turbo4t 17). So
// spans that lie one after the other in shared memory are read by 32 lanes without bank conflicts.
// Global memory is read along the rows, in vectors as wide as the spans allow.

#include "attn-args.cuh"
#include "scalar.cuh"
#include "trellis.cuh"

static constexpr int TURBO_WARP = 32;  // lanes that work together; two such groups share a wave of 64

// The same value in all lanes of a wave, told to the compiler where waves have 32 lanes.
static __device__ __forceinline__ int turbo_uniform(const int x) {
#if defined(__HIP_DEVICE_COMPILE__) && defined(RDNA)
    return __builtin_amdgcn_readfirstlane(x);
#else
    return x;
#endif  // defined(__HIP_DEVICE_COMPILE__) && defined(RDNA)
}

// Keeps LLVM from moving loads of shared memory up across a whole unrolled loop, which would need more registers than there are.
static __device__ __forceinline__ void turbo_sched_fence() {
#ifdef __HIP_DEVICE_COMPILE__
    __builtin_amdgcn_sched_barrier(0);
#endif  // __HIP_DEVICE_COMPILE__
}

template <> struct turbo_traits<GGML_TYPE_Q8_0> {
    using block = block_q8_0;
};

// f16 rows are not packed and have no blocks.
template <ggml_type type> static constexpr int turbo_block_bytes = (int) sizeof(typename turbo_traits<type>::block);

// Spans of a row of D values, and groups: 32 values, which are unpacked together.
template <ggml_type type, int D> struct turbo_spans {
    static constexpr int block_groups = turbo_block_values(type) / 32;
    static constexpr int row_blocks   = D / (32 * block_groups);
    static constexpr int blocks       = row_blocks % 2 == 0 ? 2 : row_blocks % 3 == 0 ? 3 : 1;
    static constexpr int groups       = blocks * block_groups;
    static constexpr int n            = row_blocks / blocks;
    static constexpr int bytes        = blocks * turbo_block_bytes<type>;
    static constexpr int words        = (bytes + 3) / 4 | 1;  // in shared memory

    static_assert(D % (32 * groups) == 0, "head size is not a whole number of spans");
};

// Shares of a row of V, one for each lane that unpacks: two groups, which is a span or one of its blocks; the three of head size 96.
template <ggml_type type, int D> struct turbo_shares {
    using spans = turbo_spans<type, D>;

    static constexpr int groups  = D % 64 == 0 ? 2 : 3;
    static constexpr int n       = D / (32 * groups);
    static constexpr int blocks  = groups / spans::block_groups;
    static constexpr int of_span = spans::blocks / blocks;

    static_assert(of_span * blocks == spans::blocks && n == of_span * spans::n, "shares of spans");
};

// Which value of its group stands in byte j of word i, once unpacked.
template <ggml_type type> static __host__ __device__ constexpr int turbo_group_order(const int i, const int j) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        return 4 * i + j;
    } else {
        return turbo_value_order(i, j);
    }
}

// Block b of a span: returns the 2 bytes before its words. Not a branch: b may differ between lanes.
template <ggml_type type>
static __device__ __forceinline__ uint32_t turbo_block_words(const uint32_t * span,
                                                             const int        b,
                                                             uint32_t (&q)[turbo_block_bytes<type> / 4]) {
    constexpr int bytes = turbo_block_bytes<type>;

    const uint32_t * first    = span + b * bytes / 4;
    const bool       is_whole = b * bytes % 4 == 0;  // else it begins in the middle of a word
#pragma unroll
    for (int i = 0; i < bytes / 4; ++i) {
        q[i] = is_whole ? first[i] >> 16 | first[i + 1] << 16 : first[i + 1];
    }
    return is_whole ? first[0] & 0xffff : first[0] >> 16;
}

// Unpacks group g of block b of a span: 32 int8 in 8 words; returns their scale. g must be known to the compiler.
template <ggml_type type>
static __device__ __forceinline__ half
turbo_unpack_group(const uint32_t * span, const int b, const int g, int32_t (&w)[8]) {
    uint32_t       q[turbo_block_bytes<type> / 4];
    const uint32_t head = turbo_block_words<type>(span, b, q);
    if constexpr (type == GGML_TYPE_Q8_0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            w[i] = q[i];
        }
    } else if constexpr (turbo_is_trellis<type>) {
        turbo_unpack_trellis_half<type>(q, head >> 8, g, w);
        return __float2half(turbo_trellis_scale(head & 0xff) * (1.0f / TRELLIS_LEVEL_STEPS));
    } else {
        turbo_unpack_block<type>(q, w);
    }
    return __ushort_as_half((unsigned short) head);
}

// Moves n_rows pieces of rows, each n_spans spans long, into shared memory: loads them into registers, so that they are under way
// while the tile before is worked on, and stores them when its turn comes.
//
//     type       of the rows
//     D          head size in values
//     n_rows     pieces of a tile, one of each row
//     n_spans    spans of a piece
//     by_span    span s of row r goes to place s*n_rows + r, else to r*n_spans + s
template <ggml_type type, int D, int n_rows, int n_spans, bool by_span> struct turbo_tile_loader {
    using spans = turbo_spans<type, D>;

    static constexpr int bytes = n_spans * spans::bytes;                                              // of a piece
    static constexpr int width = bytes % 4 != 0 ? 2 : bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;  // of a vector
    static constexpr int lanes = bytes / width;                                                       // for a piece

    // A pass loads some rows, or just 32 vectors in a row, where most lanes would be idle else. The latter counts columns in each lane.
    static constexpr bool in_a_row      = lanes > TURBO_WARP / 2 || width == 2;
    static constexpr int  rows_per_pass = in_a_row ? 1 : TURBO_WARP / lanes;
    static constexpr int  n_vectors     = n_rows * lanes;
    static constexpr int  n_passes =
        in_a_row ? (n_vectors + TURBO_WARP - 1) / TURBO_WARP : (n_rows + rows_per_pass - 1) / rows_per_pass;
    static constexpr int words = width < 4 ? 1 : width / 4;  // registers of a vector

    // too many registers: loaded when needed
    static constexpr bool prefetch = n_passes * words <= 28;
    static constexpr int  n_regs   = prefetch ? n_passes * words : 1;

    static __device__ __forceinline__ int place(const int row, const int word) {
        if constexpr (n_spans == 1 || !by_span) {
            return row * n_spans * spans::words + word;
        } else {
            return (word / spans::words * n_rows + row) * spans::words + word % spans::words;
        }
    }

    // src: piece of the first row. The same for all lanes, so that it can stay in scalar registers. No lane is left out, since
    // registers that are written by some lanes only would be kept twice: lanes without a part of their own read what others read.
    static __device__ __forceinline__ void load(uint32_t (&regs)[n_regs], const char * src, const int stride) {
        if constexpr (in_a_row) {
            load_in_a_row(regs, src, stride);
        } else {
            load_by_rows(regs, src, stride);
        }
    }

    static __device__ __forceinline__ void store(uint32_t * dst, const uint32_t (&regs)[n_regs]) {
        if constexpr (in_a_row) {
            store_in_a_row(dst, regs);
        } else {
            store_by_rows(dst, regs);
        }
    }

    // The same at once, in units as wide as the alignment allows: uint32_t, or uint16_t, which always does. Rows from n_valid on are
    // read as the last valid one. The loop counts what is the same for all lanes: a scalar register, no mask of lanes.
    template <typename unit_t, int unroll>
    static __device__ __forceinline__ void copy(uint32_t * dst, const char * src, const int stride, const int n_valid) {
        constexpr int units = bytes / (int) sizeof(unit_t);               // of a piece
        constexpr int n     = (int) (sizeof(uint32_t) / sizeof(unit_t));  // in a word
#pragma unroll unroll
        for (int i0 = 0; i0 < n_rows * units; i0 += TURBO_WARP) {
            const int i   = i0 + threadIdx.x;
            const int row = i / units;
            const int col = i % units;
            if (n_rows * units % TURBO_WARP == 0 || i < n_rows * units) {
                ((unit_t *) dst)[n * place(row, col / n) + col % n] =
                    *(const unit_t *) (src + (int64_t) min(row, n_valid - 1) * stride + col * (int) sizeof(unit_t));
            }
        }
    }

  private:
    static __device__ __forceinline__ void load_vector(uint32_t * regs, const char * src) {
        if constexpr (width == 2) {
            *regs = *(const uint16_t *) src;
        } else {
            ggml_cuda_memcpy_1<width>(regs, src);
        }
    }

    static __device__ __forceinline__ void store_vector(uint32_t *       dst,
                                                        const int        row,
                                                        const int        col,
                                                        const uint32_t * regs) {
        if constexpr (width == 2) {
            ((uint16_t *) dst)[2 * place(row, col / 2) + col % 2] = (uint16_t) *regs;
        } else {
#pragma unroll
            for (int j = 0; j < words; ++j) {
                dst[place(row, col * words + j)] = regs[j];
            }
        }
    }

    static __device__ __forceinline__ void load_by_rows(uint32_t (&regs)[n_regs], const char * src, const int stride) {
        const int row0   = min((int) threadIdx.x / lanes, rows_per_pass - 1);
        const int offset = row0 * stride + threadIdx.x % lanes * width;
#pragma unroll
        for (int i = 0; i < n_passes; ++i) {
            // the last pass may have fewer rows than the others: it reads the last ones
            const int row = min(i * rows_per_pass, n_rows - rows_per_pass);
            load_vector(&regs[i * words], src + (int64_t) row * stride + offset);
        }
    }

    static __device__ __forceinline__ void store_by_rows(uint32_t * dst, const uint32_t (&regs)[n_regs]) {
        const int lane = threadIdx.x;
        const int row0 = lane / lanes;
        const int col  = lane % lanes;
        if (row0 >= rows_per_pass) {
            return;
        }
#pragma unroll
        for (int i = 0; i < n_passes; ++i) {
            const int row = row0 + min(i * rows_per_pass, n_rows - rows_per_pass);
            store_vector(dst, row, col, &regs[i * words]);
        }
    }

    static __device__ __forceinline__ void load_in_a_row(uint32_t (&regs)[n_regs], const char * src, const int stride) {
        int col    = threadIdx.x % lanes;
        int offset = (int) threadIdx.x / lanes * stride + col * width;
#pragma unroll
        for (int i = 0; i < n_passes; ++i) {
            const bool is_rest = (i + 1) * TURBO_WARP > n_vectors;
            load_vector(&regs[i * words],
                        src + (is_rest ? min(offset, (n_rows - 1) * stride + (lanes - 1) * width) : offset));
            offset += TURBO_WARP / lanes * stride + TURBO_WARP % lanes * width;
            col += TURBO_WARP % lanes;
            if (col >= lanes) {
                offset += stride - bytes;
                col -= lanes;
            }
        }
    }

    static __device__ __forceinline__ void store_in_a_row(uint32_t * dst, const uint32_t (&regs)[n_regs]) {
        // without gaps between rows the vectors lie in a row in shared memory, too
        constexpr bool gapless = 4 * spans::words == spans::bytes && (n_spans == 1 || !by_span);

        int row = (int) threadIdx.x / lanes;
        int col = threadIdx.x % lanes;
#pragma unroll
        for (int i = 0; i < n_passes; ++i) {
            const int n = i * TURBO_WARP + threadIdx.x;
            if ((i + 1) * TURBO_WARP <= n_vectors || n < n_vectors) {
                if constexpr (gapless) {
#pragma unroll
                    for (int j = 0; j < words; ++j) {
                        dst[n * words + j] = regs[i * words + j];
                    }
                } else {
                    store_vector(dst, row, col, &regs[i * words]);
                }
            }
            row += TURBO_WARP / lanes;
            col += TURBO_WARP % lanes;
            if (col >= lanes) {
                ++row;
                col -= lanes;
            }
        }
    }
};
