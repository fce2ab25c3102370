#pragma once

// Where a thread is, read again where it is wanted at the end of a kernel or on a path that few tiles take. Else the compiler computes what
// follows from it once, and keeps that in registers all along.

#include "base.cuh"

#if defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
#    define TURBO_AGAIN(special, value)                       \
        int x;                                                \
        asm volatile("mov.u32 %0, %%" special ";" : "=r"(x)); \
        return x
#else
#    define TURBO_AGAIN(special, value) return value
#endif

// threadIdx.x
static __device__ __forceinline__ int turbo_lane_again() {
    TURBO_AGAIN("tid.x", threadIdx.x);
}

// blockIdx.y
static __device__ __forceinline__ int turbo_split_again() {
    TURBO_AGAIN("ctaid.y", blockIdx.y);
}

#undef TURBO_AGAIN
