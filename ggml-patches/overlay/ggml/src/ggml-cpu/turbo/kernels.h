#pragma once

// Kernels of the turbo types on the CPU: encoding of cache rows, and dot products with Q8_0 activations.
// Formats: turbo/scalar.h, turbo/trellis.h.

#include "turbo/trellis.h"

#ifdef __cplusplus
extern "C" {
#endif

// Which implementation of the scalar types' kernels this build uses: "avx2", "neon" or "generic".
const char * ggml_turbo_cpu_scalar_isa(void);

// For each type:
//
// quantize_row_*       The same bits as quantize_row_*_ref.
// ggml_vec_dot_*_q8_0  *s = <x,y> of n values. All implementations return the same bits: integers within a block, then exact products
//                      summed in binary64 in a fixed order. Expects y[i].qs > -128, as every Q8_0 encoder of ggml writes.
#define TURBO_DECLARE_KERNELS(ENUM, NAME, C_NAME, FAMILY, BITS)                                                 \
    void quantize_row_##C_NAME(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);               \
    void ggml_vec_dot_##C_NAME##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, \
                                      size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
GGML_TURBO_TYPES_X(TURBO_DECLARE_KERNELS)
#undef TURBO_DECLARE_KERNELS

#ifdef __cplusplus
}
#endif
