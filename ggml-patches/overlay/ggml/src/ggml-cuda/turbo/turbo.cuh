#pragma once

#include "ggml-cuda/common.cuh"

// Turbo cache types on the GPU: what ggml-cuda.cu calls, and what our own files share.

// What ggml_backend_reg_get_proc_address(reg, "ggml_turbo_ops") gives: these devices know decay and attention over two segments of keys.
// Which shapes and types of them, supports_op says.
bool ggml_cuda_turbo_ops(void);

// Whether op makes or takes a turbo tensor, or attends two segments of keys: only then is the rest asked.
bool ggml_cuda_turbo_is_operand(const ggml_tensor * op);

bool ggml_cuda_turbo_supports_op(int device, const ggml_tensor * op);

// Runs op if it is one of these; false: it is not.
bool ggml_cuda_turbo_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Computes node i of a graph together with a later one, if both write few rows of turbo types: K and V of a layer. Returns how far
// behind i the later one is; there is nothing to compute in between. 0: node i is still to be computed.
int ggml_cuda_turbo_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

// Rows ne[0], ne[1], ne[2], ne[3] of a turbo type, at strides of nb bytes, to contiguous f16 or f32. n_rows: of each matrix in f16, ne[1] of
// them or more; the others are left as they are.
void ggml_cuda_turbo_to_f16(ggml_type     type,
                            const char *  x,
                            half *        y,
                            const int64_t ne[4],
                            const size_t  nb[4],
                            int64_t       n_rows,
                            cudaStream_t  stream);
void ggml_cuda_turbo_to_f32(ggml_type     type,
                            const char *  x,
                            float *       y,
                            const int64_t ne[4],
                            const size_t  nb[4],
                            cudaStream_t  stream);

// The first of these for slices of a KV cache (turbo-unpack.cu). False: nothing is done, the tensor is no such slice.
bool ggml_cuda_turbo_unpack(ggml_type     type,
                            const char *  x,
                            half *        y,
                            const int64_t ne[4],
                            const size_t  nb[4],
                            int64_t       n_rows,
                            cudaStream_t  stream);

// Copies two tensors of f16 to others of the same shape, by one launch; a sequence alone is repeated. False: not all rows are aligned to 16
// bytes, nothing is done.
struct turbo_copied {
    const ggml_tensor * src;
    const ggml_tensor * dst;
};

bool ggml_cuda_turbo_copy_rows(const turbo_copied (&copies)[2], cudaStream_t stream);

// Flash attention with a turbo type as K, as V, or as both, or over two segments of keys (turbo-attn.cu).
bool ggml_cuda_turbo_flash_attn_supported(int device, const ggml_tensor * dst);
void ggml_cuda_turbo_flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
