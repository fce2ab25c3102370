#pragma once

// The turbo cache types as the rest of ggml and llama sees them. Included by ggml.h after enum ggml_type;
// block layouts and codecs are in ggml-turbo.h.

#undef GGML_TYPE_COUNT
#define GGML_TYPE_COUNT GGML_TYPE_TURBO_COUNT

// all turbo types, for lists of types
#define GGML_TURBO_TYPES GGML_TYPE_TURBO2_0, GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO4_0

static inline bool ggml_is_turbo(enum ggml_type type) {
    return type >= GGML_TYPE_TURBO2_0 && type < GGML_TYPE_TURBO_COUNT;
}
