// Generated from turbo_gguf/codec/tables.py by `python -m turbo_gguf.codec.codegen`: do not edit.
//
// The list of turbo types, by ascending id. A list expands X for each type, with
//
//     ENUM     its name in enum ggml_type, after GGML_TYPE_, and the prefix of its constants in turbo/tables.h
//     NAME     as on the command line, unquoted
//     C_NAME   as in the names of its block and its functions
//     FAMILY   SCALAR or TRELLIS, as in QK_SCALAR
//     BITS     of a value, without its share of the scale

#pragma once

// clang-format off

#define GGML_TURBO_SCALAR_TYPES_X(X) \
    X(TURBO2_0, turbo2, turbo2_0, SCALAR, 2) \
    X(TURBO3_0, turbo3, turbo3_0, SCALAR, 3) \
    X(TURBO4_0, turbo4, turbo4_0, SCALAR, 4)

#define GGML_TURBO_TRELLIS_TYPES_X(X) \
    X(TURBO2_T, turbo2t, turbo2_t, TRELLIS, 2) \
    X(TURBO3_T, turbo3t, turbo3_t, TRELLIS, 3) \
    X(TURBO4_T, turbo4t, turbo4_t, TRELLIS, 4)

#define GGML_TURBO_TYPES_X(X) \
    X(TURBO2_0, turbo2, turbo2_0, SCALAR, 2) \
    X(TURBO3_0, turbo3, turbo3_0, SCALAR, 3) \
    X(TURBO4_0, turbo4, turbo4_0, SCALAR, 4) \
    X(TURBO2_T, turbo2t, turbo2_t, TRELLIS, 2) \
    X(TURBO3_T, turbo3t, turbo3_t, TRELLIS, 3) \
    X(TURBO4_T, turbo4t, turbo4_t, TRELLIS, 4)

// all of them, between commas
#define GGML_TURBO_TYPES GGML_TYPE_TURBO2_0, GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO4_0, GGML_TYPE_TURBO2_T, GGML_TYPE_TURBO3_T, GGML_TYPE_TURBO4_T
