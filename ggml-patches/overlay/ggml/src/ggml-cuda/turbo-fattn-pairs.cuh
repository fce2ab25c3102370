#pragma once

// The compiled decode kernels.

#include "turbo-fattn.cuh"

// Runs the decode kernel of one pair of types, for all head sizes that ggml_cuda_turbo_flash_attn_supported lets pass.
typedef void (*turbo_fattn_decode_t)(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, turbo_fattn_args args);

// The compiled decode kernel of a pair, or null. Defined in turbo-fattn-decode-*.cu, one per type of K.
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_turbo2(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_turbo3(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_turbo4(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_turbo2t(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_turbo3t(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_turbo4t(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_q8_0(ggml_type type_v);
turbo_fattn_decode_t ggml_cuda_turbo_decode_k_f16(ggml_type type_v);
