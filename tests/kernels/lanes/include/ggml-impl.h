// Stands in for upstream's header of the same name: see ggml.h.

#pragma once

#include "ggml.h"

#define GGML_LOG_WARN(...) fprintf(stderr, __VA_ARGS__)

struct ggml_cgraph {
    int            n_nodes;
    ggml_tensor ** nodes;
};
