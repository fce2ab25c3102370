#pragma once

// Attention over caches of turbo types on the CPU.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Which implementation this build uses: "avx512-vnni", "avx2", "neon-dotprod" or "generic".
const char * ggml_turbo_cpu_attn_isa(void);

// Computes a GGML_OP_FLASH_ATTN_EXT; false: not ours, nothing was done. Ops with a second segment of keys are always ours. Which others
// are is up to the environment variable GGML_TURBO_CPU_ATTN: 0 none, 1 those with keys or values of a turbo type (the default), all every
// type of a cache.
bool ggml_turbo_cpu_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Whether that can compute this op.
bool ggml_turbo_cpu_attn_supported(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
