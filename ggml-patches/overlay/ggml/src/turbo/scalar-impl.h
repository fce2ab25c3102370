#pragma once

// What the reference encoder (turbo/scalar.c) and the SIMD encoders share, so that they can't drift apart.

#include "turbo/scalar.h"

#include <math.h>

// d of a block, from sums over its integers t (|x| is about t * unit) and the magnitudes c chosen for them. tt is only read for the
// rules that need it. Single operations only: nothing that a compiler could contract into an FMA.
static inline float scalar_block_scale(enum ggml_turbo_scale scale, int32_t tc, int32_t cc, int32_t tt, float unit) {
    float units;
    switch (scale) {
        case GGML_TURBO_SCALE_MATCHED_NORM:
            units = sqrtf((float) tt / (float) cc);
            break;
        case GGML_TURBO_SCALE_INNER_PRODUCT:
            units = (float) tt / (float) tc;
            break;
        case GGML_TURBO_SCALE_LEAST_SQUARES:
        default:
            units = (float) tc / (float) cc;
            break;
    }
    const float d = units * unit;
    return d < SCALAR_HALF_MAX ? d : SCALAR_HALF_MAX;
}

static inline bool scalar_is_finite(ggml_half d) {
    return (d & 0x7c00) != 0x7c00;
}
