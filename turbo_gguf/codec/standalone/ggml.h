#pragma once

// Stands in for upstream's header of the same name where the oracle compiles our C files without an upstream tree.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GGML_API      extern
#define GGML_RESTRICT restrict

struct ggml_context;
struct ggml_tensor;

enum ggml_type {
#include "ggml-turbo-enum.inc"
    GGML_TYPE_Q8_0 = 8,
};
#include "ggml-turbo-types.h"

typedef uint16_t ggml_fp16_t;
