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

// Of tensors of floats, integers and turbo types.
size_t ggml_nbytes(const ggml_tensor * t) {
    const int64_t values = ggml_is_turbo(t->type) ? ggml_turbo_is_trellis(t->type) ? QK_TRELLIS : QK_SCALAR : 1;
    size_t        n      = ggml_is_empty(t) ? 0 : t->ne[0] / values * t->nb[0];
    for (int i = 1; i < GGML_MAX_DIMS && n > 0; ++i) {
        n += (t->ne[i] - 1) * t->nb[i];
    }
    return n;
}
