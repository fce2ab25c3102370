#pragma once

#include "ggml-cuda/common.cuh"

// Writing, reading and decay of rows of turbo tensors. What they accept is what ggml_cuda_turbo_supports_op says (turbo.cu).

// dst: turbo. src[0]: F32 or F16. src[1]: I32 or I64.
void ggml_cuda_turbo_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// The same if it is quicker by a block of threads for each trellis-coded block: false, and nothing is done, if it isn't.
bool ggml_cuda_turbo_set_few_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// dst: F32. src[0]: turbo. src[1]: I32.
void ggml_cuda_turbo_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// CPY, CONT, DUP: from F32, F16 or BF16 to turbo, back, or from a turbo type to itself; any strides, also another shape of the same size.
void ggml_cuda_turbo_copy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);

// What ggml_turbo_decay made: in place, contiguous.
void ggml_cuda_turbo_decay(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
