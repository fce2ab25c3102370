#pragma once

// CPU side of the turbo types: encoding of cache rows and dot products with Q8_0 activations. Formats: ggml-turbo.h, ggml-turbo-trellis.h.

#include "ggml-turbo-trellis.h"

#ifdef __cplusplus
extern "C" {
#endif

// Which implementation this build uses: "avx2", "neon" or "generic".
const char * ggml_turbo_cpu_isa(void);

// Same bits as quantize_row_turbo*_0_ref.
void quantize_row_turbo2_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_turbo3_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_turbo4_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// *s = <x,y> of n values. All implementations return the same bits: integers within a block, then exact products summed in
// binary64 in a fixed order. Expects y[i].qs > -128, as every Q8_0 encoder of ggml writes.
void ggml_vec_dot_turbo2_0_q8_0(int                        n,
                                float * GGML_RESTRICT      s,
                                size_t                     bs,
                                const void * GGML_RESTRICT vx,
                                size_t                     bx,
                                const void * GGML_RESTRICT vy,
                                size_t                     by,
                                int                        nrc);
void ggml_vec_dot_turbo3_0_q8_0(int                        n,
                                float * GGML_RESTRICT      s,
                                size_t                     bs,
                                const void * GGML_RESTRICT vx,
                                size_t                     bx,
                                const void * GGML_RESTRICT vy,
                                size_t                     by,
                                int                        nrc);
void ggml_vec_dot_turbo4_0_q8_0(int                        n,
                                float * GGML_RESTRICT      s,
                                size_t                     bs,
                                const void * GGML_RESTRICT vx,
                                size_t                     bx,
                                const void * GGML_RESTRICT vy,
                                size_t                     by,
                                int                        nrc);

// The same for the trellis types, in turbo-trellis.cpp.
void quantize_row_turbo2_t(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_turbo3_t(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_turbo4_t(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_turbo2_t_q8_0(int                        n,
                                float * GGML_RESTRICT      s,
                                size_t                     bs,
                                const void * GGML_RESTRICT vx,
                                size_t                     bx,
                                const void * GGML_RESTRICT vy,
                                size_t                     by,
                                int                        nrc);
void ggml_vec_dot_turbo3_t_q8_0(int                        n,
                                float * GGML_RESTRICT      s,
                                size_t                     bs,
                                const void * GGML_RESTRICT vx,
                                size_t                     bx,
                                const void * GGML_RESTRICT vy,
                                size_t                     by,
                                int                        nrc);
void ggml_vec_dot_turbo4_t_q8_0(int                        n,
                                float * GGML_RESTRICT      s,
                                size_t                     bs,
                                const void * GGML_RESTRICT vx,
                                size_t                     bx,
                                const void * GGML_RESTRICT vy,
                                size_t                     by,
                                int                        nrc);

#ifdef __cplusplus
}
#endif
