// What an encoder of trellis types measures: values as integers at a scale, costs of the nearest levels. Contract: turbo/trellis.h,
// reference: turbo/trellis.c.

#include "turbo-arithmetic.glsl"

const uint TURBO_N_LEVELS = OF_TYPE(_LEVELS) / 2;  // of a codebook

const int turbo_levels[] = { OF_TYPE(_FINE), OF_TYPE(_COARSE) };

float turbo_scale_of(uint code) {
    return uintBitsToFloat(turbo_half_to_float(code << 7));
}

// A value without infinity, as an integer at a scale; inverse: turbo_inverse of it
float turbo_inverse(uint code) {
    return turbo_divide(OF_TYPE(_X_SCALE), turbo_scale_of(code));
}

int turbo_integer(float value, float inverse) {
    precise float scaled = value * inverse;
    return int(roundEven(clamp(scaled, -float(TRELLIS_X_MAX), float(TRELLIS_X_MAX))));
}

// Squared distance of the nearest level of a codebook and subset
int turbo_squared_distance(int x, uint book, uint subset) {
    int least = TRELLIS_DISTANCE_MAX;
    [[unroll]] for (uint level = 0; level < TURBO_N_LEVELS; level += 4) {
        least = min(least, abs(x - OF_TYPE(_X_STEPS) * turbo_levels[book * TURBO_N_LEVELS + level + subset]));
    }
    return least * least;
}

// The number of that level, over four; the first of equals
uint turbo_plain_bits(int x, uint book, uint subset) {
    uint best  = 0;
    int  least = 1 << 30;
    for (uint level = 0; level < TURBO_N_LEVELS; level += 4) {
        const int distance = abs(x - OF_TYPE(_X_STEPS) * turbo_levels[book * TURBO_N_LEVELS + level + subset]);
        if (distance < least) {
            least = distance;
            best  = level / 4;
        }
    }
    return best;
}

// Of the eight nearest levels: what is not the least of their costs, 16 bits for each, four subsets of the fine codebook first.
uvec4 turbo_costs(int x, out uint least) {
    int cost[8];
    int lowest = TRELLIS_DISTANCE_MAX * TRELLIS_DISTANCE_MAX;
    [[unroll]] for (uint i = 0; i < 8; ++i) {
        cost[i] = turbo_squared_distance(x, i / 4, i % 4);
        lowest  = min(lowest, cost[i]);
    }
    uvec4 packed;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        packed[i] = uint(min(cost[2 * i] - lowest, TRELLIS_COST_MAX)) |
                    uint(min(cost[2 * i + 1] - lowest, TRELLIS_COST_MAX)) << 16;
    }
    least = uint(lowest);
    return packed;
}

// Which fourth of the levels a coded bit chooses after the three before it, the newest lowest
uint turbo_subset(uint state, uint bit) {
    const uint path = state << 1 | bit;
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1u) + (path >> 2 & 1u);
}

// The error of a path in binary32, as bits: their order is that of the numbers
uint turbo_path_error(uint cost, uint code) {
    const float   d       = turbo_scale_of(code);
    precise float squared = d * d;
    precise float error   = float(cost) * squared;
    return floatBitsToUint(error);
}
