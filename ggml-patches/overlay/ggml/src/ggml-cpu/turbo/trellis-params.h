#pragma once

// The parameters of the trellis types as constants, by bits, and tables made of them.

#include "turbo/trellis-impl.h"

#include <cstdint>

namespace {

template <int BITS> constexpr trellis_params TRELLIS = {};

#define TURBO_PARAMS(ENUM, NAME, C_NAME, FAMILY, BITS) \
    template <> constexpr trellis_params TRELLIS<BITS> = TRELLIS_PARAMS(ENUM, BITS);
GGML_TURBO_TRELLIS_TYPES_X(TURBO_PARAMS)
#undef TURBO_PARAMS

// What the values 32 * HALF .. 32 * HALF + 31 of a block of a trellis type are unpacked from: the block
template <int BITS, int HALF> struct trellis_half {
    uint8_t bytes[2 + QK_TRELLIS * BITS / 8];
};

// Levels of both codebooks, by selector << (BITS + 1) | level, over and over
struct level_table {
    int8_t x[64];
};

template <int BITS> constexpr level_table make_level_table(int bias) {
    level_table table = {};
    for (int i = 0; i < 64; ++i) {
        const int n = 2 << BITS;
        table.x[i]  = (int8_t) (TRELLIS<BITS>.codebooks[i / n % 2][i % n] + bias);
    }
    return table;
}

template <int BITS, int BIAS> constexpr level_table TRELLIS_LEVELS = make_level_table<BITS>(BIAS);

}  // namespace
