// Stands in for upstream's header of the same name: see ggml.h.

#pragma once

#include "device.h"

#define GGML_COMMON_DECL

typedef half  ggml_half;
typedef half2 ggml_half2;

#define QK4_0 32
#define QK4_1 32
#define QK5_0 32
#define QK5_1 32
#define QK8_0 32

typedef struct {
    ggml_half d;
    uint8_t   qs[QK4_0 / 2];
} block_q4_0;

typedef struct {
    ggml_half d;
    uint8_t   qh[4];
    uint8_t   qs[QK5_0 / 2];
} block_q5_0;

typedef struct {
    ggml_half d;
    int8_t    qs[QK8_0];
} block_q8_0;
