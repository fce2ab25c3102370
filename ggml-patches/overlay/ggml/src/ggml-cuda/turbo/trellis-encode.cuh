#pragma once

// Encoding of trellis-coded blocks on a GPU: the search of turbo/trellis.c, which stores the same bits. Format: turbo/trellis.h.
//
// Sixteen neighbouring lanes encode a block. Two lanes, one for each codebook, have the costs of all 8 states in registers, so that within
// a segment no station needs another lane; after it they keep the cheaper codebook. What the 8 pairs of lanes do:
//     open lap       pair i is at scale i and starts in all states at once: nothing closed is cheaper. So there are bounds for 40 candidates
//     closed laps    each pair has a candidate, the eight with the lowest bounds first; again while a bound is below the best error
//
// Costs are below 2^19, which leaves room in a word for how a closed lap came about: below the cost stands the codebook, and below that a bit for
// each station of the segment, whether the path came from the higher state, the newest one highest. So the smaller word is the one that the
// reference keeps, also among equal costs. These bits are all of the path: station i's says which coded bit station i - 3 had.
//
// Costs are integers, and each operation on floats is rounded by itself, also with -use_fast_math. All lanes of the wave must take part.

#include "trellis.cuh"

static constexpr int TRELLIS_LANES      = 16;                   // of a block
static constexpr int TRELLIS_SLOTS      = 8;                    // pairs of lanes
static constexpr int TRELLIS_CANDIDATES = TRELLIS_N_SCALES * TRELLIS_N_STATES;
static constexpr int TRELLIS_HOW_BITS   = TRELLIS_SEGMENT + 1;  // below a cost

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

// turbo_trellis_costs::cost in shared memory: four costs of a value in one codebook, then in the other
using turbo_shared_costs = uint2[2 * TRELLIS_X_END * 2];

// Which fourth of the levels a coded bit chooses after the three before it, the newest lowest.
static constexpr TURBO_HOST_DEVICE int turbo_subset(int state, int bit) {
    const int path = state << 1 | bit;
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1) + (path >> 2 & 1);
}

//
// values
//

// Shared memory of a block that is encoded.
struct __align__(16) turbo_trellis_scratch {
    uint16_t how[TRELLIS_N_SEGMENTS][TRELLIS_SLOTS][TRELLIS_N_STATES];  // how costs after a segment came about
    uint32_t least[8];                                                  // of each scale, what all paths cost
    uint16_t x[QK_TRELLIS][TRELLIS_N_SCALES];                           // values at each scale, from -TRELLIS_X_END on
};

// Value i of a lane, as a station. Its byte of low is the lane's own, that of coded and high the lane's 4 * (lane / 8) + lane % 4.
static TURBO_DEVICE int turbo_station_of(int lane, int i) {
    return 32 * (lane / 8) + 8 * (lane % 4) + lane / 4 % 2 + 2 * i;
}

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
    constexpr int  n          = QK_TRELLIS / n_lanes;
    const uint32_t max_finite = TURBO_FLT_MAX_BITS;
    const uint32_t infinity   = TURBO_INFINITY_BITS;

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
    const float f = __uint_as_float(min(amax, max_finite));

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

// Values as integers, and what all paths cost, at each scale
template <ggml_type type>
static TURBO_DEVICE void turbo_measure(const float value[4], int lane, int first_scale, turbo_trellis_scratch & s) {
#pragma unroll
    for (int scale = 0; scale < TRELLIS_N_SCALES; ++scale) {
        const float d       = turbo_trellis_scale(first_scale + scale);
        const float inverse = __fdiv_rn(turbo_traits<type>::x_scale, d);
        int32_t     least   = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int ix = turbo_trellis_integer(value[i], inverse);
            least += turbo_costs<type>.least[ix];
            s.x[turbo_station_of(lane, i)][scale] = (uint16_t) ix;
        }
        least = turbo_sum<TRELLIS_LANES>(least);
        if (lane == 0) {
            s.least[scale] = (uint32_t) least;
        }
    }
}

//
// laps
//

// One more station, number i of its segment. closed: costs carry how they came about. cost: of its four subsets in the lane's codebook
template <bool closed>
static TURBO_DEVICE void turbo_pass_station(const uint2 cost, int i, uint32_t state_cost[TRELLIS_N_STATES]) {
    constexpr int  shift     = closed ? TRELLIS_HOW_BITS : 0;
    const uint32_t from_high = closed ? 1u << i : 0;
    const uint32_t branch[4] = { (cost.x & 0xffff) << shift, cost.x >> 16 << shift, (cost.y & 0xffff) << shift,
                                 cost.y >> 16 << shift };
    uint32_t       after[TRELLIS_N_STATES];
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        const int low  = state >> 1;
        const int high = low | TRELLIS_N_STATES / 2;
        after[state]   = min(state_cost[low] + branch[turbo_subset(low, state & 1)],
                             state_cost[high] + (branch[turbo_subset(high, state & 1)] + from_high));
    }
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        state_cost[state] = after[state];
    }
}

// One lap of a pair of lanes, costs: from that of the lane's codebook on; from the costs of the first states to those of the last. closed: leaves in shared memory how they came about
template <bool closed>
static TURBO_DEVICE void turbo_run_lap(turbo_trellis_scratch & s,
                                       int                     lane,
                                       int                     scale,
                                       const uint2 *           costs,
                                       uint32_t                state_cost[TRELLIS_N_STATES]) {
    const uint32_t how_mask = (1u << TRELLIS_HOW_BITS) - 1;
#pragma unroll 1
    for (int segment = 0; segment < TRELLIS_N_SEGMENTS; ++segment) {
#pragma unroll
        for (int state = 0; closed && state < TRELLIS_N_STATES; ++state) {
            state_cost[state] = (state_cost[state] & ~how_mask) | (uint32_t) (lane % 2) << TRELLIS_SEGMENT;
        }
#pragma unroll
        for (int i = 0; i < TRELLIS_SEGMENT; ++i) {
            const int x = s.x[segment * TRELLIS_SEGMENT + i][scale];
            turbo_pass_station<closed>(costs[2 * x], i, state_cost);
        }
#pragma unroll
        for (int state = 0; state < TRELLIS_N_STATES; ++state) {
            state_cost[state] = min(state_cost[state], __shfl_xor_sync(0xffffffff, state_cost[state], 1, 32));
        }
        if (closed && lane % 2 == 0) {
            uint32_t pairs[TRELLIS_N_STATES / 2];
#pragma unroll
            for (int i = 0; i < TRELLIS_N_STATES / 2; ++i) {
                pairs[i] = (state_cost[2 * i] & how_mask) | (state_cost[2 * i + 1] & how_mask) << 16;
            }
            ggml_cuda_memcpy_1<sizeof(pairs)>(s.how[segment][lane / 2], pairs);
        }
    }
}

// The error of a path in binary32, as bits: their order is that of the numbers.
static TURBO_DEVICE uint32_t turbo_path_error(uint32_t cost, int code) {
    const float d = turbo_trellis_scale(code);
    return __float_as_uint(__fmul_rn((float) (int32_t) cost, __fmul_rn(d, d)));
}

// A candidate, a scale and a first state, with what its closed paths cannot fall below: an error, rounded down, whose low bits are the
// candidate's number. A lane has four of them.
static constexpr uint32_t TRELLIS_CANDIDATE_MASK = 63;
static constexpr uint32_t TRELLIS_NO_CANDIDATE   = 0xffffffff;

static TURBO_DEVICE void turbo_bound_candidates(turbo_trellis_scratch & s,
                                                int                     lane,
                                                int                     first_scale,
                                                const uint2 *           costs,
                                                uint32_t                bounds[4]) {
    const int scale                        = min(lane / 2, TRELLIS_N_SCALES - 1);
    uint32_t  state_cost[TRELLIS_N_STATES] = {};
    turbo_run_lap<false>(s, lane, scale, costs, state_cost);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t cost  = s.least[scale] + (lane % 2 == 0 ? state_cost[i] : state_cost[4 + i]);
        const uint32_t bound = turbo_path_error(cost, first_scale + scale) & ~TRELLIS_CANDIDATE_MASK;
        bounds[i]            = lane / 2 == scale ? bound | (uint32_t) (4 * lane + i) : TRELLIS_NO_CANDIDATE;
    }
}

static TURBO_DEVICE uint32_t turbo_lowest_candidate(const uint32_t bounds[4]) {
    uint32_t least = min(min(bounds[0], bounds[1]), min(bounds[2], bounds[3]));
#pragma unroll
    for (int mask = TRELLIS_LANES / 2; mask > 0; mask >>= 1) {
        least = min(least, __shfl_xor_sync(0xffffffff, least, mask, 32));
    }
    return least;
}

// Takes the eight lowest candidates out, lowest is the first of them; returns the one for this pair of lanes.
static TURBO_DEVICE uint32_t turbo_take_candidates(int lane, uint32_t lowest, uint32_t bounds[4]) {
    uint32_t own = lowest;
#pragma unroll
    for (int slot = 0; slot < TRELLIS_SLOTS; ++slot) {
        own = slot == lane / 2 ? lowest : own;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bounds[i] = bounds[i] == lowest ? TRELLIS_NO_CANDIDATE : bounds[i];
        }
        if (slot < TRELLIS_SLOTS - 1) {
            lowest = turbo_lowest_candidate(bounds);
        }
    }
    return own & TRELLIS_CANDIDATE_MASK;
}

// Closed path of a candidate: error, scale, cost, first state and pair of lanes, from the highest bits down. Of two the smaller one is
// better; among equals of the first it is the one that the reference takes.
static TURBO_DEVICE uint64_t
turbo_run_closed(turbo_trellis_scratch & s, int lane, int first_scale, int candidate, const uint2 * costs) {
    const uint32_t unreachable = 1u << 20;

    const int scale = candidate / TRELLIS_N_STATES;
    const int first = candidate % TRELLIS_N_STATES;
    uint32_t  state_cost[TRELLIS_N_STATES];
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        state_cost[state] = state == first ? 0 : unreachable << TRELLIS_HOW_BITS;
    }
    turbo_run_lap<true>(s, lane, scale, costs, state_cost);

    uint32_t cost = s.least[scale];
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        cost += state == first ? state_cost[state] >> TRELLIS_HOW_BITS : 0;
    }
    const uint64_t error = turbo_path_error(cost, first_scale + scale);
    return error << 32 | (uint32_t) scale << 29 | cost << 6 | (uint32_t) (first << 3 | lane / 2);
}

//
// encoding
//

struct turbo_coded_path {
    int      scale;
    uint32_t selectors;
    uint64_t coded;
};

static TURBO_DEVICE uint32_t turbo_reverse3(uint32_t x) {
    return (x & 1) << 2 | (x & 2) | (x >> 2 & 1);
}

// The path of a pair of lanes, from its end, which is its first state.
static TURBO_DEVICE void turbo_trace_back(const turbo_trellis_scratch & s,
                                          int                           slot,
                                          uint32_t                      state,
                                          turbo_coded_path &            path) {
#pragma unroll 1
    for (int segment = TRELLIS_N_SEGMENTS - 1; segment >= 0; --segment) {
        // coded bits of the three stations before the segment, of its first five, and a codebook
        const uint32_t how = s.how[segment][slot][state];
        path.coded         = path.coded << TRELLIS_SEGMENT | ((how >> 3 & 31) | turbo_reverse3(state) << 5);
        path.selectors     = path.selectors << 1 | how >> TRELLIS_SEGMENT;
        state              = turbo_reverse3(how & 7);
    }
    path.selectors &= 0xff;
}

// wanted: the same for all lanes of a block; one without is not searched for
static TURBO_DEVICE turbo_coded_path
turbo_search(turbo_trellis_scratch & s, int lane, int first_scale, bool wanted, const uint2 * costs) {
    uint32_t bounds[4];
    turbo_bound_candidates(s, lane, first_scale, costs, bounds);

    turbo_coded_path path = { 0, 0, 0 };
    uint64_t         best = ~(uint64_t) 0;
#pragma unroll 1
    for (int i = 0; i < TRELLIS_CANDIDATES / TRELLIS_SLOTS; ++i) {
        const uint32_t lowest = turbo_lowest_candidate(bounds);
        wanted                = wanted && (lowest & ~TRELLIS_CANDIDATE_MASK) <= (uint32_t) (best >> 32);
        // blocks of a wave go on together
        if (!__any_sync(0xffffffff, wanted)) {
            break;
        }
        const int candidate = turbo_take_candidates(lane, lowest, bounds);

        uint64_t found = turbo_run_closed(s, lane, first_scale, candidate, costs);
#pragma unroll
        for (int mask = TRELLIS_LANES / 2; mask > 1; mask >>= 1) {
            const uint32_t high  = __shfl_xor_sync(0xffffffff, (uint32_t) (found >> 32), mask, 32);
            const uint32_t low   = __shfl_xor_sync(0xffffffff, (uint32_t) found, mask, 32);
            const uint64_t other = (uint64_t) high << 32 | low;
            found                = other < found ? other : found;
        }
        turbo_syncwarp();  // what other lanes left
        if (wanted && found < best) {
            best       = found;
            path.scale = (uint32_t) found >> 29;
            turbo_trace_back(s, found & 7, found >> 3 & 7, path);
        }
        turbo_syncwarp();  // before the next lap
    }
    return path;
}

static TURBO_DEVICE uint64_t turbo_rotate64(uint64_t x, int n) {
    return x << n | x >> (64 - n);
}

// Stores a path. Lanes without a block have store = false; a block that is not ordinary has d only.
template <ggml_type type>
static TURBO_DEVICE void turbo_store_path(const turbo_trellis_scratch &        s,
                                          const turbo_coded_path &             path,
                                          int                                  lane,
                                          int                                  d,
                                          bool                                 is_ordinary,
                                          bool                                 store,
                                          typename turbo_traits<type>::block * block) {
    constexpr int bits = turbo_traits<type>::bits;

    const uint64_t z0      = turbo_rotate64(path.coded, 2);
    const uint64_t z1      = path.coded ^ turbo_rotate64(path.coded, 1) ^ turbo_rotate64(path.coded, 3);
    const int      segment = 4 * (lane / 8) + lane % 4;
    const int      book    = path.selectors >> segment & 1;

    uint32_t low  = 0;
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int      n      = turbo_station_of(lane, i);
        const int      subset = 2 * (int) (z1 >> n & 1) + (int) (z0 >> n & 1);
        const uint32_t plain  = turbo_costs<type>.plain[s.x[n][path.scale]][book] >> 4 * subset & 15;
        low |= (plain & 3) << 2 * i;
        high |= plain >> (bits - 2) << n % 8;
    }
    high |= __shfl_xor_sync(0xffffffff, high, 4, 32);

    if (!store) {
        return;
    }
    const uint32_t mask = is_ordinary ? 0xff : 0;
    if (lane == 0) {
        block->d         = (uint8_t) d;
        block->selectors = (uint8_t) (path.selectors & mask);
    }
    if (lane / 4 % 2 == 0) {
        block->coded[segment] = (uint8_t) (path.coded >> 8 * segment & mask);
    }
    if constexpr (bits >= 3) {
        block->low[lane] = (uint8_t) (low & mask);
    }
    if constexpr (bits != 3) {
        if (lane / 4 % 2 == 0) {
            block->high[segment] = (uint8_t) (high & mask);
        }
    }
}

// Puts turbo_trellis_costs::cost into shared memory; a barrier must follow.
template <ggml_type type>
static TURBO_DEVICE void turbo_load_costs(turbo_shared_costs & costs, int thread, int n_threads) {
    for (int i = thread; i < 2 * TRELLIS_X_END; i += n_threads) {
        ggml_cuda_memcpy_1<16>(costs + 2 * i, turbo_costs<type>.cost[i]);
    }
}

// x: values 32 * (lane / 8) + lane % 8 + 0, 8, 16, 24 of a block, lane = 0 .. 15. Lanes without a block take part with store = false.
template <ggml_type type>
static TURBO_DEVICE void turbo_encode_trellis(const float                          x[4],
                                              int                                  lane,
                                              bool                                 store,
                                              const turbo_shared_costs &           costs,
                                              turbo_trellis_scratch &              s,
                                              typename turbo_traits<type>::block * block) {
    float                     value[4];
    const turbo_trellis_start start       = turbo_prepare_trellis<TRELLIS_LANES>(x, turbo_traits<type>::reach, value);
    const bool                is_ordinary = !start.is_nan && !start.is_zero;
    turbo_measure<type>(value, lane, start.first_scale, s);
    turbo_syncwarp();

    const turbo_coded_path path = turbo_search(s, lane, start.first_scale, store && is_ordinary, costs + lane % 2);

    const int d = is_ordinary ? start.first_scale + path.scale : start.is_nan ? TRELLIS_SCALE_NAN : 0;
    turbo_store_path<type>(s, path, lane, d, is_ordinary, store, block);
}
