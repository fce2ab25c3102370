#pragma once

// The ways of attention: decode (turbo-attn-decode.cu), and prefill in slices (turbo-attn-prefill.cu).

#include "ggml-cuda/common.cuh"

// One of the segments of keys of an op. Without a mask all keys are seen.
struct turbo_kv {
    const ggml_tensor * K;
    const ggml_tensor * V;
    const ggml_tensor * mask;
};

static inline turbo_kv turbo_first_kv(const ggml_tensor * dst) {
    return { dst->src[1], dst->src[2], dst->src[3] };
}

// What ggml_turbo_flash_attn_add_segment added.
static inline turbo_kv turbo_second_kv(const ggml_tensor * dst) {
    return { dst->src[5], dst->src[6], dst->src[7] };
}

// Attends few queries. False: there is no kernel for the types, or slices are faster; nothing is done.
bool ggml_cuda_turbo_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Attends any number of queries.
void ggml_cuda_turbo_prefill(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// Whether slices of an op that are not the only one go to matrix cores.
bool ggml_cuda_turbo_slices_use_matrix_cores(int device, const ggml_tensor * dst);
