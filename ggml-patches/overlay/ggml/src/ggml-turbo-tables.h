// Generated from turbo_gguf/codec/tables.py by `python -m turbo_gguf.codec.codegen`: do not edit.
//
// Initialisers only, so that C, C++, CUDA and HIP can each declare their tables where they want them:
//     static const int8_t turbo4_codebook[16] = { TURBO4_CODEBOOK };
//
// CODEBOOK    decoded value = d * CODEBOOK[index]; ascending, so that the high index bit is set for the positive half
// MAGNITUDES  positive half of the codebook
// THRESHOLDS  one row per step that the scale search tries: with t = round(|x| * T_MAX / max|x|), the magnitude index is
//             the number of thresholds of the row that t exceeds
// PLAIN       the row that is used without a search

#pragma once

// clang-format off

// encoder
#define QK_TURBO 32
#define TURBO_T_MAX 8191
#define TURBO_AMAX_MIN 9.09494702e-13f
#define TURBO_HALF_MAX 65504.0f
#define TURBO_HALF_NAN 0x7e00

// turbo2: 2.5 bits per value
#define TURBO2_BLOCK_BYTES 10
#define TURBO2_CODEBOOK -10, -3, 3, 10
#define TURBO2_MAGNITUDES 3, 10
#define TURBO2_N_STEPS 4
#define TURBO2_THRESHOLDS \
    { 2662 }, \
    { 3194 }, \
    { 3726 }, \
    { 4259 }
#define TURBO2_PLAIN 3460

// turbo3: 3.5 bits per value
#define TURBO3_BLOCK_BYTES 14
#define TURBO3_CODEBOOK -88, -55, -31, -10, 10, 31, 55, 88
#define TURBO3_MAGNITUDES 10, 31, 55, 88
#define TURBO3_N_STEPS 4
#define TURBO3_THRESHOLDS \
    { 1431, 3001, 4991 }, \
    { 1583, 3322, 5523 }, \
    { 1755, 3682, 6122 }, \
    { 1908, 4002, 6655 }
#define TURBO3_PLAIN 1717, 3602, 5989

// turbo4: 4.5 bits per value
#define TURBO4_BLOCK_BYTES 18
#define TURBO4_CODEBOOK -104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104
#define TURBO4_MAGNITUDES 5, 15, 25, 36, 48, 62, 79, 104
#define TURBO4_N_STEPS 4
#define TURBO4_THRESHOLDS \
    { 708, 1417, 2161, 2977, 3898, 4997, 6485 }, \
    { 748, 1496, 2282, 3142, 4115, 5274, 6846 }, \
    { 779, 1559, 2378, 3274, 4288, 5497, 7134 }, \
    { 819, 1638, 2498, 3440, 4505, 5774, 7494 }
#define TURBO4_PLAIN 748, 1496, 2282, 3142, 4115, 5274, 6846
