#pragma once

// Matrix instructions of AMD's RDNA3 and RDNA4 for waves of 32 lanes, one function each, from AMD's ISA manuals. All of them multiply
// 16 x 16 by 16 x 16. What a lane holds is in their comments, with
//     line = turbo_wmma_line()    0 .. 15
//     half = turbo_wmma_half()    0 or 1
// tests/kernels/lanes has its own versions of these functions, after the same manuals.

#include "base.cuh"

// Whether kernels with these instructions are compiled at all. Code for older GPUs, and for GCN and CDNA, is empty then.
#ifdef GGML_USE_HIP
#    define TURBO_WMMA
#    if defined(RDNA3) || defined(RDNA4)
#        define TURBO_WMMA_DEVICE
#    endif
#    if defined(TURBO_WMMA_DEVICE) || defined(CDNA3)
#        define TURBO_MATRIX_DEVICE
#    endif
#endif  // GGML_USE_HIP

// RDNA3 has no registers for larger heads of V: both halves of a wave hold all of each operand.
static constexpr int TURBO_RDNA3_MAX_DV = 128;

// How many lanes hold each element of A and B: on RDNA3 both halves of a wave have all of them. Registers of A and of B.
#ifdef RDNA3
static constexpr int TURBO_WMMA_COPIES = 2;
#else
static constexpr int TURBO_WMMA_COPIES = 1;
#endif  // RDNA3
static constexpr int TURBO_WMMA_S8  = 2 * TURBO_WMMA_COPIES;
static constexpr int TURBO_WMMA_F16 = 4 * TURBO_WMMA_COPIES;

static __device__ __forceinline__ int turbo_wmma_line() {
    return threadIdx.x % 16;
}

static __device__ __forceinline__ int turbo_wmma_half() {
    return threadIdx.x / 16;
}

// Rows of D are numbered such that element i of a lane is of row 2*i + half, so the first n rows are the first n / 2 elements of all lanes.
// Which of these rows line `line` of A makes; on RDNA4 elements of a lane are of lines that follow one another.
static __device__ __forceinline__ int turbo_wmma_row(const int line) {
    return TURBO_WMMA_COPIES == 2 ? line : line % 8 * 2 + line / 8;
}

#if defined(TURBO_WMMA) && defined(__HIP__)

// As vectors for the builtins, element by element: LLVM would take bytes of a memcpy apart.
template <typename vector, int n, typename T>
static __device__ __forceinline__ vector turbo_wmma_vector(const T (&x)[n]) {
    vector v;
#    pragma unroll
    for (int i = 0; i < n; ++i) {
        v[i] = x[i];
    }
    return v;
}

#    ifdef TURBO_WMMA_DEVICE
template <typename T, int n> using turbo_wmma_of = T __attribute__((ext_vector_type(n)));
#    endif  // TURBO_WMMA_DEVICE

// D = A * B + D of int8.
//     a    line line of A, columns 8*half .. 8*half + 7, lowest byte first; on RDNA3 all 16 columns
//     b    the same of column line of B
//     d    column line: see turbo_wmma_row
static __device__ __forceinline__ void turbo_wmma_s8(int32_t (&d)[8],
                                                     const uint32_t (&a)[TURBO_WMMA_S8],
                                                     const uint32_t (&b)[TURBO_WMMA_S8]) {
#    ifdef TURBO_WMMA_DEVICE
    const auto x = turbo_wmma_vector<turbo_wmma_of<int, TURBO_WMMA_S8>>(a);
    const auto y = turbo_wmma_vector<turbo_wmma_of<int, TURBO_WMMA_S8>>(b);
    auto       z = turbo_wmma_vector<turbo_wmma_of<int, 8>>(d);
#        ifdef RDNA3
    z = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x, true, y, z, false);
#        else
    z = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, x, true, y, z, false);
#        endif  // RDNA3
#        pragma unroll
    for (int i = 0; i < 8; ++i) {
        d[i] = z[i];
    }
#    else
    GGML_UNUSED_VARS(d, a, b);
#    endif  // TURBO_WMMA_DEVICE
}

// The same of f16, with sums in f32: two columns of A, or rows of B, in a register.
static __device__ __forceinline__ void turbo_wmma_f16(float (&d)[8],
                                                      const uint32_t (&a)[TURBO_WMMA_F16],
                                                      const uint32_t (&b)[TURBO_WMMA_F16]) {
#    ifdef TURBO_WMMA_DEVICE
    typedef turbo_wmma_of<_Float16, 2 * TURBO_WMMA_F16> halves;

    const auto x = __builtin_bit_cast(halves, turbo_wmma_vector<turbo_wmma_of<uint32_t, TURBO_WMMA_F16>>(a));
    const auto y = __builtin_bit_cast(halves, turbo_wmma_vector<turbo_wmma_of<uint32_t, TURBO_WMMA_F16>>(b));
    auto       z = turbo_wmma_vector<turbo_wmma_of<float, 8>>(d);
#        ifdef RDNA3
    z = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x, y, z);
#        else
    z = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(x, y, z);
#        endif  // RDNA3
#        pragma unroll
    for (int i = 0; i < 8; ++i) {
        d[i] = z[i];
    }
#    else
    GGML_UNUSED_VARS(d, a, b);
#    endif  // TURBO_WMMA_DEVICE
}

// The same register of the lane with the same line in the other half.
static __device__ __forceinline__ uint32_t turbo_wmma_other_half(const uint32_t x) {
#    ifdef TURBO_WMMA_DEVICE
    return __builtin_amdgcn_permlanex16(x, x, 0x76543210, 0xfedcba98, false, false);
#    else
    return x;
#    endif  // TURBO_WMMA_DEVICE
}

// 2^x; 0 where the result would be below 2^-126.
static __device__ __forceinline__ float turbo_wmma_exp2(const float x) {
#    ifdef TURBO_MATRIX_DEVICE
    return __builtin_amdgcn_exp2f(x);
#    else
    return exp2f(x);
#    endif  // TURBO_MATRIX_DEVICE
}

// x, of which the compiler knows nothing.
template <typename T> static __device__ __forceinline__ T turbo_wmma_opaque(T x) {
#    ifdef TURBO_MATRIX_DEVICE
    asm("" : "+v"(x));
#    endif  // TURBO_MATRIX_DEVICE
    return x;
}

// The same where registers are scarce: what is computed from x is computed here, and not kept from one tile to the next.
template <bool scarce, typename T> static __device__ __forceinline__ T turbo_wmma_here(T x) {
#    ifdef TURBO_MATRIX_DEVICE
    if constexpr (scarce) {
        asm volatile("" : "+v"(x));
    }
#    endif  // TURBO_MATRIX_DEVICE
    return x;
}

// Pairs of f16 in a register. HIP's half2 is a class, whose bits LLVM copies byte by byte.
#    ifdef TURBO_MATRIX_DEVICE
typedef _Float16 turbo_wmma_pair __attribute__((ext_vector_type(2)));
#    endif  // TURBO_MATRIX_DEVICE

// a in the low half, b in the high one, rounded to nearest
static __device__ __forceinline__ uint32_t turbo_wmma_pack(const float a, const float b) {
#    ifdef TURBO_MATRIX_DEVICE
    return __builtin_bit_cast(uint32_t, turbo_wmma_pair{ (_Float16) a, (_Float16) b });
#    else
    GGML_UNUSED_VARS(a, b);
    return 0;
#    endif  // TURBO_MATRIX_DEVICE
}

// (x - 1152) * d of both halves: levels times their scales, where x has the bits of 1024 + 128 + level. Two instructions, since 1152 * d is
// no f16.
static __device__ __forceinline__ uint32_t turbo_wmma_scaled(const uint32_t x, const uint32_t d) {
#    ifdef TURBO_MATRIX_DEVICE
    // LLVM would take off the upper bits of x, which it knows, and put them in again
    const auto            y    = __builtin_bit_cast(turbo_wmma_pair, turbo_wmma_opaque(x));
    const turbo_wmma_pair bias = { (_Float16) -1152.0f, (_Float16) -1152.0f };
    return __builtin_bit_cast(uint32_t, (y + bias) * __builtin_bit_cast(turbo_wmma_pair, d));
#    else
    GGML_UNUSED_VARS(x, d);
    return 0;
#    endif  // TURBO_MATRIX_DEVICE
}

#endif  // defined(TURBO_WMMA) && defined(__HIP__)

#ifdef TURBO_WMMA

// Registers of A or B from those that a lane has made of its half of the columns of A (rows of B).
template <int n>
static __device__ __forceinline__ void turbo_wmma_operand(uint32_t (&x)[n * TURBO_WMMA_COPIES],
                                                          const uint32_t (&own)[n]) {
#    pragma unroll
    for (int i = 0; i < n; ++i) {
        if constexpr (TURBO_WMMA_COPIES == 2) {
            const uint32_t other = turbo_wmma_other_half(own[i]);

            x[i]     = turbo_wmma_half() == 0 ? own[i] : other;
            x[n + i] = turbo_wmma_half() == 0 ? other : own[i];
        } else {
            x[i] = own[i];
        }
    }
}

#endif  // TURBO_WMMA
