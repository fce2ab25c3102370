#pragma once

// Encoding of trellis-coded blocks when there are many of them, as in a prefill: the search of turbo/trellis.c, which stores the same bits. For few
// blocks there is trellis-wide.cuh.
//
// Eight neighbouring lanes encode a block. What they do:
//     open laps      one at each scale, by any lane, that starts in all states at once: nothing closed is cheaper. So there are bounds for 40
//                    candidates
//     closed laps    each lane has a candidate, the eight with the lowest bounds first; again while a bound is below the best error
//     trace          of the best candidate: two lanes, one for each codebook, for two segments, from the costs that its closed lap had there
//
// Only the trace keeps how costs came about. Below a cost stands the codebook, and below that a bit for each station of the segment, whether
// the path came from the higher state, the newest one highest. So the smaller word is the one that the reference keeps, also among equal
// costs. These bits are all of the path: station i's says which coded bit station i - 3 had. All lanes of the wave must take part.

#include "trellis-laps.cuh"

//
// candidates
//

// A scale and a first state, with what its closed paths cannot fall below: an error, rounded down, whose low bits are the candidate's number.
// A lane has those of one state.
static constexpr uint32_t TRELLIS_CANDIDATE_MASK = 63;
static constexpr uint32_t TRELLIS_NO_CANDIDATE   = 0xffffffff;

// All open laps of a block of threads, by as few warps as there have to be. Which ones differs from block to block, so that schedulers share
// the work.
static TURBO_DEVICE void turbo_run_open(const turbo_shared_costs & costs, turbo_trellis_scratch & s, int thread) {
    const int job = (int) (thread + 32 * blockIdx.x) % TRELLIS_THREADS;
    if (job >= TRELLIS_BLOCKS * TRELLIS_N_SCALES) {
        return;
    }
    const turbo_trellis_lane l(costs, s, job / TRELLIS_N_SCALES * TRELLIS_LANES);
    const int                scale = job % TRELLIS_N_SCALES;

    turbo_pair     state[4] = {};
    const uint32_t lowered  = turbo_run_lap<false>(l, scale, state);
    uint32_t       open[TRELLIS_N_STATES];
#pragma unroll
    for (int i = 0; i < TRELLIS_N_STATES; ++i) {
        open[i] = lowered + (turbo_pair_bits(state[i / 2]) >> 16 * (i % 2) & 0xffff);
    }
    ggml_cuda_memcpy_1<16>(s.laps[l.block].open[scale], open);
    ggml_cuda_memcpy_1<16>(s.laps[l.block].open[scale] + 4, open + 4);
}

// least: what all paths cost at the scale of the lane's number
static TURBO_DEVICE void turbo_bound_candidates(const turbo_trellis_lane & l,
                                                int                        first_scale,
                                                uint32_t                   least,
                                                uint32_t                   bounds[TRELLIS_N_SCALES]) {
#pragma unroll
    for (int scale = 0; scale < TRELLIS_N_SCALES; ++scale) {
        const uint32_t cost =
            l.s.laps[l.block].open[scale][l.lane] + __shfl_sync(0xffffffff, least, scale, TRELLIS_LANES);
        const uint32_t bound = turbo_path_error(cost, first_scale + scale) & ~TRELLIS_CANDIDATE_MASK;
        bounds[scale]        = bound | (uint32_t) (TRELLIS_N_STATES * scale + l.lane);
    }
    turbo_syncwarp();  // closed laps leave costs there
}

static TURBO_DEVICE uint32_t turbo_lowest_candidate(const uint32_t bounds[TRELLIS_N_SCALES]) {
    uint32_t least = bounds[0];
#pragma unroll
    for (int i = 1; i < TRELLIS_N_SCALES; ++i) {
        least = min(least, bounds[i]);
    }
#pragma unroll
    for (int mask = TRELLIS_LANES / 2; mask > 0; mask >>= 1) {
        least = min(least, __shfl_xor_sync(0xffffffff, least, mask, 32));
    }
    return least;
}

// Takes the eight lowest candidates out, lowest is the first of them; returns the one for this lane.
static TURBO_DEVICE uint32_t turbo_take_candidates(int lane, uint32_t lowest, uint32_t bounds[TRELLIS_N_SCALES]) {
    uint32_t own = lowest;
#pragma unroll
    for (int slot = 0; slot < TRELLIS_LANES; ++slot) {
        own = slot == lane ? lowest : own;
#pragma unroll
        for (int i = 0; i < TRELLIS_N_SCALES; ++i) {
            bounds[i] = bounds[i] == lowest ? TRELLIS_NO_CANDIDATE : bounds[i];
        }
        if (slot < TRELLIS_LANES - 1) {
            lowest = turbo_lowest_candidate(bounds);
        }
    }
    return own & TRELLIS_CANDIDATE_MASK;
}

// Closed path of a candidate: error, scale, cost, first state and lane, from the highest bits down. Of two the smaller one is better; among
// equals of the first it is the one that the reference takes.
static TURBO_DEVICE uint64_t turbo_run_closed(const turbo_trellis_lane & l,
                                              int                        first_scale,
                                              uint32_t                   least,
                                              int                        candidate) {
    const int  scale = candidate / TRELLIS_N_STATES;
    const int  first = candidate % TRELLIS_N_STATES;
    turbo_pair state[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low  = 2 * i == first ? 0 : TRELLIS_UNREACHABLE;
        const uint32_t high = 2 * i + 1 == first ? 0 : TRELLIS_UNREACHABLE;
        state[i]            = turbo_make_pair(low | high << 16);
    }
    uint32_t cost = __shfl_sync(0xffffffff, least, scale, TRELLIS_LANES);
    cost += turbo_run_lap<true>(l, scale, state);
    cost += turbo_cost_of(state, first);

    const uint64_t error = turbo_path_error(cost, first_scale + scale);
    return error << 32 | (uint32_t) scale << 29 | cost << 6 | (uint32_t) (first << 3 | l.lane);
}

//
// trace
//

struct turbo_coded_path {
    int      scale;
    uint32_t selectors;
    uint64_t coded;
};

// One more station, number i of its segment. cost: of its four subsets in the lane's codebook
static TURBO_DEVICE void turbo_trace_station(const uint16_t cost[4], int i, uint32_t state_cost[TRELLIS_N_STATES]) {
    uint32_t branch[4];
    uint32_t after[TRELLIS_N_STATES];
#pragma unroll
    for (int subset = 0; subset < 4; ++subset) {
        branch[subset] = (uint32_t) cost[subset] << TRELLIS_HOW_BITS;
    }
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        const int low  = state >> 1;
        const int high = low | TRELLIS_N_STATES / 2;
        after[state]   = min(state_cost[low] + branch[turbo_subset(low, state & 1)],
                             state_cost[high] + (branch[turbo_subset(high, state & 1)] + (1u << i)));
    }
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        state_cost[state] = after[state];
    }
}

// How costs of a closed lap came about, to shared memory. path: as turbo_run_closed has it
static TURBO_DEVICE void turbo_trace(const turbo_trellis_lane & l, uint64_t path) {
    const uint32_t how_mask = (1u << TRELLIS_HOW_BITS) - 1;

    const int part  = l.lane / 2;
    const int book  = l.lane % 2;
    const int scale = (uint32_t) path >> 29;
    const int first = path >> 3 & 7;

    uint16_t before[TRELLIS_N_STATES];
    uint32_t state_cost[TRELLIS_N_STATES];
    ggml_cuda_memcpy_1<sizeof(before)>(before, l.s.laps[l.block].before[path & 7][max(part - 1, 0)]);
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        const uint32_t at_start = state == first ? 0 : TRELLIS_UNREACHABLE;
        state_cost[state]       = (part == 0 ? at_start : before[state]) << TRELLIS_HOW_BITS;
    }
    turbo_syncwarp();  // how lies where before was
#pragma unroll 1
    for (int segment = TRELLIS_TRACED * part; segment < TRELLIS_TRACED * (part + 1); ++segment) {
#pragma unroll
        for (int state = 0; state < TRELLIS_N_STATES; ++state) {
            state_cost[state] = (state_cost[state] & ~how_mask) | (uint32_t) book << TRELLIS_SEGMENT;
        }
#pragma unroll
        for (int i = 0; i < TRELLIS_SEGMENT; ++i) {
            uint16_t cost[4];
            ggml_cuda_memcpy_1<sizeof(cost)>(cost, l.at(l.s.place[i][segment][l.block][scale]) + book * sizeof(cost));
            turbo_trace_station(cost, i, state_cost);
        }
#pragma unroll
        for (int state = 0; state < TRELLIS_N_STATES; ++state) {
            state_cost[state] = min(state_cost[state], __shfl_xor_sync(0xffffffff, state_cost[state], 1, 32));
        }
        if (book == 0) {
            uint32_t pairs[TRELLIS_N_STATES / 2];
#pragma unroll
            for (int i = 0; i < TRELLIS_N_STATES / 2; ++i) {
                pairs[i] = (state_cost[2 * i] & how_mask) | (state_cost[2 * i + 1] & how_mask) << 16;
            }
            ggml_cuda_memcpy_1<sizeof(pairs)>(l.s.laps[l.block].how[segment], pairs);
        }
    }
    turbo_syncwarp();
}

// The path that was traced, from its end, which is its first state.
static TURBO_DEVICE turbo_coded_path turbo_trace_back(const turbo_trellis_lane & l, uint64_t found) {
    turbo_coded_path path  = { (int) ((uint32_t) found >> 29), 0, 0 };
    uint32_t         state = found >> 3 & 7;
#pragma unroll 1
    for (int segment = TRELLIS_N_SEGMENTS - 1; segment >= 0; --segment) {
        // coded bits of the three stations before the segment, of its first five, and a codebook
        const uint32_t how = l.s.laps[l.block].how[segment][state];
        path.coded         = path.coded << TRELLIS_SEGMENT | ((how >> 3 & 31) | turbo_reverse3(state) << 5);
        path.selectors     = path.selectors << 1 | how >> TRELLIS_SEGMENT;
        state              = turbo_reverse3(how & 7);
    }
    return path;
}

//
// encoding
//

// least: what all paths cost at the scale of the lane's number. wanted: the same for all lanes of a block; one without is not searched for
static TURBO_DEVICE turbo_coded_path turbo_search(const turbo_trellis_lane & l,
                                                  int                        first_scale,
                                                  uint32_t                   least,
                                                  bool                       wanted) {
    uint32_t bounds[TRELLIS_N_SCALES];
    turbo_bound_candidates(l, first_scale, least, bounds);

    turbo_coded_path path = { 0, 0, 0 };
    uint64_t         best = ~(uint64_t) 0;
#pragma unroll 1
    for (int i = 0; i < TRELLIS_CANDIDATES / TRELLIS_LANES; ++i) {
        const uint32_t lowest = turbo_lowest_candidate(bounds);
        wanted                = wanted && (lowest & ~TRELLIS_CANDIDATE_MASK) <= (uint32_t) (best >> 32);
        // blocks of a wave go on together
        if (!__any_sync(0xffffffff, wanted)) {
            break;
        }
        uint64_t found = turbo_run_closed(l, first_scale, least, turbo_take_candidates(l.lane, lowest, bounds));
#pragma unroll
        for (int mask = TRELLIS_LANES / 2; mask > 0; mask >>= 1) {
            const uint32_t high  = __shfl_xor_sync(0xffffffff, (uint32_t) (found >> 32), mask, 32);
            const uint32_t low   = __shfl_xor_sync(0xffffffff, (uint32_t) found, mask, 32);
            const uint64_t other = (uint64_t) high << 32 | low;
            found                = other < found ? other : found;
        }
        turbo_syncwarp();  // what other lanes left
        const bool better = wanted && found < best;
        if (__any_sync(0xffffffff, better)) {
            turbo_trace(l, found);
            if (better) {
                best = found;
                path = turbo_trace_back(l, found);
            }
            turbo_syncwarp();  // before the next lap
        }
    }
    return path;
}

// Stores a path. Lanes without a block have store = false; a block that is not ordinary has d only.
template <ggml_type type>
static TURBO_DEVICE void turbo_store_path(const turbo_trellis_lane &           l,
                                          const turbo_coded_path &             path,
                                          int                                  d,
                                          bool                                 is_ordinary,
                                          bool                                 store,
                                          typename turbo_traits<type>::block * block) {
    constexpr int bits = turbo_traits<type>::bits;

    const uint64_t z0   = turbo_rotate64(path.coded, 2);
    const uint64_t z1   = path.coded ^ turbo_rotate64(path.coded, 1) ^ turbo_rotate64(path.coded, 3);
    const uint32_t mask = is_ordinary ? 0xff : 0;

    if (store && l.lane == 0) {
        block->d         = (uint8_t) d;
        block->selectors = (uint8_t) (path.selectors & mask);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int segment = l.segment(4 * half);
        const int book    = path.selectors >> segment & 1;
        uint32_t  low     = 0;
        uint32_t  high    = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int      station = l.station(i);
            const int      n       = TRELLIS_SEGMENT * segment + station;
            const int      subset  = 2 * (int) (z1 >> n & 1) + (int) (z0 >> n & 1);
            const int      ix      = l.s.place[station][segment][l.block][path.scale] / sizeof(l.costs[0]);
            const uint32_t plain   = turbo_costs<type>.plain[ix][book] >> 4 * subset & 15;
            low |= (plain & 3) << 2 * i;
            high |= plain >> (bits - 2) << station;
        }
        high |= __shfl_xor_sync(0xffffffff, high, 4, 32);

        if (store) {
            if (l.lane < 4) {
                block->coded[segment] = (uint8_t) (path.coded >> 8 * segment & mask);
            }
            if constexpr (bits >= 3) {
                block->low[8 * half + l.lane] = (uint8_t) (low & mask);
            }
            if constexpr (bits != 3) {
                if (l.lane < 4) {
                    block->high[segment] = (uint8_t) (high & mask);
                }
            }
        }
    }
}

// Puts turbo_trellis_costs::cost into shared memory; a barrier must follow.
template <ggml_type type> static TURBO_DEVICE void turbo_load_costs(turbo_shared_costs & costs, int thread) {
    for (int i = thread; i < 2 * TRELLIS_X_END; i += TRELLIS_THREADS) {
        ggml_cuda_memcpy_1<16>(costs[i], turbo_costs<type>.cost[i]);
    }
}

// All threads of a block of TRELLIS_THREADS. x: values lane, lane + 8, .. of the thread's block. Threads without one take part with store = false.
template <ggml_type type>
static TURBO_DEVICE void turbo_encode_trellis(const float                          x[8],
                                              int                                  thread,
                                              bool                                 store,
                                              const turbo_shared_costs &           costs,
                                              turbo_trellis_scratch &              s,
                                              typename turbo_traits<type>::block * block) {
    const turbo_trellis_lane l(costs, s, thread);

    float                     value[8];
    const turbo_trellis_start start       = turbo_prepare_trellis<TRELLIS_LANES>(x, turbo_traits<type>::reach, value);
    const bool                is_ordinary = !start.is_nan && !start.is_zero;
    const uint32_t            least       = turbo_measure<type>(l, value, start.first_scale);
    __syncthreads();
    turbo_run_open(costs, s, thread);
    __syncthreads();

    const turbo_coded_path path = turbo_search(l, start.first_scale, least, store && is_ordinary);

    const int d = is_ordinary ? start.first_scale + path.scale : start.is_nan ? TRELLIS_SCALE_NAN : 0;
    turbo_store_path<type>(l, path, d, is_ordinary, store, block);
}
