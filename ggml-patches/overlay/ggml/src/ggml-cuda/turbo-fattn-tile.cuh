#pragma once

// How a warp brings a tile of packed cache rows into shared memory, and how its lanes read blocks from there.
//
// A row is cut into segments of two blocks (64 values; three blocks for head size 96, which is one segment): what one lane decodes at
// a time. Blocks are 2 bytes off the 4-byte grid in turns, pairs of them are not, and the words of a pair are an odd number (turbo2 5,
// turbo3 7, turbo4 9, q8_0 17). So segments that lie one after the other in shared memory are read by 32 lanes without bank conflicts.
// Global memory is read along the rows, in vectors as wide as the segments allow.

#include "turbo-fattn.cuh"

static constexpr int TURBO_WARP = 32;  // lanes that work together; two such groups share a wave of 64

static __device__ __forceinline__ void turbo_syncwarp() {
#if defined(__HIP_DEVICE_COMPILE__)
    // lanes run in step, only the compiler must not move shared memory accesses
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
#elif !defined(__HIP__)
    __syncwarp();
#endif  // defined(__HIP_DEVICE_COMPILE__)
}

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

// Bytes of a block; f16 rows are not packed and have none.
template <ggml_type type>
static constexpr int turbo_block_bytes = type == GGML_TYPE_TURBO2_0 ? (int) sizeof(block_turbo2_0) :
                                         type == GGML_TYPE_TURBO3_0 ? (int) sizeof(block_turbo3_0) :
                                         type == GGML_TYPE_TURBO4_0 ? (int) sizeof(block_turbo4_0) :
                                                                      (int) sizeof(block_q8_0);

// Segments of a row of D values.
template <ggml_type type, int D> struct turbo_segments {
    static constexpr int blocks = D % 64 == 0 ? 2 : 3;
    static constexpr int n      = D / (32 * blocks);
    static constexpr int bytes  = blocks * turbo_block_bytes<type>;
    static constexpr int words  = (bytes + 3) / 4 | 1;  // in shared memory

    static_assert(D % (32 * blocks) == 0, "head size is not a whole number of segments");
};

// Which value of its block stands in byte j of word i, once decoded.
template <ggml_type type> static __host__ __device__ constexpr int turbo_fattn_order(const int i, const int j) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        return 4 * i + j;
    } else {
        return turbo_value_order(i, j);
    }
}

// Decodes block b of a segment: 32 int8 in 8 words; returns their scale. b must be known to the compiler.
template <ggml_type type>
static __device__ __forceinline__ half turbo_fattn_decode(const uint32_t * segment, const int b, int32_t (&w)[8]) {
    constexpr int bytes = turbo_block_bytes<type>;
    constexpr int n     = (bytes - 2) / 4;

    uint32_t q[n];
    uint32_t d;

    const int i0 = b * bytes / 4;
    if (b * bytes % 4 == 0) {
        d = segment[i0] & 0xffff;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            q[i] = segment[i0 + i] >> 16 | segment[i0 + i + 1] << 16;
        }
    } else {
        d = segment[i0] >> 16;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            q[i] = segment[i0 + 1 + i];
        }
    }

    if constexpr (type == GGML_TYPE_Q8_0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            w[i] = q[i];
        }
    } else {
        turbo_decode_block<type>(q, w);
    }

    return __ushort_as_half((unsigned short) d);
}

// Moves n_rows pieces of rows, each n_seg segments long, into shared memory: loads them into registers, so that they are under way
// while the tile before is worked on, and stores them when its turn comes.
// by_segment: segment s of row r goes to place s*n_rows + r, else to r*n_seg + s.
template <ggml_type type, int D, int n_rows, int n_seg, bool by_segment> struct turbo_tile_loader {
    using segments = turbo_segments<type, D>;

    static constexpr int bytes = n_seg * segments::bytes;                                          // of a piece
    static constexpr int width = D % 64 != 0 ? 2 : bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;  // of a vector
    static constexpr int lanes = bytes / width;                                                    // for a piece

    static constexpr int rows_per_pass = lanes <= TURBO_WARP ? TURBO_WARP / lanes : 1;
    static constexpr int n_passes      = (n_rows + rows_per_pass - 1) / rows_per_pass;
    static constexpr int words         = width / 4;  // of a vector

    // too many registers: loaded when needed
    static constexpr bool prefetch = width > 2 && lanes <= TURBO_WARP && n_passes * words <= 24;
    static constexpr int n_regs    = prefetch ? n_passes * words : 1;

    static __device__ __forceinline__ int place(const int row, const int word) {
        const int seg = word / segments::words;
        return by_segment ? (seg * n_rows + row) * segments::words + word % segments::words :
                            row * n_seg * segments::words + word;
    }

    // src: piece of the first row. The same for all lanes, so that it can stay in scalar registers. No lane is left out, since
    // registers that are written by some lanes only would be kept twice: lanes without a part of their own read what others read.
    static __device__ __forceinline__ void load(uint32_t (&regs)[n_regs], const char * src, const int stride) {
        const int row0   = min((int) threadIdx.x / lanes, rows_per_pass - 1);
        const int offset = row0 * stride + threadIdx.x % lanes * width;
#pragma unroll
        for (int i = 0; i < n_passes; ++i) {
            // the last pass may have fewer rows than the others: it reads the last ones
            const int row = min(i * rows_per_pass, n_rows - rows_per_pass);
            ggml_cuda_memcpy_1<width>(&regs[i * words], src + (int64_t) row * stride + offset);
        }
    }

    static __device__ __forceinline__ void store(uint32_t * dst, const uint32_t (&regs)[n_regs]) {
        const int lane = threadIdx.x;
        const int row0 = lane / lanes;
        const int col  = lane % lanes;
        if (row0 >= rows_per_pass) {
            return;
        }
#pragma unroll
        for (int i = 0; i < n_passes; ++i) {
            const int row = row0 + min(i * rows_per_pass, n_rows - rows_per_pass);
#pragma unroll
            for (int j = 0; j < words; ++j) {
                dst[place(row, col * words + j)] = regs[i * words + j];
            }
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
};
