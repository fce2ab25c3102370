#pragma once

// Laps of the search for the best path of a trellis-coded block, each by one lane: what trellis-encode.cuh has in shared memory, and costs of
// all 8 states in both codebooks, in pairs of 16 bits. No station needs another lane.

#include "trellis-costs.cuh"
#include "trellis-pairs.cuh"

static constexpr int TRELLIS_LANES   = 8;                                    // of a block
static constexpr int TRELLIS_BLOCKS  = 16;                                   // of a block of threads
static constexpr int TRELLIS_THREADS = TRELLIS_BLOCKS * TRELLIS_LANES;
static constexpr int TRELLIS_TRACED  = 2;                                    // segments of a lane
static constexpr int TRELLIS_PARTS   = TRELLIS_N_SEGMENTS / TRELLIS_TRACED;  // of a lap that is traced

static_assert(TRELLIS_LANES == TRELLIS_N_SEGMENTS && TRELLIS_LANES == 2 * TRELLIS_PARTS, "lanes of a trace");
static_assert(TRELLIS_N_STATES == TRELLIS_LANES, "candidates of a lane");

// Of states that cannot be reached. After three stations there are none.
static constexpr uint32_t TRELLIS_UNREACHABLE = 3 * TRELLIS_COST_MAX + 1;

static_assert((3 + TRELLIS_SEGMENT) * TRELLIS_COST_MAX < 1 << 16 &&
                  TRELLIS_UNREACHABLE + 3 * TRELLIS_COST_MAX < 1 << 16,
              "TRELLIS_COST_MAX is too large for pairs");

// turbo_trellis_costs::cost in shared memory: four costs of a value in one codebook, then in the other
using turbo_shared_costs = uint16_t[2 * TRELLIS_X_END][2][4];

// Shared memory of all blocks.
struct __align__(16) turbo_trellis_scratch {
    // where costs of a value are in turbo_shared_costs, in bytes, by station of its segment and segment
    uint16_t place[TRELLIS_SEGMENT][TRELLIS_N_SEGMENTS][TRELLIS_BLOCKS][TRELLIS_N_SCALES];

    // of a block of values
    union {
        // what paths to a state cost at a scale, wherever they start, less what all paths cost
        uint32_t open[TRELLIS_N_SCALES][TRELLIS_N_STATES];
        // of each lane's closed lap, costs before every part but the first, less the smallest
        uint16_t before[TRELLIS_LANES][TRELLIS_PARTS - 1][TRELLIS_N_STATES];
        // how costs after a segment came about in the trace
        uint16_t how[TRELLIS_N_SEGMENTS][TRELLIS_N_STATES];
    } laps[TRELLIS_BLOCKS];
};

static_assert(sizeof(turbo_trellis_scratch) + sizeof(turbo_shared_costs) <= 32 * 1024,
              "two blocks of threads for CDNA");

// A lane, and what it uses of shared memory.
struct turbo_trellis_lane {
    const turbo_shared_costs & costs;
    turbo_trellis_scratch &    s;
    int                        block;  // of the block of threads
    int                        lane;   // of the block

    TURBO_DEVICE turbo_trellis_lane(const turbo_shared_costs & costs, turbo_trellis_scratch & s, int thread) :
        costs(costs),
        s(s),
        block(thread / TRELLIS_LANES),
        lane(thread % TRELLIS_LANES) {}

    // Which of the eight values of a lane is which: value lane + 8 * i
    TURBO_DEVICE int segment(int i) const { return 4 * (i / 4) + lane % 4; }

    TURBO_DEVICE int station(int i) const { return 2 * (i % 4) + lane / 4; }

    // Costs of a value, in bytes from costs on.
    TURBO_DEVICE const char * at(int place) const { return (const char *) costs + place; }
};

//
// values
//

// Values at each scale; returns what all paths cost at the scale of the lane's number.
template <ggml_type type>
static TURBO_DEVICE uint32_t turbo_measure(const turbo_trellis_lane & l, const float value[8], int first_scale) {
    uint32_t own = 0;
#pragma unroll
    for (int scale = 0; scale < TRELLIS_N_SCALES; ++scale) {
        const float d       = turbo_trellis_scale(first_scale + scale);
        const float inverse = __fdiv_rn(turbo_traits<type>::x_scale, d);
        int32_t     least   = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int ix = turbo_trellis_integer(value[i], inverse);
            least += turbo_costs<type>.least[ix];
            l.s.place[l.station(i)][l.segment(i)][l.block][scale] = (uint16_t) (ix * sizeof(l.costs[0]));
        }
        least = turbo_sum<TRELLIS_LANES>(least);
        own   = scale == l.lane ? (uint32_t) least : own;
    }
    return own;
}

//
// laps
//

// States in pairs (0, 1), (2, 3), (4, 5), (6, 7) become (0, 2), (1, 3), (4, 6), (5, 7) behind a station. low, high: costs of its subsets 0 and
// 1, 2 and 3
static TURBO_DEVICE void turbo_pass_even_station(turbo_pair low, turbo_pair high, turbo_pair state[4]) {
    const turbo_pair c02 = turbo_low_halves(low, high);
    const turbo_pair c20 = turbo_swap_halves(c02);
    const turbo_pair c13 = turbo_high_halves(low, high);
    const turbo_pair c31 = turbo_swap_halves(c13);
    const turbo_pair s02 = turbo_minima_of_sums(state[0], c02, state[2], c20);
    const turbo_pair s13 = turbo_minima_of_sums(state[0], c20, state[2], c02);
    const turbo_pair s46 = turbo_minima_of_sums(state[1], c13, state[3], c31);
    const turbo_pair s57 = turbo_minima_of_sums(state[1], c31, state[3], c13);
    state[0]             = s02;
    state[1]             = s13;
    state[2]             = s46;
    state[3]             = s57;
}

// The other way round.
static TURBO_DEVICE void turbo_pass_odd_station(turbo_pair low, turbo_pair high, turbo_pair state[4]) {
    const turbo_pair s04 = turbo_minima_of_sums(state[0], low, state[2], high);
    const turbo_pair s15 = turbo_minima_of_sums(state[0], high, state[2], low);
    const turbo_pair s26 = turbo_minima_of_sums(state[1], high, state[3], low);
    const turbo_pair s37 = turbo_minima_of_sums(state[1], low, state[3], high);
    state[0]             = turbo_low_halves(s04, s15);
    state[1]             = turbo_low_halves(s26, s37);
    state[2]             = turbo_high_halves(s04, s15);
    state[3]             = turbo_high_halves(s26, s37);
}

// Takes the smallest cost off all; returns it.
static TURBO_DEVICE uint32_t turbo_take_least(turbo_pair state[4]) {
    const turbo_pair four  = turbo_minima(turbo_minima(state[0], state[1]), turbo_minima(state[2], state[3]));
    const turbo_pair least = turbo_minima(four, turbo_swap_halves(four));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        state[i] = turbo_differences(state[i], least);
    }
    return turbo_pair_bits(least) & 0xffff;
}

// One lap of a lane, from costs of the first states to those of the last; returns what these have been lowered by. keep: leaves costs in shared
// memory
template <bool keep>
static TURBO_DEVICE uint32_t turbo_run_lap(const turbo_trellis_lane & l, int scale, turbo_pair state[4]) {
    uint32_t lowered = 0;
#pragma unroll 1
    for (int segment = 0; segment < TRELLIS_N_SEGMENTS; ++segment) {
        if (keep && segment > 0 && segment % TRELLIS_TRACED == 0) {
            uint32_t costs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                costs[i] = turbo_pair_bits(state[i]);
            }
            ggml_cuda_memcpy_1<sizeof(costs)>(l.s.laps[l.block].before[l.lane][segment / TRELLIS_TRACED - 1], costs);
        }
        turbo_pair coarse[4] = { state[0], state[1], state[2], state[3] };
#pragma unroll
        for (int i = 0; i < TRELLIS_SEGMENT; ++i) {
            uint32_t cost[4];
            ggml_cuda_memcpy_1<sizeof(cost)>(cost, l.at(l.s.place[i][segment][l.block][scale]));
            if (i % 2 == 0) {
                turbo_pass_even_station(turbo_make_pair(cost[0]), turbo_make_pair(cost[1]), state);
                turbo_pass_even_station(turbo_make_pair(cost[2]), turbo_make_pair(cost[3]), coarse);
            } else {
                turbo_pass_odd_station(turbo_make_pair(cost[0]), turbo_make_pair(cost[1]), state);
                turbo_pass_odd_station(turbo_make_pair(cost[2]), turbo_make_pair(cost[3]), coarse);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            state[i] = turbo_minima(state[i], coarse[i]);
        }
        lowered += turbo_take_least(state);
    }
    return lowered;
}

// Cost of a state, 0 .. 7, which is no constant.
static TURBO_DEVICE uint32_t turbo_cost_of(const turbo_pair state[4], int number) {
    const uint32_t low  = number & 2 ? turbo_pair_bits(state[1]) : turbo_pair_bits(state[0]);
    const uint32_t high = number & 2 ? turbo_pair_bits(state[3]) : turbo_pair_bits(state[2]);
    return (number & 4 ? high : low) >> 16 * (number & 1) & 0xffff;
}
