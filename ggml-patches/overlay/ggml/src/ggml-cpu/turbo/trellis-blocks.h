#pragma once

// The search of the encoder: blocks in lanes, and which closed laps to run for them.

#include "trellis-viterbi.h"

#include <algorithm>
#include <limits>

namespace {

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

constexpr result NO_RESULT = (uint64_t) TURBO_INFINITY_BITS << 32;  // infinity

uint32_t error_bits(result x) {
    return (uint32_t) (x >> 32);
}

job job_of(result x, int block) {
    return { block, (int) (x >> 29 & 7), (int) (x & 7) };
}

template <int BITS> struct block_group {
    int                n_blocks;
    int                end;  // whole vectors
    trellis_block_kind kind[N_BLOCKS];
    int                first_scale[N_BLOCKS];
    float              scales[N_SCALES][N_BLOCKS];
    float              least[N_SCALES][N_BLOCKS];  // what all paths cost, and COSTS does not have
    station_values     x[N_SCALES][N_BLOCKS];

    block_group(const float * x, int n_blocks) : n_blocks(n_blocks), end((n_blocks + LANES - 1) / LANES * LANES) {
        float values[N_BLOCKS][QK_TRELLIS];
        for (int block = 0; block < end; ++block) {
            kind[block]        = TRELLIS_BLOCK_ZERO;
            first_scale[block] = TRELLIS_SCALE_MIN;
            if (block < n_blocks) {
                prepare(block, x + block * QK_TRELLIS, values[block]);
            }
            if (kind[block] != TRELLIS_BLOCK_ORDINARY) {
                std::fill(values[block], values[block] + QK_TRELLIS, 0.0f);
            }
        }
        for (int scale = 0; scale < N_SCALES; ++scale) {
            int32_t sums[N_BLOCKS][LANES];
            for (int block = 0; block < end; ++block) {
                const float d       = turbo_float_of((uint32_t) (first_scale[block] + scale + TRELLIS_CODE_BIAS) << 20);
                const float inverse = TRELLIS<BITS>.x_scale / d;
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
        kind[block]         = trellis_kind_of_block(bits);
        if (kind[block] != TRELLIS_BLOCK_ORDINARY) {
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

        const float amax = turbo_float_of(std::min<uint32_t>(bits, TURBO_FLT_MAX_BITS));
        if (bits > TURBO_FLT_MAX_BITS) {
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
        first_scale[block] = trellis_first_scale(&TRELLIS<BITS>, amax, sum);
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
        if (group.kind[block] == TRELLIS_BLOCK_ORDINARY) {
            found.queue[found.size++] = block;
        }
    }
}

}  // namespace
