#pragma once

// What the hooks of the CPU backend call.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Computes ops whose upstream switch over types does not know turbo types; false: not ours, nothing was done.
bool ggml_turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// False if the op has a turbo tensor that the CPU backend can't compute with; true says nothing about other types.
bool ggml_turbo_cpu_supports_op(const struct ggml_tensor * op);

// Of ggml_backend_reg_get_proc_address(reg, "ggml_turbo_ops"): present where a backend knows the turbo ops, decay and attention over a
// second segment of keys.
bool ggml_turbo_cpu_ops(void);

#ifdef __cplusplus
}
#endif
