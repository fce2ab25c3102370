#pragma once

// What the reference encoder of the trellis types (turbo/trellis.c) and the SIMD encoder share: all but the search.
//
// The arithmetic is that of integers, but for single operations in binary32 whose results any compiler rounds alike.

#include "ggml-impl.h"
#include "turbo/trellis.h"

#include <math.h>
#include <string.h>

typedef struct {
    int    bits;  // per value
    float  reach;
    int    x_steps;
    float  x_scale;
    int8_t codebooks[2][TRELLIS_MAX_LEVELS];
} trellis_params;

// Initialiser of the parameters of a type
#define TRELLIS_PARAMS(ENUM, BITS)                            \
    {                                                         \
        BITS, ENUM##_REACH, ENUM##_X_STEPS, ENUM##_X_SCALE, { \
            { ENUM##_FINE }, {                                \
                ENUM##_COARSE                                 \
            }                                                 \
        }                                                     \
    }

// The words of a block, bit by bit as turbo/trellis.h draws them, the first byte lowest.
typedef struct {
    uint8_t  selectors;
    uint64_t coded;
    uint64_t low[2];
    uint64_t high;
} trellis_path;

enum trellis_block_kind { TRELLIS_BLOCK_ZERO, TRELLIS_BLOCK_NAN, TRELLIS_BLOCK_ORDINARY };

static inline int trellis_levels(const trellis_params * t) {
    return 2 << t->bits;
}

static inline size_t trellis_block_bytes(const trellis_params * t) {
    return (size_t) (2 + QK_TRELLIS * t->bits / 8);
}

static inline int trellis_value_at(int station) {
    return 32 * (station / 32) + 4 * (station % 8) + station / 8 % 4;
}

// Which fourth of the levels a coded bit chooses after the three before it, the newest lowest.
static inline int trellis_subset(int state, int bit) {
    return TRELLIS_SUBSET(state << 1 | bit);
}

static inline float trellis_scale_of(uint8_t code) {
    return GGML_FP16_TO_FP32((ggml_fp16_t) (code << 7));
}

static inline float turbo_float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t turbo_bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// max: bits of the largest magnitude
static inline enum trellis_block_kind trellis_kind_of_block(uint32_t max) {
    return max > TURBO_INFINITY_BITS              ? TRELLIS_BLOCK_NAN :
           turbo_float_of(max) < TRELLIS_AMAX_MIN ? TRELLIS_BLOCK_ZERO :
                                                    TRELLIS_BLOCK_ORDINARY;
}

// The smallest scale to try. amax: largest magnitude, finite; sum: of the squares of all values * TRELLIS_RMS_MAX / amax, which are rounded
static inline int trellis_first_scale(const trellis_params * t, float amax, int32_t sum) {
    const float rms  = sqrtf((float) sum / (float) QK_TRELLIS) * (amax / (float) TRELLIS_RMS_MAX);
    const float part = amax / (float) TRELLIS_AMAX_PART;
    const float low  = (rms > part ? rms : part) * t->reach;
    const int   code = (int) (turbo_bits_of(low) >> 20) - TRELLIS_CODE_BIAS;  // to the upper bits of fp16, towards zero
    const int   last = TRELLIS_SCALE_MAX - TRELLIS_N_SCALES + 1;
    return code < TRELLIS_SCALE_MIN ? TRELLIS_SCALE_MIN : code > last ? last : code;
}

// The bytes of a segment: of coded, low (two) and high
typedef struct {
    unsigned coded, even, odd, high;
} trellis_segment;

// Station j of a segment. plain: bits of the level but the two of the subset
static inline void trellis_add_station(trellis_segment * segment, int bits, int j, int bit, int plain) {
    segment->coded |= (unsigned) bit << j;
    if (bits >= 3) {
        *(j % 2 == 0 ? &segment->even : &segment->odd) |= (unsigned) (plain & 3) << 2 * (j / 2);
    }
    if (bits != 3) {
        segment->high |= (unsigned) (plain >> (bits - 2)) << j;
    }
}

static inline void trellis_add_segment(trellis_path * path, int number, int selector, const trellis_segment * segment) {
    path->selectors |= (uint8_t) (selector << number);
    path->coded |= (uint64_t) segment->coded << 8 * number;
    path->low[number / 4] |= (uint64_t) segment->even << 8 * (number % 4);
    path->low[number / 4] |= (uint64_t) segment->odd << (32 + 8 * (number % 4));
    path->high |= (uint64_t) segment->high << 8 * number;
}

static inline uint8_t * trellis_store_word(uint8_t * p, uint64_t word) {
    for (int i = 0; i < 8; ++i) {
        p[i] = (uint8_t) (word >> 8 * i);
    }
    return p + 8;
}

static inline const uint8_t * trellis_load_word(const uint8_t * p, uint64_t * word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    *word = 0;
    for (int i = 0; i < 8; ++i) {
        *word |= (uint64_t) p[i] << 8 * i;
    }
#else
    memcpy(word, p, sizeof(*word));
#endif
    return p + 8;
}

static inline void trellis_pack_block(int bits, int scale, const trellis_path * path, void * block) {
    uint8_t * p = (uint8_t *) block;
    p[0]        = (uint8_t) scale;
    p[1]        = path->selectors;
    p           = trellis_store_word(p + 2, path->coded);
    if (bits >= 3) {
        p = trellis_store_word(p, path->low[0]);
        p = trellis_store_word(p, path->low[1]);
    }
    if (bits != 3) {
        trellis_store_word(p, path->high);
    }
}

static inline trellis_path trellis_unpack_block(int bits, const void * block) {
    const uint8_t * p    = (const uint8_t *) block;
    trellis_path    path = {
        p[1], 0, { 0, 0 },
          0
    };
    p = trellis_load_word(p + 2, &path.coded);
    if (bits >= 3) {
        p = trellis_load_word(p, &path.low[0]);
        p = trellis_load_word(p, &path.low[1]);
    }
    if (bits != 3) {
        trellis_load_word(p, &path.high);
    }
    return path;
}

static inline uint64_t trellis_rotate(uint64_t x, int n) {
    return x << n | x >> (64 - n);
}

// The two bits of trellis_subset, for all stations
static inline uint64_t trellis_high_subset_bits(uint64_t coded) {
    return coded ^ trellis_rotate(coded, 1) ^ trellis_rotate(coded, 3);
}

static inline uint64_t trellis_low_subset_bits(uint64_t coded) {
    return trellis_rotate(coded, 2);
}

// Four bits to the lowest bits of four bytes
static inline uint32_t trellis_spread(int selectors) {
    return ((uint32_t) selectors & 15) * 0x00204081 & 0x01010101;
}

// Levels of a block, in the order of the values, four at a time.
static inline void trellis_unpack_levels(const trellis_params * t, const void * block, int8_t * levels) {
    const uint32_t     ones = 0x01010101;
    const trellis_path path = trellis_unpack_block(t->bits, block);
    const uint64_t     z1   = trellis_high_subset_bits(path.coded);
    const uint64_t     z0   = trellis_low_subset_bits(path.coded);
    for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < 8; ++j) {
            const int      by   = 32 * half + j;
            const uint32_t low  = (uint32_t) (path.low[half] >> (32 * (j % 2) + 2 * (j / 2))) & 0x03030303;
            const uint32_t high = (uint32_t) (path.high >> by) & ones;
            const uint32_t four = ((uint32_t) (z1 >> by) & ones) << 1 | ((uint32_t) (z0 >> by) & ones) | low << 2 |
                                  high << (t->bits == 2 ? 2 : 4);
            for (int b = 0; b < 4; ++b) {
                levels[32 * half + 4 * j + b] =
                    t->codebooks[path.selectors >> (4 * half + b) & 1][four >> 8 * b & 0xff];
            }
        }
    }
}
