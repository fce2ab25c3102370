#pragma once

// The compiled decode kernels.

#include "attn-args.cuh"

// The kernel for one head size, which takes n_cols columns in a block, and the one that merges the parts it leaves.
struct turbo_decode_kernels {
    void (*decode)(turbo_attn_args args);
    void (*merge)(const float * parts, const float2 * meta, float * dst, int n_parts);
    int n_cols;
};

// The kernels of one pair of types for a head size that ggml_cuda_turbo_flash_attn_supported lets pass, and for so many columns.
typedef turbo_decode_kernels (*turbo_attn_decode_t)(int DK, int DV, int n_columns);

// Those of a pair, or null where they are not compiled. Defined in turbo-attn-decode-*.cu, one per type of K.
turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo2(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo3(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo4(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo2t(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo3t(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo4t(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_q8_0(ggml_type type_v);
turbo_attn_decode_t ggml_cuda_turbo_decode_k_f16(ggml_type type_v);
