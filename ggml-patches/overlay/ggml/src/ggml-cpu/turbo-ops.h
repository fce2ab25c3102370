#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Computes ops whose upstream switch over types does not know turbo types; false: not ours, nothing was done.
bool ggml_turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// False if the op has a turbo tensor that the CPU backend can't compute with; true says nothing about other types.
bool ggml_turbo_cpu_supports_op(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
