#pragma once

// Matrix instructions of AMD's CDNA3 (gfx942) for waves of 64 lanes, one function each. What a lane holds is in their comments, with
//     line = turbo_wmma_line()    0 .. 15
//     part = turbo_mfma_part()    0 .. 3
// Source: AMD Instinct MI300 instruction set architecture, chapter 7, and the matrix instruction calculator
// (github.com/ROCm/amd_matrix_instruction_calculator --architecture cdna3 --instruction v_mfma_i32_16x16x32_i8 --register-layout).
// tests/kernels/lanes has its own versions of these functions, after the same tables.
//
// Two groups of TURBO_WARP threads are a wave: a block of (TURBO_WARP, TURBO_DECODE_WARPS) threads has two waves.

#include "base.cuh"

// Whether kernels with these instructions are compiled at all. Code for other GPUs is empty then.
#ifdef GGML_USE_HIP
#    define TURBO_MFMA
#    ifdef CDNA3
#        define TURBO_MFMA_DEVICE
#    endif  // CDNA3
#endif      // GGML_USE_HIP

#ifdef TURBO_MFMA

static constexpr int TURBO_MFMA_LANES = 64;

// Which of the two groups of threads of a wave.
static __device__ __forceinline__ int turbo_mfma_half() {
    return threadIdx.y % 2;
}

static __device__ __forceinline__ int turbo_mfma_part() {
    return 2 * turbo_mfma_half() + threadIdx.x / 16;
}

#    ifdef __HIP__

#        ifdef TURBO_MFMA_DEVICE
template <typename T, int n> using turbo_mfma_of = T __attribute__((ext_vector_type(n)));
#        endif  // TURBO_MFMA_DEVICE

// D = A * B + D of int8: 16 x 32 by 32 x 16. 16 cycles of the matrix core.
//     a    row line of A, columns 8*part .. 8*part + 7, lowest byte first
//     b    the same of column line of B
//     d    column line, rows 4*part .. 4*part + 3
static __device__ __forceinline__ void turbo_mfma_s8(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
#        ifdef TURBO_MFMA_DEVICE
    const auto x = __builtin_bit_cast(long, turbo_mfma_of<uint32_t, 2>{ a[0], a[1] });
    const auto y = __builtin_bit_cast(long, turbo_mfma_of<uint32_t, 2>{ b[0], b[1] });
    const auto z =
        __builtin_amdgcn_mfma_i32_16x16x32_i8(x, y, turbo_mfma_of<int, 4>{ d[0], d[1], d[2], d[3] }, 0, 0, 0);
#            pragma unroll
    for (int i = 0; i < 4; ++i) {
        d[i] = z[i];
    }
#        else
    GGML_UNUSED_VARS(d, a, b);
#        endif  // TURBO_MFMA_DEVICE
}

// The same of f16, with sums in f32: 16 x 16 by 16 x 16. 16 cycles.
//     a    row line of A, columns 4*part .. 4*part + 3, two in a register
//     b    the same of column line of B
//     d    column line, rows 4*part .. 4*part + 3
static __device__ __forceinline__ void turbo_mfma_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
#        ifdef TURBO_MFMA_DEVICE
    const auto x = __builtin_bit_cast(turbo_mfma_of<_Float16, 4>, turbo_mfma_of<uint32_t, 2>{ a[0], a[1] });
    const auto y = __builtin_bit_cast(turbo_mfma_of<_Float16, 4>, turbo_mfma_of<uint32_t, 2>{ b[0], b[1] });
    const auto z =
        __builtin_amdgcn_mfma_f32_16x16x16f16(x, y, turbo_mfma_of<float, 4>{ d[0], d[1], d[2], d[3] }, 0, 0, 0);
#            pragma unroll
    for (int i = 0; i < 4; ++i) {
        d[i] = z[i];
    }
#        else
    GGML_UNUSED_VARS(d, a, b);
#        endif  // TURBO_MFMA_DEVICE
}

// x of the lane whose number differs by the bits of lanes.
static __device__ __forceinline__ float turbo_mfma_shuffle_xor(const float x, const int lanes) {
    return __shfl_xor(x, lanes, TURBO_MFMA_LANES);
}

// All lanes of the wave see what they have stored in shared memory so far.
static __device__ __forceinline__ void turbo_mfma_syncwave() {
    turbo_syncwarp();
}

// The same value in all lanes of the wave, told to the compiler.
static __device__ __forceinline__ int turbo_mfma_uniform(const int x) {
#        ifdef TURBO_MFMA_DEVICE
    return __builtin_amdgcn_readfirstlane(x);
#        else
    return x;
#        endif  // TURBO_MFMA_DEVICE
}

// x is computed here: LLVM would put off sums until it has the products of all tiles in registers.
static __device__ __forceinline__ void turbo_mfma_here(float (&x)[4]) {
#        ifdef TURBO_MFMA_DEVICE
    turbo_mfma_of<float, 4> y = { x[0], x[1], x[2], x[3] };
    asm volatile("" : "+v"(y));
#            pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = y[i];
    }
#        else
    GGML_UNUSED(x);
#        endif  // TURBO_MFMA_DEVICE
}

// Four f16, aligned as one is.
static __device__ __forceinline__ void turbo_mfma_read_halves(const half * x, uint32_t (&y)[2]) {
#        ifdef TURBO_MFMA_DEVICE
    typedef uint32_t pair __attribute__((ext_vector_type(2), aligned(2)));
    const auto       z = *(const pair *) x;
    y[0]               = z[0];
    y[1]               = z[1];
#        else
    GGML_UNUSED_VARS(x, y);
#        endif  // TURBO_MFMA_DEVICE
}

// The larger, and the smaller, of both halves as unsigned integers.
static __device__ __forceinline__ uint32_t turbo_mfma_max_u16(const uint32_t x, const uint32_t y) {
#        ifdef TURBO_MFMA_DEVICE
    typedef turbo_mfma_of<unsigned short, 2> pair;
    return __builtin_bit_cast(uint32_t,
                              __builtin_elementwise_max(__builtin_bit_cast(pair, x), __builtin_bit_cast(pair, y)));
#        else
    return x | y;
#        endif  // TURBO_MFMA_DEVICE
}

static __device__ __forceinline__ uint32_t turbo_mfma_min_u16(const uint32_t x, const uint32_t y) {
#        ifdef TURBO_MFMA_DEVICE
    typedef turbo_mfma_of<unsigned short, 2> pair;
    return __builtin_bit_cast(uint32_t,
                              __builtin_elementwise_min(__builtin_bit_cast(pair, x), __builtin_bit_cast(pair, y)));
#        else
    return x & y;
#        endif  // TURBO_MFMA_DEVICE
}

#    endif  // __HIP__

// Of a column: over the lanes that hold its line.
static __device__ __forceinline__ float turbo_mfma_column_sum(float x) {
    x += turbo_mfma_shuffle_xor(x, 16);
    return x + turbo_mfma_shuffle_xor(x, 32);
}

static __device__ __forceinline__ float turbo_mfma_column_max(float x) {
    x = fmaxf(x, turbo_mfma_shuffle_xor(x, 16));
    return fmaxf(x, turbo_mfma_shuffle_xor(x, 32));
}

#endif  // TURBO_MFMA
