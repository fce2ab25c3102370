#pragma once

#include "ggml-cuda/common.cuh"

// Launching a kernel as a function call, which any C++ compiler understands: tests/kernels/lanes has one of its own.
#if defined(__CUDACC__) || defined(__HIP__) || defined(GGML_USE_MUSA)
template <typename... Params, typename... Args>
static void turbo_launch(void (*kernel)(Params...),
                         dim3         grid,
                         dim3         block,
                         size_t       shared,
                         cudaStream_t stream,
                         Args... args) {
    kernel<<<grid, block, shared, stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}
#endif
