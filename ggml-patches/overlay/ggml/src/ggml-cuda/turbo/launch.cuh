#pragma once

#include "ggml-cuda/common.cuh"

// Launching a kernel as a function call, which any C++ compiler understands: tests/kernels/lanes has one of its own.
//
// As upstream launches its own: on Hopper and later a kernel starts when its predecessor on the stream is about to end, so it has to call
// ggml_cuda_pdl_sync() before it reads or writes what another kernel may write or read. Constants it may read before.
#if defined(__CUDACC__) || defined(__HIP__) || defined(GGML_USE_MUSA)
template <typename... Params, typename... Args>
static void turbo_launch(void (*kernel)(Params...),
                         dim3         grid,
                         dim3         block,
                         size_t       shared,
                         cudaStream_t stream,
                         Args... args) {
    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, block, shared, stream), Params(args)...);
}
#endif
