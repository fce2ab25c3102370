// Encoding and dot products of the trellis types on the CPU.
//
// The encoder takes as many blocks at a time as a vector has lanes, one block to a lane, so that a step of Viterbi's algorithm is sums and
// minima of whole vectors: of 16-bit words, the lower one of a lane for the fine codebook and the upper one for the coarse one. What a
// station costs is a row of a table, for each lane another one. What the encoder looks for, and why it finds it, is in
// ggml-turbo-trellis.c: the same bits are a test.

#define TURBO_SIMD_256  // Wider vectors take more than twice the time to put rows together.

#include "turbo-simd.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <utility>

namespace {

constexpr int     N_STATES   = TRELLIS_N_STATES;
constexpr int     N_SCALES   = TRELLIS_N_SCALES;
constexpr int     N_BOUNDS   = N_SCALES * N_STATES;
constexpr int     N_SEGMENTS = TRELLIS_N_SEGMENTS;
constexpr int     SEGMENT    = TRELLIS_SEGMENT;
constexpr int     N_WORDS16  = 2 * LANES;
constexpr int32_t LOW_WORD   = 0xffff;
constexpr int     N_BLOCKS   = 16;  // of a group: more than lanes, which so find work in the end, too
static_assert(N_BLOCKS % LANES == 0, "N_BLOCKS");

template <int BITS> constexpr size_t BLOCK_BYTES = 2 + QK_TRELLIS * BITS / 8;

constexpr int subset_of(int state, int bit) {
    const int path = state << 1 | bit;
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1) + (path >> 2 & 1);
}

//
// what stations cost
//

// Values beyond are as far from all levels as distances count.
constexpr int X_LAST = 511;
static_assert(2 * 127 + TRELLIS_DISTANCE_MAX <= X_LAST && X_LAST <= TRELLIS_X_MAX, "X_LAST");

constexpr int distance(int x, int y) {
    return x < y ? y - x : x - y;
}

constexpr int cut_square(int x) {
    return x < TRELLIS_DISTANCE_MAX ? x * x : TRELLIS_DISTANCE_MAX * TRELLIS_DISTANCE_MAX;
}

template <int BITS> constexpr int x_of_level(int book, int level) {
    return TRELLIS<BITS>.x_steps * TRELLIS<BITS>.codebooks[book][level];
}

// The largest level of all
template <int BITS> constexpr int X_OUTER = x_of_level<BITS>(1, (2 << BITS) - 1);

// What all paths cost at least is what the nearest of all levels does. For values beyond the largest level that is simple to sum up, and not in
// the table; what there is between levels stays in it.
template <int BITS> struct alignas(64) cost_rows {
    uint32_t cost[2 * X_LAST + 1][4] = {};  // of each subset: in the fine codebook, and in the coarse one << 16
    int      rest                    = 0;   // the most that all paths cost in the table

    constexpr cost_rows() {
        int nearest[8] = { 0, 1, 2, 3, 0, 1, 2, 3 };
        for (int x = 0; x <= X_LAST; ++x) {
            const int beyond     = x > X_OUTER<BITS> ? cut_square(x - X_OUTER<BITS>) : 0;
            int       least      = cut_square(TRELLIS_DISTANCE_MAX);
            int       squared[8] = {};
            for (int i = 0; i < 8; ++i) {
                int d = distance(x, x_of_level<BITS>(i / 4, nearest[i]));
                while (nearest[i] + 4 < 2 << BITS) {
                    const int next = distance(x, x_of_level<BITS>(i / 4, nearest[i] + 4));
                    if (next >= d) {
                        break;
                    }
                    d = next;
                    nearest[i] += 4;
                }
                squared[i] = cut_square(d);
                least      = squared[i] < least ? squared[i] : least;
            }
            for (int i = 0; i < 8; ++i) {
                const int      above = squared[i] - least;
                const uint32_t sum =
                    (uint32_t) ((above < TRELLIS_COST_MAX ? above : TRELLIS_COST_MAX) + least - beyond);
                const uint32_t word = sum << 16 * (i / 4);
                cost[X_LAST + x][i % 4] |= word;
                if (x > 0) {
                    cost[X_LAST - x][3 - i % 4] |= word;  // codebooks are odd-symmetric
                }
            }
            rest = least - beyond > rest ? least - beyond : rest;
        }
    }
};

// What a state costs that paths do not start from: more than any other when all states can be reached, after three stations
constexpr int UNREACHABLE = 1 << 15;

template <int BITS> constexpr cost_rows<BITS> make_cost_rows() {
    constexpr cost_rows<BITS> rows;
    // See TRELLIS_COST_MAX in ggml-turbo-trellis.c.
    static_assert((3 + SEGMENT) * TRELLIS_COST_MAX + SEGMENT * rows.rest <= UINT16_MAX, "costs are too large");
    static_assert(3 * (TRELLIS_COST_MAX + rows.rest) < UNREACHABLE, "UNREACHABLE");
    static_assert(3 * (TRELLIS_COST_MAX + rows.rest) + UNREACHABLE <= UINT16_MAX, "UNREACHABLE");
    return rows;
}

template <int BITS> constexpr cost_rows<BITS> COSTS = make_cost_rows<BITS>();

constexpr int ROW_BYTES = sizeof(COSTS<2>.cost[0]);

// Values as the encoder has them: ROW_BYTES times an integer, so where the row of COSTS is from that of 0 on, by station
using station_values = int16_t[QK_TRELLIS];

static_assert(ROW_BYTES * X_LAST <= INT16_MAX, "ROW_BYTES");

//
// Viterbi's algorithm
//

// How the states after each segment came about. Bit j of the low word: station j came from the state with the oldest bit set, so that the
// coded bit three stations before was set; bit SEGMENT: the coarse codebook
using decisions = vi[N_SEGMENTS][N_STATES];

template <class F, int... I> TURBO_INLINE void for_stations(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(0), f(1), ... with constants: a loop would have to rename the states.
template <class F> TURBO_INLINE void for_stations(F f) {
    for_stations(f, std::make_integer_sequence<int, SEGMENT>());
}

template <int BITS> TURBO_INLINE void load_branches(const int16_t * x, vi * branch) {
    const char * rows = (const char *) COSTS<BITS>.cost[X_LAST];
    gather_words<4>(branch, [=](int lane) { return rows + x[lane * QK_TRELLIS]; });
}

// Of what states cost with a segment's two codebooks, which the words of a lane are, the smaller ones. What they have in common is added to
// `common`, exact in binary32.
TURBO_INLINE void end_segment(const vi * m, vi * cost, vf & common) {
    vi smallest[N_STATES];
    for (int state = 0; state < N_STATES; ++state) {
        cost[state]     = min_u16(m[state], swap_words(m[state]));
        smallest[state] = cost[state];
    }
    for (int n = N_STATES / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            smallest[i] = min_u16(smallest[i], smallest[n + i]);
        }
    }
    for (int state = 0; state < N_STATES; ++state) {
        cost[state] = sub_i16(cost[state], smallest[0]);
    }
    common = add(common, to_float(bit_and(smallest[0], splat_i32(LOW_WORD))));
}

// From the costs of the states before segment `begin`, the same in both words, to those before segment `end`
template <int BITS, bool TRACE>
void go_forward(const station_values * x, int begin, int end, vi * cost, vf & common, decisions * how) {
    for (int segment = begin; segment < end; ++segment) {
        vi m[N_STATES];
        vi from[N_STATES];
        std::copy(cost, cost + N_STATES, m);
        if constexpr (TRACE) {
            std::fill(from, from + N_STATES, splat_i32(1 << (16 + SEGMENT)));
        }
        for_stations([&](auto j) {
            vi branch[4];
            vi next[N_STATES];
            vi next_from[N_STATES];
            load_branches<BITS>(&x[0][segment * SEGMENT + j], branch);
            for (int state = 0; state < N_STATES; ++state) {
                const int before = state >> 1;
                const int above  = before | N_STATES / 2;
                const vi  low    = add_i16(m[before], branch[subset_of(before, state & 1)]);
                const vi  high   = add_i16(m[above], branch[subset_of(above, state & 1)]);
                next[state]      = min_u16(low, high);
                if constexpr (TRACE) {
                    const vi from_high = bit_or(from[above], splat_i16(1 << j));
                    next_from[state]   = select_eq_i16(next[state], low, from[before], from_high);
                }
            }
            std::copy(next, next + N_STATES, m);
            if constexpr (TRACE) {
                std::copy(next_from, next_from + N_STATES, from);
            }
        });
        if constexpr (TRACE) {
            for (int state = 0; state < N_STATES; ++state) {
                const vi coarse        = swap_words(m[state]);
                const vi smaller       = min_u16(m[state], coarse);
                (*how)[segment][state] = select_eq_i16(smaller, m[state], from[state], swap_words(from[state]));
            }
        }
        end_segment(m, cost, common);
    }
}

// The other way: from the costs of the states before segment `begin` to those before segment `end`, which is less
template <int BITS> void go_back(const station_values * x, int begin, int end, vi * cost, vf & common) {
    for (int segment = begin - 1; segment >= end; --segment) {
        vi m[N_STATES];
        std::copy(cost, cost + N_STATES, m);
        for_stations([&](auto j) {
            vi branch[4];
            vi before[N_STATES];
            load_branches<BITS>(&x[0][segment * SEGMENT + SEGMENT - 1 - j], branch);
            for (int state = 0; state < N_STATES; ++state) {
                const int after = 2 * state % N_STATES;
                before[state]   = min_u16(add_i16(m[after], branch[subset_of(state, 0)]),
                                          add_i16(m[after + 1], branch[subset_of(state, 1)]));
            }
            std::copy(before, before + N_STATES, m);
        });
        end_segment(m, cost, common);
    }
}

//
// blocks in lanes
//

// A closed lap: which block, at which of its scales, from which state
struct job {
    int block = 0;
    int scale = 0;
    int state = 0;
};

// Of two closed paths the smaller number is the better one: the bits of the error in binary32, then scale, cost and first state
using result = uint64_t;

static_assert((int64_t) QK_TRELLIS * (TRELLIS_COST_MAX + TRELLIS_DISTANCE_MAX * TRELLIS_DISTANCE_MAX) < 1 << 24,
              "cost");

result make_result(const job & from, float cost, float d) {
    const uint32_t error = turbo_bits_of(cost * (d * d));
    return (uint64_t) error << 32 | (uint32_t) from.scale << 29 | (uint32_t) cost << 3 | (uint32_t) from.state;
}

constexpr result NO_RESULT = (uint64_t) 0x7f800000 << 32;  // infinity

uint32_t error_bits(result x) {
    return (uint32_t) (x >> 32);
}

job job_of(result x, int block) {
    return { block, (int) (x >> 29 & 7), (int) (x & 7) };
}

template <int BITS> struct block_group {
    int              n_blocks;
    int              end;  // whole vectors
    turbo_block_kind kind[N_BLOCKS];
    int              first_scale[N_BLOCKS];
    float            scales[N_SCALES][N_BLOCKS];
    float            least[N_SCALES][N_BLOCKS];  // what all paths cost, and COSTS does not have
    station_values   x[N_SCALES][N_BLOCKS];

    block_group(const float * x, int n_blocks) : n_blocks(n_blocks), end((n_blocks + LANES - 1) / LANES * LANES) {
        float values[N_BLOCKS][QK_TRELLIS];
        for (int block = 0; block < end; ++block) {
            kind[block]        = TURBO_BLOCK_ZERO;
            first_scale[block] = TRELLIS_SCALE_MIN;
            if (block < n_blocks) {
                prepare(block, x + block * QK_TRELLIS, values[block]);
            }
            if (kind[block] != TURBO_BLOCK_ORDINARY) {
                std::fill(values[block], values[block] + QK_TRELLIS, 0.0f);
            }
        }
        for (int scale = 0; scale < N_SCALES; ++scale) {
            int32_t sums[N_BLOCKS][LANES];
            for (int block = 0; block < end; ++block) {
                const float d        = turbo_float_of((uint32_t) (first_scale[block] + scale + (112 << 3)) << 20);
                const float inverse  = TRELLIS<BITS>.x_scale / d;
                scales[scale][block] = d;
                store_i32(sums[block], to_station_values(values[block], inverse, this->x[scale][block]));
            }
            for (int first = 0; first < end; first += LANES) {
                vi part[LANES];
                load_words<LANES>(part, (const char *) sums[first], sizeof(sums[0]));
                vf sum = to_float(part[0]);
                for (int i = 1; i < LANES; ++i) {
                    sum = add(sum, to_float(part[i]));
                }
                store(least[scale] + first, sum);
            }
        }
    }

    // Writes the values such that to_pairs() of two vectors has stations in their order, without infinities.
    void prepare(int block, const float * x, float * values) {
        vi magnitude = splat_i32(0);
        for (int i = 0; i < QK_TRELLIS; i += LANES) {
            magnitude = max_i32(magnitude, bit_and(as_int(load(x + i)), splat_i32(0x7fffffff)));
        }
        int32_t of_lanes[LANES];
        store_i32(of_lanes, magnitude);
        const uint32_t bits = (uint32_t) *std::max_element(of_lanes, of_lanes + LANES);
        kind[block]         = turbo_kind_of_block(bits);
        if (kind[block] != TURBO_BLOCK_ORDINARY) {
            return;
        }

        // dword b of row 8h + j is about station 32h + 8b + j
        for (int first = 0; first < QK_TRELLIS / 4; first += LANES) {
            const auto quarter = [&](int lane) {
                return (first + lane) / 4;
            };  // half 0 even, odd; half 1 even, odd
            vi w[4];
            gather_words<4>(w, [&](int lane) {
                return (const char *) (x + 4 * (8 * (quarter(lane) / 2) + quarter(lane) % 2 + 2 * (lane % 4)));
            });
            for (int b = 0; b < 4; ++b) {
                float lane_values[LANES];
                store(lane_values, as_float(w[b]));
                for (int lane = 0; lane < LANES; lane += 4) {
                    const int station = 32 * (quarter(lane) / 2) + 8 * b;
                    const int at      = station / N_WORDS16 * N_WORDS16 + station % N_WORDS16 / 2;
                    std::copy_n(lane_values + lane, 4, values + at + quarter(lane) % 2 * LANES);
                }
            }
        }

        const float amax = turbo_float_of(std::min(bits, TURBO_MAX_FINITE));
        if (bits > TURBO_MAX_FINITE) {
            for (int i = 0; i < QK_TRELLIS; ++i) {
                values[i] = std::min(std::max(values[i], -amax), amax);
            }
        }
        const vf to_rms = splat((float) TRELLIS_RMS_MAX / amax);
        vi       sums   = splat_i32(0);
        for (int i = 0; i < QK_TRELLIS; i += N_WORDS16) {
            const vi t = to_pairs(mul(load(values + i), to_rms), mul(load(values + i + LANES), to_rms));
            sums       = dot_pairs(sums, t, t);
        }
        store_i32(of_lanes, sums);
        int32_t sum = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            sum += of_lanes[lane];
        }
        first_scale[block] = turbo_first_scale(&TRELLIS<BITS>, amax, sum);
    }

    // Returns what all paths cost, as the sum of the lanes.
    static vi to_station_values(const float * values, float inverse, int16_t * x) {
        const vf high = splat((float) X_LAST);
        const vf low  = splat((float) -X_LAST);
        vi       sums = splat_i32(0);
        for (int i = 0; i < QK_TRELLIS; i += N_WORDS16) {
            const vf even    = mul(load(values + i), splat(inverse));
            const vf odd     = mul(load(values + i + LANES), splat(inverse));
            const vi rounded = to_pairs(min(max(even, low), high), min(max(odd, low), high));
            const vi beyond  = sub_u16(abs_i16(rounded), splat_i16(X_OUTER<BITS>));
            const vi cut     = min_u16(beyond, splat_i16(TRELLIS_DISTANCE_MAX));
            sums             = dot_pairs(sums, cut, cut);
            store_words16(x + i, shift_left_i16<4>(rounded));
        }
        return sums;
    }

    // A lap per lane, from and to one state
    struct closed_laps {
        station_values x[LANES];
        vi             cost[N_STATES];
        vf             common;
    };

    void prepare_laps(const job * jobs, closed_laps & laps) const {
        float   least_of_lanes[LANES];
        int32_t states[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const job & j        = jobs[lane];
            least_of_lanes[lane] = least[j.scale][j.block];
            states[lane]         = j.state << 16 | j.state;
            memcpy(laps.x[lane], x[j.scale][j.block], sizeof(laps.x[lane]));
        }
        laps.common = load(least_of_lanes);
        for (int state = 0; state < N_STATES; ++state) {
            laps.cost[state] = select_eq_i16(load_i32(states), splat_i16((int16_t) state), splat_i16(0),
                                             splat_i16((int16_t) UNREACHABLE));
        }
    }

    // Puts the better one of what there is and what the laps find for the first jobs.
    void run_closed(const job * jobs, int n, result * best) const {
        closed_laps laps;
        float       last[N_STATES][LANES];
        prepare_laps(jobs, laps);
        go_back<BITS>(laps.x, N_SEGMENTS, 0, laps.cost, laps.common);
        for (int state = 0; state < N_STATES; ++state) {
            store(last[state], add(laps.common, to_float(bit_and(laps.cost[state], splat_i32(LOW_WORD)))));
        }
        for (int lane = 0; lane < n; ++lane) {
            const job &  j     = jobs[lane];
            const result found = make_result(j, last[j.state][lane], scales[j.scale][j.block]);
            best[j.block]      = std::min(best[j.block], found);
        }
    }

    void trace_closed(const job * jobs, decisions & how) const {
        closed_laps laps;
        prepare_laps(jobs, laps);
        go_forward<BITS, true>(laps.x, 0, N_SEGMENTS, laps.cost, laps.common, &how);
    }
};

// The closed laps that may be the best of a block. A key says what a lap cannot fall below, as the bits of an error in binary32, rounded down,
// whose lowest ones are scale and state. The smallest of each block's keys is next, then the smallest of those above.
struct candidates {
    static constexpr int      JOB  = 63;
    static constexpr uint32_t NONE = (uint32_t) std::numeric_limits<int32_t>::max() & ~JOB;
    static_assert(N_BOUNDS <= JOB, "JOB");

    int      n_blocks;
    int32_t  key[N_BOUNDS][N_BLOCKS];
    uint32_t next[N_BLOCKS] = {};
    int      queue[N_BLOCKS];  // of blocks that may have more
    int      head    = 0;
    int      size    = 0;
    int      n_ready = 0;  // of the queue: whose `next` is a key

    explicit candidates(int n_blocks) : n_blocks(n_blocks) {}

    // Goes on to keys that are not below `next`.
    void advance() {
        for (int first = 0; first < n_blocks; first += LANES) {
            const vi above = load_i32((const int32_t *) next + first);
            vi       least = sub_i32(splat_i32((int32_t) NONE), above);
            for (int i = 0; i < N_BOUNDS; ++i) {
                least = min_u32(least, sub_i32(load_i32(key[i] + first), above));
            }
            store_i32((int32_t *) next + first, add_i32(above, least));
        }
    }

    // The laps to run: for each block in turn one, until lanes are full. A block whose next one is not wanted has no more.
    int take(const result * best, job * jobs) {
        int n = 0;
        while (n < LANES && size > 0) {
            if (n_ready == 0) {
                advance();
                n_ready = size;
            }
            // without branches, which nothing could predict
            const int      block  = queue[head];
            const uint32_t k      = next[block];
            const bool     wanted = (k & ~JOB) <= error_bits(best[block]);
            jobs[n]               = { block, (int) ((k & JOB) / N_STATES), (int) (k % N_STATES) };
            n += wanted;
            next[block]                     = k + 1;
            queue[(head + size) % N_BLOCKS] = block;
            size -= !wanted;
            head = (head + 1) % N_BLOCKS;
            --n_ready;
        }
        std::fill(jobs + n, jobs + LANES, job());
        return n;
    }
};

// A closed path through a state before the first segment has two halves, which cost no less than the cheapest ones from and to that state.
template <int BITS> void find_candidates(const block_group<BITS> & group, candidates & found) {
    for (int scale = 0; scale < N_SCALES; ++scale) {
        for (int first = 0; first < group.end; first += LANES) {
            const station_values * x = group.x[scale] + first;
            vi                     from[N_STATES];
            vi                     to[N_STATES];
            std::fill(from, from + N_STATES, splat_i16(0));
            std::fill(to, to + N_STATES, splat_i16(0));
            vf common = load(group.least[scale] + first);
            go_back<BITS>(x, N_SEGMENTS / 2, 0, from, common);
            go_forward<BITS, false>(x, N_SEGMENTS / 2, N_SEGMENTS, to, common, nullptr);
            const vf d       = load(group.scales[scale] + first);
            const vf squared = mul(d, d);
            for (int state = 0; state < N_STATES; ++state) {
                const int i    = scale * N_STATES + state;
                const vi  cost = bit_and(add_i16(from[state], to[state]), splat_i32(LOW_WORD));
                const vi  bits = as_int(mul(add(common, to_float(cost)), squared));
                store_i32(found.key[i] + first, bit_or(bit_and(bits, splat_i32(~candidates::JOB)), splat_i32(i)));
            }
        }
    }
    for (int block = 0; block < group.n_blocks; ++block) {
        if (group.kind[block] == TURBO_BLOCK_ORDINARY) {
            found.queue[found.size++] = block;
        }
    }
}

//
// paths
//

constexpr int reverse3(int x) {
    return (x & 1) << 2 | (x & 2) | (x >> 2 & 1);
}

// Coded bits and selectors
void trace_back(const decisions & how, const job * jobs, turbo_path * paths) {
    int32_t last[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        last[lane] = reverse3(jobs[lane].state);
    }
    vi      state = load_i32(last);  // the oldest bit lowest
    int32_t bytes[N_SEGMENTS][LANES];
    for (int segment = N_SEGMENTS - 1; segment >= 0; --segment) {
        vi from = how[segment][0];
        for (int i = 1; i < N_STATES; ++i) {
            from = select_eq_i16(state, splat_i32(reverse3(i)), how[segment][i], from);
        }
        // three coded bits before the segment, its first five, and the codebook
        const vi first = bit_and(shift_right<3>(from), splat_i32((1 << (SEGMENT - 3)) - 1));
        const vi book  = bit_and(from, splat_i32(1 << SEGMENT));
        store_i32(bytes[segment], bit_or(bit_or(first, shift_right<3 - SEGMENT>(state)), book));
        state = bit_and(from, splat_i32(7));
    }
    for (int lane = 0; lane < LANES; ++lane) {
        paths[lane] = {};
        for (int segment = 0; segment < N_SEGMENTS; ++segment) {
            paths[lane].coded |= (uint64_t) (bytes[segment][lane] & 0xff) << 8 * segment;
            paths[lane].selectors |= (uint8_t) (bytes[segment][lane] >> SEGMENT << segment);
        }
    }
}

// What a value must exceed to be nearer to a level than to the one before in its subset: by codebook and subset
template <int BITS> struct level_middles {
    int16_t x[1 << (BITS - 1)][8] = {};

    constexpr level_middles() {
        for (int i = 1; i < 1 << (BITS - 1); ++i) {
            for (int k = 0; k < 8; ++k) {
                const int8_t * levels = TRELLIS<BITS>.codebooks[k / 4];
                const int      sum    = levels[4 * i + k % 4] + levels[4 * i + k % 4 - 4];
                x[i][k]               = (int16_t) (ROW_BYTES * (TRELLIS<BITS>.x_steps * sum >> 1));
            }
        }
    }
};

template <int BITS> constexpr level_middles<BITS> MIDDLES{};

// Plain bits, those of the nearest levels
template <int BITS> void add_plain_bits(const int16_t * x, turbo_path & path) {
    const uint64_t z1   = turbo_high_subset_bits(path.coded);
    const uint64_t z0   = turbo_low_subset_bits(path.coded);
    const uint64_t ones = turbo_spread(path.selectors) | (uint64_t) turbo_spread(path.selectors >> 4) << 32;
    const uint64_t book = ones * 0xff;

    uint64_t plane[3] = {};
    for (int n = 0; n < QK_TRELLIS; n += N_WORDS16) {
        const auto bits = [&](uint64_t word, int i) {
            return spread_bits((uint32_t) (word >> n), splat_i16(i * 0x0202));
        };
        const vi index = bit_or(bit_or(splat_i16(0x0100), bits(z0, 1)), bit_or(bits(z1, 2), bits(book, 4)));
        const vi value = load_words16(x + n);
        vi       plain = splat_i16(0);
        for (int i = 1; i < 1 << (BITS - 1); ++i) {
            plain = count_gt_i16(plain, value, lookup_words(MIDDLES<BITS>.x[i], index));
        }
        for (int bit = 0; bit < BITS - 1; ++bit) {
            plane[bit] |= (uint64_t) gather_bits(plain, bit) << n;
        }
    }
    if constexpr (BITS >= 3) {
        const uint64_t even_bits = 0x5555555555555555;
        const uint64_t even      = (plane[0] & even_bits) | (plane[1] & even_bits) << 1;
        const uint64_t odd       = (plane[0] >> 1 & even_bits) | (plane[1] & ~even_bits);
        path.low[0]              = (even & 0xffffffff) | odd << 32;
        path.low[1]              = even >> 32 | (odd >> 32 << 32);
    }
    if constexpr (BITS != 3) {
        path.high = plane[BITS - 2];
    }
}

template <int BITS> void encode_group(const float * x, int n_blocks, char * y) {
    const block_group<BITS> group(x, n_blocks);
    candidates              waiting(n_blocks);
    result                  best[N_BLOCKS];
    job                     jobs[LANES];
    find_candidates(group, waiting);
    std::fill(best, best + N_BLOCKS, NO_RESULT);
    while (const int n = waiting.take(best, jobs)) {
        group.run_closed(jobs, n, best);
    }

    turbo_path paths[LANES];
    for (int block = 0; block < n_blocks; ++block, y += BLOCK_BYTES<BITS>) {
        if (block % LANES == 0) {
            decisions how;
            for (int lane = 0; lane < LANES; ++lane) {
                jobs[lane] = job_of(best[block + lane], block + lane);
            }
            group.trace_closed(jobs, how);
            trace_back(how, jobs, paths);
        }
        if (group.kind[block] == TURBO_BLOCK_ORDINARY) {
            const job & j = jobs[block % LANES];
            add_plain_bits<BITS>(group.x[j.scale][block], paths[block % LANES]);
            turbo_pack_block(BITS, group.first_scale[block] + j.scale, &paths[block % LANES], y);
        } else {
            memset(y, 0, BLOCK_BYTES<BITS>);
            y[0] = group.kind[block] == TURBO_BLOCK_NAN ? (char) TRELLIS_SCALE_NAN : 0;
        }
    }
}

template <int BITS> void quantize_row(const float * x, void * y, int64_t k) {
    assert(k % QK_TRELLIS == 0);
    const int64_t n_blocks = k / QK_TRELLIS;
    for (int64_t i = 0; i < n_blocks; i += N_BLOCKS) {
        encode_group<BITS>(x + i * QK_TRELLIS, (int) std::min<int64_t>(N_BLOCKS, n_blocks - i),
                           (char *) y + i * BLOCK_BYTES<BITS>);
    }
}

//
// dot products: for products of matrices; attention has its own
//

// Each product has at most 15 + 20 significant bits, so it is exact in binary64.
template <int BITS> float vec_dot(int n, const void * vx, const void * vy) {
    assert(n % QK_TRELLIS == 0);
    const char *       x   = (const char *) vx;
    const block_q8_0 * y   = (const block_q8_0 *) vy;
    double             sum = 0.0;
    for (int i = 0; i < n; i += QK_TRELLIS, x += BLOCK_BYTES<BITS>) {
        int8_t levels[QK_TRELLIS];
        turbo_unpack_levels(&TRELLIS<BITS>, x, levels);
        const float d = turbo_scale_of((uint8_t) x[0]) / TRELLIS_LEVEL_STEPS;
        for (const int8_t * half = levels; half < levels + QK_TRELLIS; half += QK8_0, ++y) {
            int32_t dot = 0;
            for (int j = 0; j < QK8_0; ++j) {
                dot += half[j] * y->qs[j];
            }
            sum += (double) (d * GGML_CPU_FP16_TO_FP32(y->d)) * dot;
        }
    }
    return (float) sum;
}

}  // namespace

#define DEFINE_TRELLIS(bits)                                                                                      \
    void quantize_row_turbo##bits##_t(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {         \
        quantize_row<bits>(x, y, k);                                                                              \
    }                                                                                                             \
                                                                                                                  \
    void ggml_vec_dot_turbo##bits##_t_q8_0(int n, float * GGML_RESTRICT s, size_t, const void * GGML_RESTRICT vx, \
                                           size_t, const void * GGML_RESTRICT vy, size_t, int) {                  \
        *s = vec_dot<bits>(n, vx, vy);                                                                            \
    }

DEFINE_TRELLIS(2)
DEFINE_TRELLIS(3)
DEFINE_TRELLIS(4)
