#pragma once

// What turbo types may lose in test-quantize-fns, whose rows are not rotated: the bounds of upstream's types of as many bits.

#include "ggml.h"

static int turbo_bits(ggml_type type) {
    switch (type) {
#define TURBO_BITS(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                           \
        return BITS;
        GGML_TURBO_TYPES_X(TURBO_BITS)
#undef TURBO_BITS
        default:
            return 0;
    }
}

static float turbo_max_quantization_error(ggml_type type) {
    const int bits = turbo_bits(type);
    return bits == 2 ? 0.0075f : bits == 3 ? 0.0040f : 0.002f;
}

static float turbo_max_dot_error(ggml_type type) {
    return turbo_bits(type) == 2 ? 0.15f : 0.02f;
}
