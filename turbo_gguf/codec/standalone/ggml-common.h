#pragma once

// Stands in for upstream's header of the same name: see ggml.h.

#include <stdint.h>

#define GGML_COMMON_DECL

typedef uint16_t ggml_half;

#define QK8_0 32

typedef struct {
    ggml_half d;
    int8_t    qs[QK8_0];
} block_q8_0;
