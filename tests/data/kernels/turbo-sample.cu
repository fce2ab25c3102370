// Golden compiles: see README.md. One kernel without faults, one with scratch and shared memory, one that is not ours.
#ifdef __HIP__
#    include <hip/hip_runtime.h>
#else
#    include <cuda_runtime.h>
#endif

enum ggml_type { GGML_TYPE_Q8_0 = 8, GGML_TYPE_TURBO3_0 = 44 };

template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> static __global__ void turbo_attn_decode_kernel(float * x) {
    __shared__ float shared[DK];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float part[DV];
    for (int i = 0; i < DV; ++i) {
        part[i] = x[shared[i % DK] > 1.0f ? i : DV];
    }
    x[0] = n_cols > 1 ? part[(int) shared[DK - 1 - threadIdx.x]] : shared[DK - 1];
}

static __global__ void turbo_set_rows(float * x) {
    x[threadIdx.x] *= 2.0f;
}

static __global__ void other(float * x) {
    x[threadIdx.x] = 0.0f;
}

void launch(float * x) {
    int unused;
    turbo_attn_decode_kernel<64, 64, GGML_TYPE_TURBO3_0, GGML_TYPE_Q8_0, 4><<<1, 64>>>(x);
    turbo_set_rows<<<1, 64>>>(x);
    other<<<1, 64>>>(x);
}
