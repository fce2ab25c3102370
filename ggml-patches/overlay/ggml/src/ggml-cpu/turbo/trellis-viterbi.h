#pragma once

// Viterbi's algorithm over the trellis, for as many blocks at a time as a vector has lanes: what stations cost, and what states do.

#define TURBO_SIMD_256  // Wider vectors take more than twice the time to put rows together.

#include "simd.h"

#include <algorithm>
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
    return TRELLIS_SUBSET(state << 1 | bit);
}

//
// what stations cost
//

// Values beyond are as far from all levels as distances count.
constexpr int X_LAST = TRELLIS_X_END - 1;
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
    // See TRELLIS_COST_MAX in turbo/trellis.c.
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

}  // namespace
