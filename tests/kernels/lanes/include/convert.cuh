// Stands in for upstream's header of the same name.

#pragma once

#include "ggml-cuda/common.cuh"

typedef void (*to_fp16_nc_cuda_t)(const void * x,
                                  half *       y,
                                  int64_t      ne00,
                                  int64_t      ne01,
                                  int64_t      ne02,
                                  int64_t      ne03,
                                  int64_t      s01,
                                  int64_t      s02,
                                  int64_t      s03,
                                  cudaStream_t stream);

to_fp16_nc_cuda_t ggml_get_to_fp16_nc_cuda(ggml_type type);
