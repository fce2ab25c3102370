// Generated from turbo_gguf/codec/tables.py by `python -m turbo_gguf.codec.codegen`: do not edit.
//
// What turbo/tables.h has (its comment explains the names), for shaders, and of each type:
//
// ID       its number in enum ggml_type
// BITS     of a value, without its share of the scale
// BLOCK    values of a block
// LEVELS   of all its codebooks, the fine one first
// WORDS    the levels as int8, four in a word, the first one lowest

#if !defined(TURBO_TABLES_GLSL)
#define TURBO_TABLES_GLSL

// binary32 as integers
#define TURBO_FLT_MAX_BITS 0x7f7fffff
#define TURBO_INFINITY_BITS 0x7f800000

// scalar types
#define QK_SCALAR 32
#define SCALAR_T_MAX 8191
#define SCALAR_AMAX_MIN 9.09494702e-13f
#define SCALAR_HALF_MAX 65504.0f
#define SCALAR_HALF_NAN 0x7e00

// turbo2: 2.5 bits per value
#define TURBO2_0_BLOCK_BYTES 10
#define TURBO2_0_CODEBOOK -10, -3, 3, 10
#define TURBO2_0_MAGNITUDES 3, 10
#define TURBO2_0_N_STEPS 4
#define TURBO2_0_THRESHOLDS \
    { 2662 }, \
    { 3194 }, \
    { 3726 }, \
    { 4259 }
#define TURBO2_0_PLAIN 3460

// turbo3: 3.5 bits per value
#define TURBO3_0_BLOCK_BYTES 14
#define TURBO3_0_CODEBOOK -88, -55, -31, -10, 10, 31, 55, 88
#define TURBO3_0_MAGNITUDES 10, 31, 55, 88
#define TURBO3_0_N_STEPS 4
#define TURBO3_0_THRESHOLDS \
    { 1431, 3001, 4991 }, \
    { 1583, 3322, 5523 }, \
    { 1755, 3682, 6122 }, \
    { 1908, 4002, 6655 }
#define TURBO3_0_PLAIN 1717, 3602, 5989

// turbo4: 4.5 bits per value
#define TURBO4_0_BLOCK_BYTES 18
#define TURBO4_0_CODEBOOK -104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104
#define TURBO4_0_MAGNITUDES 5, 15, 25, 36, 48, 62, 79, 104
#define TURBO4_0_N_STEPS 4
#define TURBO4_0_THRESHOLDS \
    { 708, 1417, 2161, 2977, 3898, 4997, 6485 }, \
    { 748, 1496, 2282, 3142, 4115, 5274, 6846 }, \
    { 779, 1559, 2378, 3274, 4288, 5497, 7134 }, \
    { 819, 1638, 2498, 3440, 4505, 5774, 7494 }
#define TURBO4_0_PLAIN 748, 1496, 2282, 3142, 4115, 5274, 6846

// trellis types
#define QK_TRELLIS 64
#define TRELLIS_SEGMENT 8
#define TRELLIS_N_SEGMENTS 8
#define TRELLIS_N_STATES 8
#define TRELLIS_LEVEL_STEPS 64
#define TRELLIS_N_SCALES 5
#define TRELLIS_SCALE_MIN 0x08
#define TRELLIS_SCALE_MAX 0xf7
#define TRELLIS_SCALE_NAN 0xff
#define TRELLIS_CODE_BIAS 896
#define TRELLIS_AMAX_MIN 3.81469727e-06f
#define TRELLIS_RMS_MAX 4095
#define TRELLIS_X_MAX 1023
#define TRELLIS_X_END 512
#define TRELLIS_DISTANCE_MAX 255
#define TRELLIS_COST_MAX 5000
#define TRELLIS_AMAX_PART 4
#define TRELLIS_MAX_LEVELS 32

// turbo2t: 2.25 bits per value
#define TURBO2_T_BLOCK_BYTES 18
#define TURBO2_T_REACH 0.98f
#define TURBO2_T_X_STEPS 1
#define TURBO2_T_X_SCALE 68.608f
#define TURBO2_T_FINE -81, -49, -27, -9, 9, 27, 49, 81
#define TURBO2_T_COARSE -127, -69, -37, -13, 13, 37, 69, 127

// turbo3t: 3.25 bits per value
#define TURBO3_T_BLOCK_BYTES 26
#define TURBO3_T_REACH 1.18f
#define TURBO3_T_X_STEPS 2
#define TURBO3_T_X_SCALE 130.112f
#define TURBO3_T_FINE -94, -68, -52, -40, -30, -21, -12, -4, 4, 12, 21, 30, 40, 52, 68, 94
#define TURBO3_T_COARSE -127, -89, -71, -53, -39, -27, -16, -5, 5, 16, 27, 39, 53, 71, 89, 127

// turbo4t: 4.25 bits per value
#define TURBO4_T_BLOCK_BYTES 34
#define TURBO4_T_REACH 1.32f
#define TURBO4_T_X_STEPS 2
#define TURBO4_T_X_SCALE 128.5248f
#define TURBO4_T_FINE -93, -71, -62, -54, -47, -41, -36, -32, -27, -23, -19, -16, -12, -9, -5, -2, 2, 5, 9, 12, 16, 19, 23, 27, 32, 36, 41, 47, 54, 62, 71, 93
#define TURBO4_T_COARSE -127, -105, -85, -77, -66, -57, -50, -44, -39, -33, -27, -22, -17, -12, -7, -3, 3, 7, 12, 17, 22, 27, 33, 39, 44, 50, 57, 66, 77, 85, 105, 127

// turbo2
#define TURBO2_0_ID 64
#define TURBO2_0_BITS 2
#define TURBO2_0_BLOCK 32
#define TURBO2_0_LEVELS 4
#define TURBO2_0_WORDS 0x0a03fdf6u

// turbo3
#define TURBO3_0_ID 65
#define TURBO3_0_BITS 3
#define TURBO3_0_BLOCK 32
#define TURBO3_0_LEVELS 8
#define TURBO3_0_WORDS 0xf6e1c9a8u, 0x58371f0au

// turbo4
#define TURBO4_0_ID 66
#define TURBO4_0_BITS 4
#define TURBO4_0_BLOCK 32
#define TURBO4_0_LEVELS 16
#define TURBO4_0_WORDS 0xd0c2b198u, 0xfbf1e7dcu, 0x24190f05u, 0x684f3e30u

// turbo2t
#define TURBO2_T_ID 67
#define TURBO2_T_BITS 2
#define TURBO2_T_BLOCK 64
#define TURBO2_T_LEVELS 16
#define TURBO2_T_WORDS 0xf7e5cfafu, 0x51311b09u, 0xf3dbbb81u, 0x7f45250du

// turbo3t
#define TURBO3_T_ID 68
#define TURBO3_T_BITS 3
#define TURBO3_T_BLOCK 64
#define TURBO3_T_LEVELS 32
#define TURBO3_T_WORDS 0xd8ccbca2u, 0xfcf4ebe2u, 0x1e150c04u, 0x5e443428u, 0xcbb9a781u, 0xfbf0e5d9u, 0x271b1005u, 0x7f594735u

// turbo4t
#define TURBO4_T_ID 69
#define TURBO4_T_BITS 4
#define TURBO4_T_BLOCK 64
#define TURBO4_T_LEVELS 64
#define TURBO4_T_WORDS 0xcac2b9a3u, 0xe0dcd7d1u, 0xf0ede9e5u, 0xfefbf7f4u, 0x0c090502u, 0x1b171310u, 0x2f292420u, 0x5d473e36u, 0xb3ab9781u, 0xd4cec7beu, 0xeae5dfd9u, 0xfdf9f4efu, 0x110c0703u, 0x27211b16u, 0x4239322cu, 0x7f69554du

#endif  // !defined(TURBO_TABLES_GLSL)
