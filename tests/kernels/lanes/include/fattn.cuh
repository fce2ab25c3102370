// Stands in for upstream's header of the same name.

#pragma once

#include "ggml-cuda/common.cuh"

bool ggml_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst);
void ggml_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
