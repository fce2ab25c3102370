// Stands in for upstream's ggml-cuda/common.cuh: what our kernels use of it.

#pragma once

#include "ggml-common.h"
#include "ggml.h"
#include "mma.h"

#define WARP_SIZE 32

#define FP16_AVAILABLE
#define FAST_FP16_AVAILABLE

typedef void * cudaStream_t;

struct ggml_backend_cuda_context {
    cudaStream_t stream() { return nullptr; }
};

// Ours, in place of turbo/launch.cuh's.
template <typename... Params, typename... Args>
void turbo_launch(void (*kernel)(Params...),
                  dim3 grid,
                  dim3 block,
                  size_t /*shared*/,
                  cudaStream_t /*stream*/,
                  Args... args) {
    lanes::launch(kernel, grid, block, args...);
}

constexpr int ggml_cuda_get_physical_warp_size() {
    return lanes::wave;
}

constexpr int ggml_cuda_get_max_cpy_bytes() {
    return 16;
}

// Upstream's is empty on HIP, where a wave runs in lockstep.
inline void ggml_cuda_syncwarp(LANES_HERE) {
    lanes::meet(lanes::my_warp(), { "ggml_cuda_syncwarp", file, line });
}

inline void ggml_cuda_pdl_sync() {}

inline void ggml_cuda_pdl_lc() {}

inline int ggml_cuda_dp4a(int a, int b, int c) {
    return __dp4a(a, b, c);
}

template <int width = WARP_SIZE, typename T> T warp_reduce_sum(T x, LANES_HERE) {
    for (int offset = width / 2; offset > 0; offset >>= 1) {
        x = x + __shfl_xor_sync(0xffffffff, x, offset, width, file, line);
    }
    return x;
}

template <int width = WARP_SIZE> float2 warp_reduce_sum(float2 a, LANES_HERE) {
    return { warp_reduce_sum<width>(a.x, file, line), warp_reduce_sum<width>(a.y, file, line) };
}

template <int width = WARP_SIZE> float warp_reduce_max(float x, LANES_HERE) {
    for (int offset = width / 2; offset > 0; offset >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset, width, file, line));
    }
    return x;
}

template <int nbytes, int alignment = 0> void ggml_cuda_memcpy_1(void * dst, const void * src) {
    constexpr int step = alignment == 0 ? nbytes : alignment;
    static_assert(nbytes <= ggml_cuda_get_max_cpy_bytes() || alignment == 0, "more than one instruction copies");
    if (reinterpret_cast<uintptr_t>(dst) % step || reinterpret_cast<uintptr_t>(src) % step) {
        lanes::fail("ggml_cuda_memcpy_1: not aligned to " + std::to_string(step));
    }
    memcpy(dst, src, nbytes);
}

//
// division by a constant
//

// Upstream's third word is the divisor, too.
inline uint3 init_fastdiv_values(uint64_t d) {
    return { 0, 0, static_cast<unsigned>(d) };
}

inline uint32_t fastdiv(uint32_t n, uint3 d) {
    return n / d.z;
}

inline uint32_t fastmodulo(uint32_t n, uint3 d) {
    return n % d.z;
}

inline uint2 fast_div_modulo(uint32_t n, uint3 d) {
    return { n / d.z, n % d.z };
}
