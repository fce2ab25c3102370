#pragma once

// What both encoders of trellis-coded blocks on a GPU share (trellis-encode.cuh, trellis-wide.cuh): tables of costs, values as integers, and
// the numbers that candidates are compared by, all as turbo/trellis.c has them. Format: turbo/trellis.h.
//
// Costs are integers, and each operation on floats is rounded by itself, also with -use_fast_math.

#include "trellis.cuh"

static constexpr int TRELLIS_CANDIDATES = TRELLIS_N_SCALES * TRELLIS_N_STATES;  // a scale and a first state each
static constexpr int TRELLIS_HOW_BITS   = TRELLIS_SEGMENT + 1;                  // below a cost: how it came about

static_assert(QK_TRELLIS * TRELLIS_COST_MAX < 1 << 19, "TRELLIS_COST_MAX is too large");
static_assert(QK_TRELLIS * (TRELLIS_COST_MAX + TRELLIS_DISTANCE_MAX * TRELLIS_DISTANCE_MAX) < 1 << 23,
              "errors are too large");

//
// costs
//

static_assert(2 * 127 + TRELLIS_DISTANCE_MAX < TRELLIS_X_END && TRELLIS_X_END <= TRELLIS_X_MAX + 1, "TRELLIS_X_END");

// What turbo/trellis.c measures, for every value from -TRELLIS_X_END on.
struct __align__(16) turbo_trellis_costs {
    uint16_t cost[2 * TRELLIS_X_END][2][4];  // of the nearest level of each codebook and subset
    uint16_t least[2 * TRELLIS_X_END];       // what all paths cost
    uint16_t plain[2 * TRELLIS_X_END][2];    // plain bits of the nearest levels, 4 bits for each subset
};

static constexpr int turbo_distance(int x, int level) {
    return x < level ? level - x : x - level;
}

// Of each codebook and subset the nearest level: squared distances, and plain bits as in turbo_trellis_costs.
struct turbo_trellis_nearest {
    int      squared[2 * TRELLIS_X_END][8];
    uint16_t plain[2 * TRELLIS_X_END][2];
};

template <ggml_type type> static constexpr turbo_trellis_nearest turbo_make_nearest() {
    constexpr int n = turbo_n_levels<type>;

    int levels[2 * n] = {};  // each call of level() makes an array
    for (int i = 0; i < 2 * n; ++i) {
        levels[i] = turbo_traits<type>::x_steps * turbo_traits<type>::level(i);
    }

    turbo_trellis_nearest nearest = {};
    for (int i = 0; i < 8; ++i) {
        int level = i / 4 * n + i % 4;
        for (int ix = 0; ix < 2 * TRELLIS_X_END; ++ix) {
            const int x        = ix - TRELLIS_X_END;
            // levels ascend, and of two that are equally near the lower one is taken
            int       distance = turbo_distance(x, levels[level]);
            while (level + 4 < (i / 4 + 1) * n) {
                const int next = turbo_distance(x, levels[level + 4]);
                if (next >= distance) {
                    break;
                }
                distance = next;
                level += 4;
            }
            distance               = distance < TRELLIS_DISTANCE_MAX ? distance : TRELLIS_DISTANCE_MAX;
            nearest.squared[ix][i] = distance * distance;
            nearest.plain[ix][i / 4] |= (uint16_t) (level % n / 4 << 4 * (i % 4));
        }
    }
    return nearest;
}

// In two steps, each a constant: a compiler may give up on one that takes more than a million.
template <ggml_type type> static constexpr turbo_trellis_costs turbo_make_costs() {
    constexpr turbo_trellis_nearest nearest = turbo_make_nearest<type>();

    turbo_trellis_costs table = {};
    for (int ix = 0; ix < 2 * TRELLIS_X_END; ++ix) {
        int least = nearest.squared[ix][0];
        for (int i = 1; i < 8; ++i) {
            least = nearest.squared[ix][i] < least ? nearest.squared[ix][i] : least;
        }
        for (int i = 0; i < 8; ++i) {
            const int cost               = nearest.squared[ix][i] - least;
            table.cost[ix][i / 4][i % 4] = (uint16_t) (cost < TRELLIS_COST_MAX ? cost : TRELLIS_COST_MAX);
        }
        table.least[ix]    = (uint16_t) least;
        table.plain[ix][0] = nearest.plain[ix][0];
        table.plain[ix][1] = nearest.plain[ix][1];
    }
    return table;
}

template <ggml_type type> static constexpr __device__ turbo_trellis_costs turbo_costs = turbo_make_costs<type>();

// Which fourth of the levels a coded bit chooses after the three before it, the newest lowest.
static constexpr TURBO_HOST_DEVICE int turbo_subset(int state, int bit) {
    const int path = state << 1 | bit;
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1) + (path >> 2 & 1);
}

//
// values
//

// Over so many neighbouring lanes.
template <int n_lanes> static TURBO_DEVICE int32_t turbo_sum(int32_t x) {
#pragma unroll
    for (int mask = n_lanes / 2; mask > 0; mask >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, mask, 32);
    }
    return x;
}

static TURBO_DEVICE float turbo_without_infinity(float x) {
    const uint32_t max_finite = TURBO_FLT_MAX_BITS;
    const uint32_t bits       = __float_as_uint(x);
    return __uint_as_float(min(bits & 0x7fffffff, max_finite) | (bits & 0x80000000));
}

struct turbo_trellis_start {
    int  first_scale;
    bool is_nan;
    bool is_zero;
};

// As prepare_block (turbo/trellis.c) has it, by n_lanes neighbouring lanes. x: those of the lane; value: without infinities
template <int n_lanes>
static TURBO_DEVICE turbo_trellis_start turbo_prepare_trellis(const float x[QK_TRELLIS / n_lanes],
                                                              float       reach,
                                                              float       value[QK_TRELLIS / n_lanes]) {
    constexpr int  n        = QK_TRELLIS / n_lanes;
    const uint32_t infinity = TURBO_INFINITY_BITS;

    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        amax     = max(amax, __float_as_uint(x[i]) & 0x7fffffff);
        value[i] = turbo_without_infinity(x[i]);
    }
#pragma unroll
    for (int mask = n_lanes / 2; mask > 0; mask >>= 1) {
        amax = max(amax, __shfl_xor_sync(0xffffffff, amax, mask, 32));
    }
    const float f = turbo_without_infinity(__uint_as_float(amax));

    turbo_trellis_start start;
    start.is_nan  = amax > infinity;
    start.is_zero = f < TRELLIS_AMAX_MIN;

    const float finite = start.is_zero ? 1.0f : f;
    const float to_rms = __fdiv_rn((float) TRELLIS_RMS_MAX, finite);
    int32_t     sum    = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const int32_t t = __float2int_rn(__fmul_rn(fabsf(value[i]), to_rms));
        sum += t * t;
    }
    const float mean  = __fdiv_rn((float) turbo_sum<n_lanes>(sum), (float) QK_TRELLIS);
    const float rms   = __fmul_rn(turbo_sqrt(mean), __fdiv_rn(finite, (float) TRELLIS_RMS_MAX));
    const float part  = __fdiv_rn(finite, (float) TRELLIS_AMAX_PART);
    const float low   = __fmul_rn(fmaxf(rms, part), reach);
    const int   code  = (int) (__float_as_uint(low) >> 20) - TRELLIS_CODE_BIAS;
    start.first_scale = min(max(code, TRELLIS_SCALE_MIN), TRELLIS_SCALE_MAX - TRELLIS_N_SCALES + 1);
    return start;
}

// A value as an integer, from -TRELLIS_X_END on; inverse: x_scale over a scale
static TURBO_DEVICE int turbo_trellis_integer(float value, float inverse) {
    const float within = fminf(fmaxf(__fmul_rn(value, inverse), (float) -TRELLIS_X_END), (float) (TRELLIS_X_END - 1));
    return __float2int_rn(within) + TRELLIS_X_END;
}

//
// paths
//

// The error of a path in binary32, as bits: their order is that of the numbers.
static TURBO_DEVICE uint32_t turbo_path_error(uint32_t cost, int code) {
    const float d = turbo_trellis_scale(code);
    return __float_as_uint(__fmul_rn((float) (int32_t) cost, __fmul_rn(d, d)));
}

static TURBO_DEVICE uint32_t turbo_reverse3(uint32_t x) {
    return (x & 1) << 2 | (x & 2) | (x >> 2 & 1);
}

static TURBO_DEVICE uint64_t turbo_rotate64(uint64_t x, int n) {
    return x << n | x >> (64 - n);
}
