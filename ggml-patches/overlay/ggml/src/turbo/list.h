// Generated from turbo_gguf/codec/tables.py by `python -m turbo_gguf.codec.codegen`: do not edit.
//
// What the GPU backends are compiled for.
//
// GGML_TURBO_DECODE_PAIRS_X    types of K and V, as in enum ggml_type after GGML_TYPE_, with kernels for decode attention by default,
//                              grouped by K
// GGML_TURBO_HEAD_SIZES_X      sizes of the heads of K and V

#pragma once

#include "ggml-turbo-list.h"

// clang-format off

#define GGML_TURBO_DECODE_PAIRS_X(X) \
    X(F16, F16) \
    X(F16, TURBO2_0) \
    X(F16, TURBO3_0) \
    X(F16, TURBO4_0) \
    X(F16, TURBO2_T) \
    X(F16, TURBO3_T) \
    X(F16, TURBO4_T) \
    X(Q8_0, Q8_0) \
    X(Q8_0, TURBO2_0) \
    X(Q8_0, TURBO3_0) \
    X(Q8_0, TURBO4_0) \
    X(TURBO2_0, TURBO2_0) \
    X(TURBO3_0, TURBO3_0) \
    X(TURBO4_0, TURBO3_0) \
    X(TURBO4_0, TURBO4_0) \
    X(TURBO2_T, TURBO2_T) \
    X(TURBO3_T, TURBO3_T) \
    X(TURBO3_T, TURBO4_T) \
    X(TURBO4_T, TURBO3_T) \
    X(TURBO4_T, TURBO4_T)

#define GGML_TURBO_HEAD_SIZES_X(X) \
    X(64, 64) \
    X(96, 96) \
    X(128, 128) \
    X(192, 128) \
    X(256, 256) \
    X(512, 512) \
    X(576, 512)
