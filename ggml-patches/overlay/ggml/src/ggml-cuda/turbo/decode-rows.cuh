#pragma once

// How a warp brings a tile of packed cache rows into shared memory, and how its lanes read blocks from there.
//
// A row is cut into spans of two blocks. Blocks are 2 bytes off the 4-byte grid in turns, pairs of them are not, and the words of a pair are
// an odd number (turbo2 5, turbo3 7, turbo4 9, q8_0 17; turbo2t 9, turbo3t 13, turbo4t 17). So spans that lie one after the other in shared
// memory are read by 32 lanes without bank conflicts. Where the blocks of a row are an odd number (head size 96; of trellis types, whose
// blocks have 64 values, also 64, 192 and 576), spans of K have one block, and those of V are whole rows.
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

// x, which is the same in all lanes, as something that the compiler knows nothing about: it keeps no multiples of it in registers.
static __device__ __forceinline__ int turbo_opaque(int x) {
#if defined(__HIP_DEVICE_COMPILE__)
    asm volatile("" : "+s"(x));
#elif defined(__CUDA_ARCH__) && !defined(GGML_USE_MUSA)
    asm volatile("" : "+r"(x));
#endif  // defined(__HIP_DEVICE_COMPILE__)
    return x;
}

template <> struct turbo_traits<GGML_TYPE_Q8_0> {
    using block = block_q8_0;
};

// f16 rows are not packed and have no blocks.
template <ggml_type type> static constexpr int turbo_block_bytes = (int) sizeof(typename turbo_traits<type>::block);

// Spans of a row of D values, and groups: 32 values, which are unpacked together. odd: blocks of a span where a row has an odd number.
// shift: the words of a lone block are whole words in shared memory, so it begins in the middle of one.
template <ggml_type type, int D, int odd = 1, bool shift = true> struct turbo_spans {
    static constexpr int  block_groups = turbo_block_values(type) / 32;
    static constexpr int  row_blocks   = D / (32 * block_groups);
    static constexpr int  blocks       = row_blocks % 2 == 0 ? 2 : odd;
    static constexpr int  groups       = blocks * block_groups;
    static constexpr int  n            = row_blocks / blocks;
    static constexpr int  bytes        = blocks * turbo_block_bytes<type>;
    static constexpr int  words        = (bytes + 3) / 4 | 1;  // in shared memory
    static constexpr bool lone         = shift && blocks == 1;

    static_assert(D % (32 * groups) == 0, "head size is not a whole number of spans");
};

// Shares of a row of V, one for each lane that unpacks: two groups, which is a span or one of its blocks; the three of head size 96.
template <ggml_type type, int D> struct turbo_shares {
    static constexpr int groups = D % 64 == 0 ? 2 : 3;

    using spans = turbo_spans<type, D, groups * 32 / turbo_block_values(type)>;

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
template <ggml_type type, bool lone>
static __device__ __forceinline__ uint32_t turbo_block_words(const uint32_t * span,
                                                             const int        b,
                                                             uint32_t (&q)[turbo_block_bytes<type> / 4]) {
    constexpr int bytes = turbo_block_bytes<type>;

    const uint32_t * first    = span + b * bytes / 4;
    const bool       is_whole = !lone && b * bytes % 4 == 0;  // else it begins in the middle of a word
#pragma unroll
    for (int i = 0; i < bytes / 4; ++i) {
        q[i] = is_whole ? first[i] >> 16 | first[i + 1] << 16 : first[i + 1];
    }
    return is_whole ? first[0] & 0xffff : first[0] >> 16;
}

// Unpacks group g of block b of a span: 32 int8 in 8 words; returns their scale. g must be known to the compiler.
template <ggml_type type, bool lone>
static __device__ __forceinline__ half
turbo_unpack_group(const uint32_t * span, const int b, const int g, int32_t (&w)[8]) {
    uint32_t       q[turbo_block_bytes<type> / 4];
    const uint32_t head = turbo_block_words<type, lone>(span, b, q);
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
// The vectors of a piece are loaded in runs of a power of two of them, and a pass loads a run of as many rows as there are lanes for: 17
// vectors are a run of 16, two rows a pass, and one of 1, all rows in a pass. So no lane is idle, and what differs between the addresses of
// the passes of a run is the same for all lanes.
//
//     type       of the rows
//     spans      turbo_spans of them
//     n_rows     pieces of a tile, one of each row: a power of two
//     n_spans    spans of a piece
//     by_span    span s of row r goes to place s*n_rows + r, else to r*n_spans + s
//     max_regs   registers that there are for a piece; what needs more is copied when needed
template <typename spans, int n_rows, int n_spans, bool by_span, int max_regs> struct turbo_tile_loader {
    static constexpr int bytes     = n_spans * spans::bytes;                                              // of a piece
    static constexpr int width     = bytes % 4 != 0 ? 2 : bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;  // of a vector
    static constexpr int n_vectors = bytes / width;                                                       // of a piece
    static constexpr int words     = width < 4 ? 1 : width / 4;  // registers of a vector

    // Of the run that begins at a vector: its vectors, the rows of a pass, and passes.
    static constexpr __host__ __device__ int run(const int first) {
        int n = TURBO_WARP;
        while (n > n_vectors - first) {
            n /= 2;
        }
        return n;
    }

    static constexpr __host__ __device__ int run_rows(const int first) {
        return TURBO_WARP / run(first) < n_rows ? TURBO_WARP / run(first) : n_rows;
    }

    static constexpr __host__ __device__ int n_passes_from(const int first) {
        return first < n_vectors ? n_rows / run_rows(first) + n_passes_from(first + run(first)) : 0;
    }

    static constexpr bool prefetch = n_passes_from(0) * words <= max_regs;
    static constexpr int  n_regs   = prefetch ? n_passes_from(0) * words : 1;

    // src: piece of the first row. The same for all lanes, so that it can stay in scalar registers. No lane is left out, since
    // registers that are written by some lanes only would be kept twice: lanes without a part of their own read what others read.
    template <int first = 0>
    static __device__ __forceinline__ void load(uint32_t (&regs)[n_regs], const char * src, const int stride) {
        constexpr int rows = run_rows(first);
        constexpr int reg0 = (n_passes_from(0) - n_passes_from(first)) * words;

        const int lane   = threadIdx.x % (run(first) * rows);
        const int offset = lane / run(first) * stride + (first + lane % run(first)) * width;
        const int step   = rows * turbo_opaque(stride);
#pragma unroll
        for (int i = 0; i < n_rows / rows; ++i) {
            const char * x = src + (int64_t) i * step + offset;
            if constexpr (width == 2) {
                regs[reg0 + i] = *(const uint16_t *) x;
            } else {
                ggml_cuda_memcpy_1<width>(&regs[reg0 + i * words], x);
            }
        }
        if constexpr (first + run(first) < n_vectors) {
            load<first + run(first)>(regs, src, stride);
        }
    }

    template <int first = 0>
    static __device__ __forceinline__ void store(uint32_t * dst, const uint32_t (&regs)[n_regs]) {
        constexpr int rows = run_rows(first);
        constexpr int reg0 = (n_passes_from(0) - n_passes_from(first)) * words;

        const int lane = threadIdx.x;
        const int row  = lane / run(first);
        const int col  = first + lane % run(first);
        if (run(first) * rows == TURBO_WARP || lane < run(first) * rows) {
#pragma unroll
            for (int i = 0; i < n_rows / rows; ++i) {
                if constexpr (width == 2) {
                    ((uint16_t *) dst)[half_place(row, col) + 2 * i * rows * row_words] = (uint16_t) regs[reg0 + i];
                } else {
#pragma unroll
                    for (int j = 0; j < words; ++j) {
                        dst[place(row, col * words + j) + i * rows * row_words] = regs[reg0 + i * words + j];
                    }
                }
            }
        }
        if constexpr (first + run(first) < n_vectors) {
            store<first + run(first)>(dst, regs);
        }
    }

    // The same at once, in units as wide as the alignment allows: uint32_t, or uint16_t, which always does. Rows from n_valid on are
    // read as the last valid one. The loop counts what is the same for all lanes: a scalar register, no mask of lanes.
    template <typename unit_t, int unroll>
    static __device__ __forceinline__ void copy(uint32_t * dst, const char * src, const int stride, const int n_valid) {
        constexpr int units = bytes / (int) sizeof(unit_t);  // of a piece
#pragma unroll unroll
        for (int i0 = 0; i0 < n_rows * units; i0 += TURBO_WARP) {
            const int i   = i0 + threadIdx.x;
            const int row = i / units;
            const int col = i % units;
            if (n_rows * units % TURBO_WARP == 0 || i < n_rows * units) {
                const unit_t x =
                    *(const unit_t *) (src + (int64_t) min(row, n_valid - 1) * stride + col * (int) sizeof(unit_t));
                if constexpr (sizeof(unit_t) == sizeof(uint32_t)) {
                    dst[place(row, col)] = x;
                } else {
                    ((uint16_t *) dst)[half_place(row, col)] = x;
                }
            }
        }
    }

  private:
    static constexpr int row_words = by_span ? spans::words : n_spans * spans::words;  // from row to row

    static __device__ __forceinline__ int place(const int row, const int word) {
        static_assert(n_spans == 1 || 4 * spans::words == spans::bytes, "gaps between spans");
        if constexpr (n_spans > 1 && by_span) {
            return (word / spans::words * n_rows + row) * spans::words + word % spans::words;
        } else {
            return row * row_words + word;
        }
    }

    // The same in halves of words.
    static __device__ __forceinline__ int half_place(const int row, const int i) {
        const int j = i + (spans::lone ? 1 : 0);
        return 2 * place(row, j / 2) + j % 2;
    }
};
