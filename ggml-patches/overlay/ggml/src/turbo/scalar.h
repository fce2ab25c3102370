#pragma once

// turbo2_0, turbo3_0, turbo4_0: scalar codebook types for KV caches, 2.5 / 3.5 / 4.5 bits per value
//
// The format contract. A block holds 32 values; value i decodes to
//
//     d * codebook[index(i)]          d: fp16, codebook: int8 (turbo/tables.h), ascending and odd-symmetric
//
// which is exact in binary32 (11 x 7 bits), so CPU, GPU and the Python reference decode to the same numbers. The codebook is
// the definition for float decoding and for integer dot products alike. Bits, least significant on the right:
//
//     block_turbo2_0   10 bytes   | d | qs[8] |
//         qs[j]      bits 76 | 54 | 32 | 10        j = 0 .. 7
//         values        j+24 j+16  j+8    j
//
//     block_turbo3_0   14 bytes   | d | qs[8] | signs[4] |
//         qs[j]      bits 76 | 54 | 32 | 10        the low two bits of the index, ordered as in turbo2
//         values        j+24 j+16  j+8    j
//         signs[k]   bits    7    6    5    4    3    2    1    0
//         values          k+28 k+24 k+20 k+16 k+12  k+8  k+4    k        k = 0 .. 3
//                    the high bit of the index: set for the positive half
//     Four at a time: with little-endian words q = qs[4h .. 4h+3] and s = signs[0 .. 3], the index of value 8p + 4h + k is byte k of
//         (q >> 2p & 0x03030303) | (s >> (2p + h) & 0x01010101) << 2
//
//     block_turbo4_0   18 bytes   | d | qs[16] |
//         qs[j]      bits 7654 | 3210              j = 0 .. 15
//         values          j+16      j
//
// The high bit of an index is the sign: clear for the negative half. A block of zero bytes decodes to zeros.
//
// What the encoder promises (turbo/scalar.c is the reference; SIMD and GPU encoders store the same bits):
//     zeros, and rows too small for an fp16 scale    a block of zero bytes
//     a NaN anywhere in the block                    d is NaN: all 32 values decode to NaN, ggml_validate_row_data says no
//     infinity                                       encoded like +-FLT_MAX
//     finite input                                   finite output: d is clamped to the largest fp16 number, 65504
//     -x                                             the block of x with all indices mirrored, same d
//
// Decay takes one bit off stored blocks of turbo3 and turbo4, in place: the low bit of an index becomes a copy of its high bit. Of two
// neighbouring magnitudes the larger one stays, so that half of the codebook is left:
//
//     turbo3    10 31 55 88                   ->  31 88
//     turbo4    5 15 25 36 48 62 79 104       ->  15 36 62 104
//
// and d is fitted anew by the scale rule, as if the levels so far were the values to encode. Signs stay, and so does a block that has
// decayed already (all its low bits are copies), and one whose d is infinite or NaN.

#include "ggml.h"

#ifndef GGML_COMMON_DECL
#    define GGML_COMMON_DECL_C
#endif
#include "ggml-common.h"
#include "turbo/tables.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    ggml_half d;                  // scale
    uint8_t   qs[QK_SCALAR / 4];  // indices, 2 bits
} block_turbo2_0;

typedef struct {
    ggml_half d;                     // scale
    uint8_t   qs[QK_SCALAR / 4];     // indices, low 2 bits
    uint8_t   signs[QK_SCALAR / 8];  // indices, high bit
} block_turbo3_0;

typedef struct {
    ggml_half d;                  // scale
    uint8_t   qs[QK_SCALAR / 2];  // indices, 4 bits
} block_turbo4_0;

#ifdef __cplusplus
#    define TURBO_STATIC_ASSERT static_assert
#else
#    define TURBO_STATIC_ASSERT _Static_assert
#endif

#define TURBO_CHECK_BLOCK(ENUM, NAME, C_NAME, FAMILY, BITS) \
    TURBO_STATIC_ASSERT(sizeof(block_##C_NAME) == ENUM##_BLOCK_BYTES, "wrong " #C_NAME " block size/padding");
GGML_TURBO_SCALAR_TYPES_X(TURBO_CHECK_BLOCK)

#ifdef __cplusplus
extern "C" {
#endif

// How the encoder chooses d once the indices c are known, for a block x. The format is the same.
enum ggml_turbo_scale {
    GGML_TURBO_SCALE_LEAST_SQUARES = 0,  // <x,c> / |c|^2: smallest squared error
    GGML_TURBO_SCALE_MATCHED_NORM  = 1,  // |x| / |c|: decoded blocks keep their norm
    GGML_TURBO_SCALE_INNER_PRODUCT = 2,  // |x|^2 / <x,c>: <x, decoded x> = |x|^2, scores are unbiased
};

// The scale rule of all encoders of this process. Without a call: environment variable GGML_TURBO_SCALE (ls, matched or ip) as it is
// at the first encoded row, else matched norm. Takes effect with the next row; rows already stored stay valid.
GGML_API void                  ggml_turbo_set_scale(enum ggml_turbo_scale scale);
GGML_API enum ggml_turbo_scale ggml_turbo_get_scale(void);

// Encode one row with everything explicit; search = false takes one fixed step instead of the best of several.
// k: number of values, a multiple of QK_SCALAR. type: one of the scalar turbo types.
GGML_API void ggml_turbo_quantize_row_scalar(enum ggml_type              type,
                                             enum ggml_turbo_scale       scale,
                                             bool                        search,
                                             const float * GGML_RESTRICT x,
                                             void * GGML_RESTRICT        y,
                                             int64_t                     k);

// Decay of one row, in place. k: number of values, a multiple of QK_SCALAR. type: one that decays (ggml_turbo_decays).
GGML_API void ggml_turbo_decay_row(enum ggml_type type, enum ggml_turbo_scale scale, void * y, int64_t k);

// The types' own functions, as ggml's traits have them.
#define TURBO_DECLARE(ENUM, NAME, C_NAME, FAMILY, BITS)                                                        \
    GGML_API void quantize_row_##C_NAME##_ref(const float * GGML_RESTRICT x, block_##C_NAME * GGML_RESTRICT y, \
                                              int64_t k);                                                      \
    GGML_API void dequantize_row_##C_NAME(const block_##C_NAME * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_TURBO_SCALAR_TYPES_X(TURBO_DECLARE)

#ifdef __cplusplus
}
#endif
