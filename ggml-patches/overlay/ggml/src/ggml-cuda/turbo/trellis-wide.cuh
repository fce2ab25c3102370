#pragma once

// Encoding of trellis-coded blocks when there are few of them, as for one token: the bits of trellis-encode.cuh, in less time for a block and
// with more work. All threads of a block of threads encode one block, and how long that takes does not depend on its values.
//
//     measure      a thread for each scale and station: costs of the station's subsets
//     segments     one for each scale, segment and state before it: for each state behind it the cheapest path between the two
//     closed paths one for each scale, two first states and a last state: from segment to segment the cheapest of eight ways to its state.
//                  Paths that end where they begin are closed: all 40 candidates are known exactly
//     store        one for each station, of the cheapest candidate
//
// A word holds a cost, below it the codebook of the segment, and below that the coded bits of the three stations before the segment and of its
// first five, the newest one highest. That is what trellis-encode.cuh has there, "came from the higher state" being the coded bit of three
// stations earlier. So the smaller word is what the reference keeps, and the minima may be taken in another order.
//
// States are counted in reverse here, the newest coded bit highest: then the lowest three bits of a word are the state before the segment.

#include "trellis-costs.cuh"

static constexpr int TRELLIS_WIDE_THREADS = TRELLIS_N_SCALES * QK_TRELLIS;
static constexpr int TRELLIS_STEPS_WORDS =
    72;  // between two segments: 64, and 8 that keep lanes off each other's banks
static constexpr int TRELLIS_STEPS_HALF = TRELLIS_STEPS_WORDS / 2;

static constexpr uint32_t TRELLIS_HOW_MASK = (1u << TRELLIS_HOW_BITS) - 1;

static_assert(QK_TRELLIS == TRELLIS_N_SEGMENTS * TRELLIS_N_STATES && QK_TRELLIS == TRELLIS_N_STATES * TRELLIS_N_STATES,
              "threads of a scale");
static_assert(TRELLIS_WIDE_THREADS == 2 * 32 * TRELLIS_N_SCALES, "half of them close paths, 32 lanes for a scale");
static_assert(TRELLIS_SEGMENT == 8, "how a segment came about: 8 bits");

// What differs between the types.
struct turbo_trellis_numbers {
    int                         bits;
    float                       x_scale;
    float                       reach;
    const turbo_trellis_costs * costs;
};

static TURBO_DEVICE turbo_trellis_numbers turbo_trellis_numbers_of(ggml_type type) {
    turbo_trellis_numbers t = {};
    switch (type) {
#define TURBO_NUMBERS(ENUM, NAME, C_NAME, FAMILY, BITS)                             \
    case GGML_TYPE_##ENUM:                                                          \
        t = { BITS, ENUM##_X_SCALE, ENUM##_REACH, &turbo_costs<GGML_TYPE_##ENUM> }; \
        break;
        GGML_TURBO_TRELLIS_TYPES_X(TURBO_NUMBERS)
#undef TURBO_NUMBERS
        default:
            break;
    }
    return t;
}

// Shared memory of a block that is encoded.
struct __align__(16) turbo_wide_scratch {
    union {
        uint16_t cost[2 * TRELLIS_X_END][2][4];  // until values are measured: turbo_trellis_costs
        uint32_t steps[TRELLIS_N_SCALES][TRELLIS_N_SEGMENTS][TRELLIS_STEPS_WORDS];
    };

    uint16_t least[2 * TRELLIS_X_END];
    uint16_t plain[2 * TRELLIS_X_END][2];

    // costs of each station's subsets, a station more than there are to keep lanes off each other's banks
    uint32_t branch[TRELLIS_N_SCALES][TRELLIS_N_SEGMENTS][TRELLIS_SEGMENT + 1][2][4];
    uint16_t x[TRELLIS_N_SCALES][QK_TRELLIS];
    uint32_t least_sum[TRELLIS_N_SCALES];  // what all paths cost

    turbo_trellis_start start;

    // of each closed path: its cost without least_sum; coded bits from that of the third station before the first one on, and codebooks
    uint32_t closed[TRELLIS_CANDIDATES];
    uint32_t path[TRELLIS_CANDIDATES][3];
};

static_assert(offsetof(turbo_wide_scratch, least) == offsetof(turbo_trellis_costs, least) &&
                  offsetof(turbo_wide_scratch, plain) == offsetof(turbo_trellis_costs, plain),
              "a table is copied as it is");

// A table on its way to shared memory: loads of all threads are under way while they prepare the block.
struct turbo_wide_table {
    static constexpr int n_pieces = sizeof(turbo_trellis_costs) / sizeof(uint4);
    static constexpr int n_own    = (n_pieces + TRELLIS_WIDE_THREADS - 1) / TRELLIS_WIDE_THREADS;

    uint4 pieces[n_own];

    TURBO_DEVICE void load(const turbo_trellis_costs * costs, int thread) {
#pragma unroll
        for (int i = 0; i < n_own; ++i) {
            const int piece = min(thread + i * TRELLIS_WIDE_THREADS, n_pieces - 1);
            ggml_cuda_memcpy_1<sizeof(uint4)>(pieces + i, (const uint4 *) costs + piece);
        }
    }

    TURBO_DEVICE void store(turbo_wide_scratch & s, int thread) const {
#pragma unroll
        for (int i = 0; i < n_own; ++i) {
            const int piece = thread + i * TRELLIS_WIDE_THREADS;
            if (piece < n_pieces) {
                ggml_cuda_memcpy_1<sizeof(uint4)>((uint4 *) &s + piece, pieces + i);
            }
        }
    }
};

static_assert(sizeof(turbo_trellis_costs) % sizeof(uint4) == 0, "turbo_trellis_costs");

//
// search
//

// x: value `place` of the block
static TURBO_DEVICE void turbo_measure_place(float                         x,
                                             int                           scale,
                                             int                           place,
                                             int                           first_scale,
                                             const turbo_trellis_numbers & t,
                                             turbo_wide_scratch &          s) {
    const float inverse = __fdiv_rn(t.x_scale, turbo_trellis_scale(first_scale + scale));
    const int   ix      = turbo_trellis_integer(turbo_without_infinity(x), inverse);
    const int   segment = 4 * (place / 32) + place % 4;
    const int   station = place % 32 / 4;

    uint16_t cost[8];
    uint32_t branch[8];
    ggml_cuda_memcpy_1<sizeof(cost)>(cost, s.cost[ix]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        branch[i] = (uint32_t) cost[i] << TRELLIS_HOW_BITS;
    }
    ggml_cuda_memcpy_1<16>(s.branch[scale][segment][station][0], branch);
    ggml_cuda_memcpy_1<16>(s.branch[scale][segment][station][1], branch + 4);
    s.x[scale][TRELLIS_SEGMENT * segment + station] = (uint16_t) ix;
}

// What all paths at a scale cost, by 32 lanes.
static TURBO_DEVICE void turbo_add_least(int scale, int lane, turbo_wide_scratch & s) {
    const int32_t least = turbo_sum<32>(s.least[s.x[scale][lane]] + s.least[s.x[scale][32 + lane]]);
    if (lane == 0) {
        s.least_sum[scale] = (uint32_t) least;
    }
}

// From a state, counted in reverse, to all states, counted as they are: the cheapest paths through a segment in a codebook.
static TURBO_DEVICE void turbo_pass_segment(const uint32_t branch[][2][4],
                                            int            from,
                                            int            book,
                                            uint32_t       word[TRELLIS_N_STATES]) {
    // coded bits of the three stations before
    const int u1 = from >> 2 & 1;
    const int u2 = from >> 1 & 1;
    const int u3 = from & 1;

    // three stations: from a state there is one way to each other. A coded bit of the first five stands from bit 3 on
    const uint32_t * b0       = branch[0][book];
    const uint32_t * b1       = branch[1][book];
    const uint32_t * b2       = branch[2][book];
    const int        i0       = 2 * (u1 ^ u3) + u2;
    const int        i1       = 2 * u2 + u1;
    const int        i2       = 2 * u1;
    const uint32_t   start    = (uint32_t) (book << TRELLIS_SEGMENT | from);
    const uint32_t   first[2] = { start + b0[i0], start + b0[i0 ^ 2] + (1u << 3) };
    const uint32_t   next[2]  = { b1[i1], b1[i1 ^ 2] };
    uint32_t         last[2][2];
    ggml_cuda_memcpy_1<8>(last[0], b2 + i2);
    ggml_cuda_memcpy_1<8>(last[1], b2 + (i2 ^ 2));
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        const int u[3] = { state >> 2 & 1, state >> 1 & 1, state & 1 };
        word[state] =
            first[u[0]] + next[u[0] ^ u[1]] + last[u[1] ^ u[2]][u[0]] + ((uint32_t) u[1] << 4 | (uint32_t) u[2] << 5);
    }

#pragma unroll
    for (int i = 3; i < TRELLIS_SEGMENT; ++i) {
        uint32_t b[4];
        uint32_t after[TRELLIS_N_STATES];
        ggml_cuda_memcpy_1<16>(b, branch[i][book]);
#pragma unroll
        for (int state = 0; state < TRELLIS_N_STATES; ++state) {
            const int      low  = state >> 1;
            const int      high = low | TRELLIS_N_STATES / 2;
            const uint32_t bit  = i < 5 && state % 2 == 1 ? 1u << (i + 3) : 0;
            after[state]        = min(word[low] + (b[turbo_subset(low, state & 1)] + bit),
                                      word[high] + (b[turbo_subset(high, state & 1)] + bit));
        }
#pragma unroll
        for (int state = 0; state < TRELLIS_N_STATES; ++state) {
            word[state] = after[state];
        }
    }
}

// from: a state before the segment
static TURBO_DEVICE void turbo_search_segment(int scale, int segment, int from, turbo_wide_scratch & s) {
    uint32_t word[2][TRELLIS_N_STATES];
#pragma unroll
    for (int book = 0; book < 2; ++book) {
        turbo_pass_segment(s.branch[scale][segment], from, book, word[book]);
    }
    uint32_t * steps = s.steps[scale][segment] + from / 4 * TRELLIS_STEPS_HALF + from % 4;
#pragma unroll
    for (int state = 0; state < TRELLIS_N_STATES; ++state) {
        steps[4 * turbo_reverse3(state)] = min(word[0][state], word[1][state]);
    }
}

// A path from a first state so far, to the state of a lane.
struct turbo_open_path {
    uint32_t how;   // of the last segment
    uint32_t cost;  // above TRELLIS_HOW_BITS
    uint32_t
        bits[2];    // 8 for each segment; in the second word those of segments 4, 5 and 6, and above them the codebooks
};

// word: of a segment, with the cost of all of the path
static TURBO_DEVICE void turbo_go_on(turbo_open_path & path, int segment, uint32_t word) {
    path.how  = word & TRELLIS_HOW_MASK;
    path.cost = word & ~TRELLIS_HOW_MASK;
    if (segment < TRELLIS_N_SEGMENTS - 1) {
        path.bits[segment / 4] |= (path.how & 0xff) << 8 * (segment % 4);
        path.bits[1] |= path.how >> TRELLIS_SEGMENT << (24 + segment);
    }
}

static TURBO_DEVICE void turbo_keep_path(const turbo_open_path & path, int candidate, turbo_wide_scratch & s) {
    s.closed[candidate]  = path.cost >> TRELLIS_HOW_BITS;
    s.path[candidate][0] = path.bits[0];
    s.path[candidate][1] = (path.bits[1] & 0xffffff) | path.how << 24;
    s.path[candidate][2] = path.bits[1] >> 24 | path.how >> TRELLIS_SEGMENT << (TRELLIS_N_SEGMENTS - 1);
}

// 32 lanes have all paths of a scale: a lane those from states lane / 8 and 4 + lane / 8 to state lane % 8
static TURBO_DEVICE void turbo_close_paths(int scale, int lane, turbo_wide_scratch & s) {
    const int last = lane % TRELLIS_N_STATES;

    turbo_open_path path[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        turbo_go_on(path[k], 0, s.steps[scale][0][k * TRELLIS_STEPS_HALF + 4 * last + lane / TRELLIS_N_STATES]);
    }
#pragma unroll
    for (int segment = 1; segment < TRELLIS_N_SEGMENTS; ++segment) {
        uint32_t steps[TRELLIS_N_STATES];
        ggml_cuda_memcpy_1<16>(steps, s.steps[scale][segment] + 4 * last);
        ggml_cuda_memcpy_1<16>(steps + 4, s.steps[scale][segment] + TRELLIS_STEPS_HALF + 4 * last);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            uint32_t best[2] = { 0xffffffff, 0xffffffff };
#pragma unroll
            for (int from = 0; from < TRELLIS_N_STATES; ++from) {
                const uint32_t cost = __shfl_sync(0xffffffff, path[k].cost, from, TRELLIS_N_STATES);
                best[from % 2]      = min(best[from % 2], cost + steps[from]);
            }
            const uint32_t word = min(best[0], best[1]);
            const int      from = word & (TRELLIS_N_STATES - 1);
            path[k].bits[0]     = __shfl_sync(0xffffffff, path[k].bits[0], from, TRELLIS_N_STATES);
            path[k].bits[1]     = __shfl_sync(0xffffffff, path[k].bits[1], from, TRELLIS_N_STATES);
            turbo_go_on(path[k], segment, word);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int first = 4 * k + lane / TRELLIS_N_STATES;
        if (first == last) {
            turbo_keep_path(path[k], TRELLIS_N_STATES * scale + first, s);
        }
    }
}

//
// encoding
//

// A closed path as a number, the best one lowest: error, scale, cost and first state as turbo_run_closed has them.
static TURBO_DEVICE uint64_t turbo_rank_candidate(const turbo_wide_scratch & s, int candidate, int first_scale) {
    const int      scale = candidate / TRELLIS_N_STATES;
    const uint32_t cost  = s.closed[candidate] + s.least_sum[scale];
    const uint64_t error = turbo_path_error(cost, first_scale + scale);
    return error << 32 | (uint32_t) scale << 29 | cost << 6 | turbo_reverse3(candidate % TRELLIS_N_STATES) << 3;
}

// station: of the thread, which stores up to two bytes. d: as turbo_store_path has it, from the scale of the path
static TURBO_DEVICE void turbo_store_station(const turbo_wide_scratch &    s,
                                             int                           station,
                                             const turbo_trellis_start &   start,
                                             const turbo_trellis_numbers & t,
                                             uint8_t *                     block) {
    const int lane = station % 32;
    uint64_t  best = turbo_rank_candidate(s, lane, start.first_scale);
    if (lane < TRELLIS_CANDIDATES - 32) {
        const uint64_t other = turbo_rank_candidate(s, 32 + lane, start.first_scale);
        best                 = other < best ? other : best;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const uint32_t high  = __shfl_xor_sync(0xffffffff, (uint32_t) (best >> 32), mask, 32);
        const uint32_t low   = __shfl_xor_sync(0xffffffff, (uint32_t) best, mask, 32);
        const uint64_t other = (uint64_t) high << 32 | low;
        best                 = other < best ? other : best;
    }
    const int        scale = (uint32_t) best >> 29;
    const uint32_t * path  = s.path[TRELLIS_N_STATES * scale + turbo_reverse3(best >> 3 & 7)];

    const uint64_t coded   = turbo_rotate64((uint64_t) path[1] << 32 | path[0], QK_TRELLIS - 3);
    const int      segment = station / TRELLIS_SEGMENT;
    const int      i       = station % TRELLIS_SEGMENT;
    const uint64_t z0      = turbo_rotate64(coded, 2);
    const uint64_t z1      = coded ^ turbo_rotate64(coded, 1) ^ turbo_rotate64(coded, 3);
    const int      subset  = 2 * (int) (z1 >> station & 1) + (int) (z0 >> station & 1);
    const uint32_t plain   = s.plain[s.x[scale][station]][path[2] >> segment & 1] >> 4 * subset & 15;

    // bytes of the segment: low of even stations, low of odd ones, high
    uint32_t bytes = (plain & 3) << (8 * (i % 2) + 2 * (i / 2)) | plain >> (t.bits - 2) << (16 + i);
#pragma unroll
    for (int mask = TRELLIS_SEGMENT / 2; mask > 0; mask >>= 1) {
        bytes |= __shfl_xor_sync(0xffffffff, bytes, mask, 32);
    }

    const bool     is_ordinary = !start.is_nan && !start.is_zero;
    const uint32_t mask        = is_ordinary ? 0xff : 0;
    uint8_t *      low         = block + 2 + TRELLIS_N_SEGMENTS + 8 * (segment / 4) + segment % 4;
    uint8_t *      high        = block + 2 + TRELLIS_N_SEGMENTS * (t.bits - 1) + segment;
    if (station == 0) {
        block[0] = (uint8_t) (is_ordinary ? start.first_scale + scale : start.is_nan ? TRELLIS_SCALE_NAN : 0);
        block[1] = (uint8_t) (path[2] & mask);
    }
    if (i == 1) {
        block[2 + segment] = (uint8_t) (coded >> 8 * segment & mask);
    } else if (i == 2 && t.bits >= 3) {
        low[0] = (uint8_t) (bytes & mask);
    } else if (i == 3 && t.bits >= 3) {
        low[4] = (uint8_t) (bytes >> 8 & mask);
    } else if (i == 4 && t.bits != 3) {
        high[0] = (uint8_t) (bytes >> 16 & mask);
    }
}

// All threads of a block of TRELLIS_WIDE_THREADS. x: values thread % 32 and 32 + thread % 32. table: loaded, of the type. block(bytes):
// where one of so many bytes goes
template <typename Place>
static TURBO_DEVICE void turbo_encode_wide(const float                   x[2],
                                           int                           thread,
                                           const turbo_trellis_numbers & t,
                                           const turbo_wide_table &      table,
                                           turbo_wide_scratch &          s,
                                           const Place &                 block) {
    const int scale = thread / QK_TRELLIS;
    const int place = thread % QK_TRELLIS;

    if (thread < 32) {
        float                     value[2];
        const turbo_trellis_start start = turbo_prepare_trellis<32>(x, t.reach, value);
        if (thread == 0) {
            s.start = start;
        }
    }
    table.store(s, thread);
    __syncthreads();
    const turbo_trellis_start start = s.start;
    turbo_measure_place(place < 32 ? x[0] : x[1], scale, place, start.first_scale, t, s);
    __syncthreads();
    turbo_search_segment(scale, place / TRELLIS_N_STATES, place % TRELLIS_N_STATES, s);
    __syncthreads();
    if (thread < TRELLIS_WIDE_THREADS / 2) {
        turbo_close_paths(thread / 32, thread % 32, s);
    } else {
        turbo_add_least(thread / 32 - TRELLIS_N_SCALES, thread % 32, s);
    }
    __syncthreads();
    if (thread < QK_TRELLIS) {
        turbo_store_station(s, thread, start, t, (uint8_t *) block(2 + QK_TRELLIS / 8 * t.bits));
    }
}
