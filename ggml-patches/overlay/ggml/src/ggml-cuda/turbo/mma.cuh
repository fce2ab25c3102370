#pragma once

// Matrix instructions and asynchronous copies of NVIDIA's sm_80 and later, one function each. What a lane holds is in their comments, with
//     row  = turbo_mma_row()    0 .. 7
//     part = turbo_mma_part()   0 .. 3
// from the PTX manual. All 32 lanes take part. tests/kernels/lanes has its own versions of these functions, after the same manual.

#include "base.cuh"

// Whether kernels with these instructions are compiled at all; movmatrix is of CUDA 11.8. Code for older GPUs is empty then.
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && (!defined(__CUDACC__) || CUDART_VERSION >= 11080)
#    define TURBO_MMA
#    if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#        define TURBO_MMA_DEVICE
#    endif
#endif

// Whether the code is for sm_86 to sm_89.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900
static constexpr bool TURBO_MMA_SM86 = true;
#else
static constexpr bool TURBO_MMA_SM86 = false;
#endif

static __device__ __forceinline__ int turbo_mma_row() {
    return threadIdx.x / 4;
}

static __device__ __forceinline__ int turbo_mma_part() {
    return threadIdx.x % 4;
}

#if defined(TURBO_MMA) && defined(__CUDACC__)

// D = A * B + C of int8: A is 16 x 32, B is 32 x 8, C and D are 16 x 8.
//     a    row row, columns 4*part .. 4*part + 3; the same of row row + 8; then both from column 16 on
//     b    column row, rows 4*part .. 4*part + 3; the same from row 16 on
//     d    row row, columns 2*part and 2*part + 1; the same of row row + 8
static __device__ __forceinline__ void turbo_mma_s8(int32_t (&d)[4],
                                                    const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2],
                                                    const int32_t (&c)[4]) {
#    ifdef TURBO_MMA_DEVICE
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#    else
    GGML_UNUSED_VARS(d, a, b, c);
#    endif
}

// C += A * B of f16, with sums in f32: A is 16 x 16, B is 16 x 8, C is 16 x 8.
//     a    row row, columns 2*part and 2*part + 1; the same of row row + 8; then both from column 8 on
//     b    column row, rows 2*part and 2*part + 1; the same from row 8 on
//     c    as d of turbo_mma_s8
static __device__ __forceinline__ void turbo_mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#    ifdef TURBO_MMA_DEVICE
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#    else
    GGML_UNUSED_VARS(c, a, b);
#    endif
}

// An 8 x 8 matrix of 16-bit values, transposed: a lane holds row row, columns 2*part and 2*part + 1.
static __device__ __forceinline__ uint32_t turbo_mma_transpose(const uint32_t x) {
    uint32_t y = x;
#    ifdef TURBO_MMA_DEVICE
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
#    endif
    return y;
}

// Starts a copy of 4, 8 or 16 bytes into shared memory, both sides aligned to as many.
template <int bytes> static __device__ __forceinline__ void turbo_async_copy(void * dst, const void * src) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "size of an asynchronous copy");
#    ifdef TURBO_MMA_DEVICE
    const uint32_t shared = (uint32_t) __cvta_generic_to_shared(dst);
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(src) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(src), "n"(bytes) : "memory");
    }
#    else
    GGML_UNUSED_VARS(dst, src);
#    endif
}

// Ends a group of copies: those of this lane that were started since the last call.
static __device__ __forceinline__ void turbo_async_commit() {
#    ifdef TURBO_MMA_DEVICE
    asm volatile("cp.async.commit_group;" ::: "memory");
#    endif
}

// Waits until all groups of this lane but the last n are there.
template <int n> static __device__ __forceinline__ void turbo_async_wait() {
#    ifdef TURBO_MMA_DEVICE
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#    endif
}

//
// single instructions that compilers make two of
//

// The bits of a where mask has ones, else those of b.
template <uint32_t mask> static __device__ __forceinline__ uint32_t turbo_select(const uint32_t a, const uint32_t b) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(y) : "r"(a), "r"(b), "n"(mask));
    return y;
}

// p + n * stride bytes.
template <int n> static const __device__ __forceinline__ char * turbo_row_at(const char * p, const int stride) {
    const char * y;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(y) : "r"(stride), "n"(n), "l"(p));
    return y;
}

#endif  // defined(TURBO_MMA) && defined(__CUDACC__)
