#pragma once

// turbo2_t, turbo3_t, turbo4_t: trellis-coded types for KV caches, 2.25 / 3.25 / 4.25 bits per value
//
// The format contract. A block holds 64 values, the stations of a closed path. Station n is value
//
//     v(n) = 32 * (n / 32) + 4 * (n % 8) + n / 8 % 4
//
// and decodes to
//
//     d * codebook[selector(n / 8)][level(n)] / 64        codebook: int8 (turbo/tables.h), ascending and odd-symmetric
//
// which is exact in binary32 and, 4 x 7 bits, in fp16. Each station has a coded bit u and bits - 1 plain bits p. The coded bits of this and
// of earlier stations choose every fourth level, the plain bits one of those:
//
//     level(n) = 4 * p(n) + 2 * z1 + z0
//     z1 = u(n) ^ u(n - 1) ^ u(n - 3)        z0 = u(n - 2)        n - i modulo 64: the path is closed
//
// which is Ungerboeck's code of 8 states: with the coded bits as a little-endian 64-bit word, three rotations give all of z1 and z0. Each
// segment of 8 stations uses one of two codebooks, a fine and a coarse one.
//
//     d            one byte: the upper byte of an fp16 number without its sign bit, so 5 bits of exponent and 3 of mantissa
//     selectors    bit s: codebook of stations 8s .. 8s + 7
//     coded[8]     bit n % 8 of byte n / 8: coded bit of station n
//     low[16]      bits 2(j / 2) of byte 8h + 4(j % 2) + b: the low two plain bits of station 32h + 8b + j          turbo3_t, turbo4_t
//     high[8]      as coded: the highest plain bit                                                                   turbo2_t, turbo4_t
//
//     block_turbo2_t   18 bytes   | d | selectors | coded[8] | high[8] |
//     block_turbo3_t   26 bytes   | d | selectors | coded[8] | low[16] |
//     block_turbo4_t   34 bytes   | d | selectors | coded[8] | low[16] | high[8] |
//
// Four at a time: byte b of a little-endian word of coded or high, shifted right by j, has the bit of value 4j + b of its half in its lowest
// place; for low it is word 2h + j % 2 shifted by 2(j / 2), and two bits. A segment is byte b of a half. A block of zero bytes decodes to zeros.
//
// What the encoder promises (turbo/trellis.c is the reference; SIMD and GPU encoders store the same bits):
//     magnitudes below 2^-18                         a block of zero bytes
//     a NaN anywhere in the block                    d is NaN, other bytes are 0: all 64 values decode to NaN, ggml_validate_row_data says no
//     infinity                                       encoded like +-FLT_MAX
//     finite input                                   finite output
//     otherwise                                      of all closed paths, selectors and TRELLIS_N_SCALES scales near the block's rms the one
//                                                    with the smallest squared error, as turbo/trellis.c measures it

#include "turbo/scalar.h"

typedef struct {
    uint8_t d;                     // scale
    uint8_t selectors;             // of a codebook per segment
    uint8_t coded[QK_TRELLIS / 8];
    uint8_t high[QK_TRELLIS / 8];  // plain bit
} block_turbo2_t;

typedef struct {
    uint8_t d;                    // scale
    uint8_t selectors;            // of a codebook per segment
    uint8_t coded[QK_TRELLIS / 8];
    uint8_t low[QK_TRELLIS / 4];  // plain bits
} block_turbo3_t;

typedef struct {
    uint8_t d;                     // scale
    uint8_t selectors;             // of a codebook per segment
    uint8_t coded[QK_TRELLIS / 8];
    uint8_t low[QK_TRELLIS / 4];   // low two plain bits
    uint8_t high[QK_TRELLIS / 8];  // high plain bit
} block_turbo4_t;

GGML_TURBO_TRELLIS_TYPES_X(TURBO_CHECK_BLOCK)

// Level index modulo 4. coded: the coded bits of a station and of the three before it, the newest lowest
#define TRELLIS_SUBSET(coded) (2 * (((coded) ^ (coded) >> 1 ^ (coded) >> 3) & 1) + ((coded) >> 2 & 1))

#ifdef __cplusplus
extern "C" {
#endif

// Encode one row. k: number of values, a multiple of QK_TRELLIS. type: one of the trellis types.
GGML_API void ggml_turbo_quantize_row_trellis(enum ggml_type              type,
                                              const float * GGML_RESTRICT x,
                                              void * GGML_RESTRICT        y,
                                              int64_t                     k);

GGML_TURBO_TRELLIS_TYPES_X(TURBO_DECLARE)

#ifdef __cplusplus
}
#endif
