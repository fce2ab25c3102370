#pragma once

// Sizes of types, in place of ggml.c. Included by one file of a library.

#include "ggml.h"

size_t ggml_type_size(ggml_type type) {
    switch (type) {
#define LANES_SIZE(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                           \
        return sizeof(block_##C_NAME);
        GGML_TURBO_TYPES_X(LANES_SIZE)
#undef LANES_SIZE
        case GGML_TYPE_Q8_0:
            return sizeof(block_q8_0);
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
            return 2;
        case GGML_TYPE_I64:
            return 8;
        default:
            return 4;
    }
}
