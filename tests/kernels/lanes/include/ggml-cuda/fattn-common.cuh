// Stands in for upstream's header of the same name.

#pragma once

#include "common.cuh"

#define FATTN_KQ_STRIDE 256

// clang-format off
typedef void (*fattn_kernel_t)(
    const char *, const char *, const char *, const char *, const char *, const int *, float *, float2 *,
    float, float, float, float, uint32_t, float,
    int32_t, uint3, int32_t, int32_t, int32_t, int32_t, int32_t,
    int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t,
    int32_t, int32_t, int64_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t);
// clang-format on
