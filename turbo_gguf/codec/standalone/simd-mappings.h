#pragma once

// Stands in for upstream's header of the same name: see ggml.h.

#include "ggml-impl.h"

#if defined(__F16C__)
#    include <immintrin.h>
#    define GGML_CPU_FP16_TO_FP32(x) _cvtsh_ss(x)
#    define GGML_CPU_FP32_TO_FP16(x) _cvtss_sh(x, 0)
#else
#    define GGML_CPU_FP16_TO_FP32(x) GGML_FP16_TO_FP32(x)
#    define GGML_CPU_FP32_TO_FP16(x) GGML_FP32_TO_FP16(x)
#endif
