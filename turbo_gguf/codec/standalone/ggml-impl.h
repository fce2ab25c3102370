#pragma once

// Stands in for upstream's header of the same name: see ggml.h. Conversions between binary32 and binary16, to nearest even.

#include "ggml.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define GGML_LOG_WARN(...) fprintf(stderr, __VA_ARGS__)

static inline float standalone_half_to_float(ggml_fp16_t h) {
    const float sign     = (h & 0x8000) ? -1.0f : 1.0f;
    const int   exponent = (h >> 10) & 31;
    const int   mantissa = h & 1023;
    if (exponent == 31) {
        return mantissa ? NAN : sign * INFINITY;
    }
    return exponent ? sign * ldexpf((float) (mantissa + 1024), exponent - 25) : sign * ldexpf((float) mantissa, -24);
}

static inline ggml_fp16_t standalone_float_to_half(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    const uint32_t    magnitude = u & 0x7fffffff;
    const ggml_fp16_t sign      = (ggml_fp16_t) (u >> 16 & 0x8000);
    if (magnitude > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (magnitude >= 0x477ff000) { // 65520: rounds to infinity
        return sign | 0x7c00;
    }
    if (magnitude < 0x38800000) { // below the smallest normal number: a multiple of 2^-24
        return sign | (ggml_fp16_t) rintf(fabsf(f) * 16777216.0f);
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return sign | (ggml_fp16_t) ((magnitude - 0x38000000 + 0xfff + odd) >> 13);
}

#define GGML_FP16_TO_FP32(x) standalone_half_to_float(x)
#define GGML_FP32_TO_FP16(x) standalone_float_to_half(x)
