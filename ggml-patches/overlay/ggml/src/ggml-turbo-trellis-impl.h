#pragma once

// What the reference encoder of the trellis types (ggml-turbo-trellis.c) and the SIMD encoder share: all but the search.
//
// The arithmetic is that of integers, but for single operations in binary32 whose results any compiler rounds alike.

#include "ggml-impl.h"
#include "ggml-turbo-trellis.h"

#include <math.h>
#include <string.h>


typedef struct {
    int    bits;  // per value
    float  reach;
    int    x_steps;
    float  x_scale;
    int8_t codebooks[2][TRELLIS_MAX_LEVELS];
} turbo_trellis;

// The words of a block, bit by bit as ggml-turbo-trellis.h draws them, the first byte lowest.
typedef struct {
    uint8_t  selectors;
    uint64_t coded;
    uint64_t low[2];
    uint64_t high;
} turbo_path;

enum turbo_block_kind { TURBO_BLOCK_ZERO, TURBO_BLOCK_NAN, TURBO_BLOCK_ORDINARY };

static inline int turbo_levels(const turbo_trellis * t) {
    return 2 << t->bits;
}

static inline int turbo_value_at(int station) {
    return 32 * (station / 32) + 4 * (station % 8) + station / 8 % 4;
}

// Which fourth of the levels a coded bit chooses after the three before it, the newest lowest.
static inline int turbo_subset(int state, int bit) {
    const int path = state << 1 | bit;
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1) + (path >> 2 & 1);
}

static inline float turbo_scale_of(uint8_t code) {
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

#define TURBO_MAX_FINITE 0x7f7fffffu  // bits of FLT_MAX

// max: bits of the largest magnitude
static inline enum turbo_block_kind turbo_kind_of_block(uint32_t max) {
    const uint32_t infinity = 0x7f800000;
    return max > infinity                         ? TURBO_BLOCK_NAN :
           turbo_float_of(max) < TRELLIS_AMAX_MIN ? TURBO_BLOCK_ZERO :
                                                    TURBO_BLOCK_ORDINARY;
}

// The smallest scale to try. amax: largest magnitude, finite; sum: of the squares of all values * TRELLIS_RMS_MAX / amax, which are rounded
static inline int turbo_first_scale(const turbo_trellis * t, float amax, int32_t sum) {
    const float rms  = sqrtf((float) sum / (float) QK_TRELLIS) * (amax / (float) TRELLIS_RMS_MAX);
    const float part = amax / (float) TRELLIS_AMAX_PART;
    const float low  = (rms > part ? rms : part) * t->reach;
    const int   code = (int) (turbo_bits_of(low) >> 20) - (112 << 3);  // to the upper bits of fp16, towards zero
    const int   last = TRELLIS_SCALE_MAX - TRELLIS_N_SCALES + 1;
    return code < TRELLIS_SCALE_MIN ? TRELLIS_SCALE_MIN : code > last ? last : code;
}

// The bytes of a segment: of coded, low (two) and high
typedef struct {
    unsigned coded, even, odd, high;
} turbo_segment;

// Station j of a segment. plain: bits of the level but the two of the subset
static inline void turbo_add_station(turbo_segment * segment, int bits, int j, int bit, int plain) {
    segment->coded |= (unsigned) bit << j;
    if (bits >= 3) {
        *(j % 2 == 0 ? &segment->even : &segment->odd) |= (unsigned) (plain & 3) << 2 * (j / 2);
    }
    if (bits != 3) {
        segment->high |= (unsigned) (plain >> (bits - 2)) << j;
    }
}

static inline void turbo_add_segment(turbo_path * path, int number, int selector, const turbo_segment * segment) {
    path->selectors |= (uint8_t) (selector << number);
    path->coded |= (uint64_t) segment->coded << 8 * number;
    path->low[number / 4] |= (uint64_t) segment->even << 8 * (number % 4);
    path->low[number / 4] |= (uint64_t) segment->odd << (32 + 8 * (number % 4));
    path->high |= (uint64_t) segment->high << 8 * number;
}

static inline uint8_t * turbo_store_word(uint8_t * p, uint64_t word) {
    for (int i = 0; i < 8; ++i) {
        p[i] = (uint8_t) (word >> 8 * i);
    }
    return p + 8;
}

static inline const uint8_t * turbo_load_word(const uint8_t * p, uint64_t * word) {
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

static inline void turbo_pack_block(int bits, int scale, const turbo_path * path, void * block) {
    uint8_t * p = (uint8_t *) block;
    p[0]        = (uint8_t) scale;
    p[1]        = path->selectors;
    p           = turbo_store_word(p + 2, path->coded);
    if (bits >= 3) {
        p = turbo_store_word(p, path->low[0]);
        p = turbo_store_word(p, path->low[1]);
    }
    if (bits != 3) {
        turbo_store_word(p, path->high);
    }
}

static inline turbo_path turbo_unpack_block(int bits, const void * block) {
    const uint8_t * p    = (const uint8_t *) block;
    turbo_path      path = {
        p[1], 0, { 0, 0 },
          0
    };
    p = turbo_load_word(p + 2, &path.coded);
    if (bits >= 3) {
        p = turbo_load_word(p, &path.low[0]);
        p = turbo_load_word(p, &path.low[1]);
    }
    if (bits != 3) {
        turbo_load_word(p, &path.high);
    }
    return path;
}

static inline uint64_t turbo_rotate(uint64_t x, int n) {
    return x << n | x >> (64 - n);
}

// The two bits of turbo_subset, for all stations
static inline uint64_t turbo_high_subset_bits(uint64_t coded) {
    return coded ^ turbo_rotate(coded, 1) ^ turbo_rotate(coded, 3);
}

static inline uint64_t turbo_low_subset_bits(uint64_t coded) {
    return turbo_rotate(coded, 2);
}

// Four bits to the lowest bits of four bytes
static inline uint32_t turbo_spread(int selectors) {
    return ((uint32_t) selectors & 15) * 0x00204081 & 0x01010101;
}

// Levels of a block, in the order of the values, four at a time.
static inline void turbo_unpack_levels(const turbo_trellis * t, const void * block, int8_t * levels) {
    const uint32_t   ones = 0x01010101;
    const turbo_path path = turbo_unpack_block(t->bits, block);
    const uint64_t   z1   = turbo_high_subset_bits(path.coded);
    const uint64_t   z0   = turbo_low_subset_bits(path.coded);
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
