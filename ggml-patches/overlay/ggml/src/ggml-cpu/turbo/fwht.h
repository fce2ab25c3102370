#pragma once

// The rotation of caches on the CPU: fast Walsh-Hadamard transform.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Computes a GGML_OP_MUL_MAT by a matrix that is hinted to be a Hadamard matrix; false: not ours, nothing was done. The same bits as
// upstream's, whose first stages are scalar: 3 % of the decode of a 0.6B model.
bool ggml_turbo_cpu_fwht(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
