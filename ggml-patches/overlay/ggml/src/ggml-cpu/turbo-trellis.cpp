// Encoding and dot products of the trellis types on the CPU.
//
// The encoder takes as many blocks at a time as a vector has lanes, one block to a lane, so that a step of Viterbi's algorithm is sums and
// minima of whole vectors: of 16-bit words, of which there are twice as many, the first half for the fine codebook and the second for the
// coarse one. What it looks for, and why it finds it, is in ggml-turbo-trellis.c: the same bits are a test.

#include "turbo-simd.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

namespace {

constexpr int   N_STATES  = TURBO_T_N_STATES;
constexpr int   N_SCALES  = TURBO_T_N_SCALES;
constexpr int   N_BOUNDS  = N_SCALES * N_STATES;
constexpr int   SEGMENT   = TURBO_T_SEGMENT;
constexpr int   N_WORDS16 = 2 * LANES;
constexpr float INF       = std::numeric_limits<float>::infinity();

template <int BITS> constexpr size_t BLOCK_BYTES = 2 + QK_TRELLIS * BITS / 8;

constexpr int subset_of(int state, int bit) {
    const int path = state << 1 | bit;
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1) + (path >> 2 & 1);
}

constexpr uint8_t SUBSETS[N_STATES][2] = {
    { subset_of(0, 0), subset_of(0, 1) },
    { subset_of(1, 0), subset_of(1, 1) },
    { subset_of(2, 0), subset_of(2, 1) },
    { subset_of(3, 0), subset_of(3, 1) },
    { subset_of(4, 0), subset_of(4, 1) },
    { subset_of(5, 0), subset_of(5, 1) },
    { subset_of(6, 0), subset_of(6, 1) },
    { subset_of(7, 0), subset_of(7, 1) },
};

//
// Viterbi's algorithm
//

// Levels of each subset as integers of the encoder, and what a value must exceed to be nearer to a level than to the one before
template <int BITS> struct level_words {
    static constexpr int N = 1 << (BITS - 1);

    int16_t level[4][N][N_WORDS16];
    int16_t middle[4][N][N_WORDS16];

    constexpr level_words() : level{}, middle{} {
        for (int subset = 0; subset < 4; ++subset) {
            for (int i = 0; i < N; ++i) {
                for (int word = 0; word < N_WORDS16; ++word) {
                    const int8_t * levels   = TRELLIS<BITS>.codebooks[word / LANES];
                    const int      here     = TRELLIS<BITS>.x_steps * levels[4 * i + subset];
                    const int      before   = i > 0 ? TRELLIS<BITS>.x_steps * levels[4 * i + subset - 4] : here;
                    level[subset][i][word]  = (int16_t) here;
                    middle[subset][i][word] = (int16_t) ((here + before) >> 1);
                }
            }
        }
    }
};

template <int BITS> constexpr level_words<BITS> LEVELS{};

using word_row = uint16_t[N_WORDS16];

// Costs of the four subsets, and which of their levels are the nearest; returns what both codebooks cost at least.
template <int BITS, bool TRACE> TURBO_INLINE vi measure(vi x, vi * cost, word_row * plain) {
    for (int subset = 0; subset < 4; ++subset) {
        vi nearest = load_words16(LEVELS<BITS>.level[subset][0]);
        vi index   = splat_i16(0);
        for (int i = 1; i < LEVELS<BITS>.N; ++i) {
            const vi middle = load_words16(LEVELS<BITS>.middle[subset][i]);
            nearest         = select_gt_i16(x, middle, load_words16(LEVELS<BITS>.level[subset][i]), nearest);
            if constexpr (TRACE) {
                index = select_gt_i16(x, middle, splat_i16(i), index);
            }
        }
        if constexpr (TRACE) {
            store_words16(plain[subset], index);
        }
        const vi distance = min_u16(abs_i16(sub_i16(x, nearest)), splat_i16(TURBO_T_DISTANCE_MAX));
        cost[subset]      = mul_u16(distance, distance);
    }
    const vi smallest = min_u16(min_u16(cost[0], cost[1]), min_u16(cost[2], cost[3]));
    const vi least    = min_u16(smallest, swap_halves(smallest));
    for (int subset = 0; subset < 4; ++subset) {
        cost[subset] = min_u16(sub_i16(cost[subset], least), splat_i16(TURBO_T_COST_MAX));
    }
    return least;
}

// How the states came about: bit s of a word is about state s
struct decisions {
    word_row from_high[QK_TRELLIS];       // from the state with the oldest bit set
    word_row coarse[TURBO_T_N_SEGMENTS];  // first half
    word_row plain[QK_TRELLIS][4];        // bits of the nearest level of each subset
};

// One lap: from the costs of the first states, the same in both halves, to those of the last. The sum of what all of them have in common
// is returned, exact in binary32.
template <int BITS, bool TRACE> vf run_lap(const vi * x, vi * cost, decisions * how) {
    vf common = splat(0.0f);
    for (int segment = 0; segment < TURBO_T_N_SEGMENTS; ++segment) {
        vi m[N_STATES];
        std::copy(cost, cost + N_STATES, m);
        for (int n = segment * SEGMENT; n < (segment + 1) * SEGMENT; ++n) {
            vi branch[4];
            common =
                add(common, first_half_to_float(measure<BITS, TRACE>(x[n], branch, TRACE ? how->plain[n] : nullptr)));
            vi next[N_STATES];
            vi flags = splat_i16(0);
            for (int state = 0; state < N_STATES; ++state) {
                const int before = state >> 1;
                const int above  = before | N_STATES / 2;
                const vi  low    = add_u16(m[before], branch[subset_of(before, state & 1)]);
                const vi  high   = add_u16(m[above], branch[subset_of(above, state & 1)]);
                next[state]      = min_u16(low, high);
                if constexpr (TRACE) {
                    flags = flag_different(flags, next[state], low, 1 << state);
                }
            }
            std::copy(next, next + N_STATES, m);
            if constexpr (TRACE) {
                store_words16(how->from_high[n], flags);
            }
        }

        vi flags    = splat_i16(0);
        vi smallest = splat_i16(-1);
        for (int state = 0; state < N_STATES; ++state) {
            cost[state] = min_u16(m[state], swap_halves(m[state]));
            smallest    = min_u16(smallest, cost[state]);
            if constexpr (TRACE) {
                flags = flag_different(flags, cost[state], m[state], 1 << state);
            }
        }
        for (int state = 0; state < N_STATES; ++state) {
            cost[state] = sub_i16(cost[state], smallest);
        }
        common = add(common, first_half_to_float(smallest));
        if constexpr (TRACE) {
            store_words16(how->coarse[segment], flags);
        }
    }
    return common;
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

struct result {
    float error = INF;
    float cost  = 0.0f;
    job   from;

    bool operator<(const result & other) const {
        return error != other.error           ? error < other.error :
               from.scale != other.from.scale ? from.scale < other.from.scale :
               cost != other.cost             ? cost < other.cost :
                                                from.state < other.from.state;
    }
};

template <int BITS> struct block_group {
    int              n_blocks;
    turbo_block_kind kind[LANES];
    int              first_scale[LANES];
    float            scales[N_SCALES][LANES];
    float            stations[QK_TRELLIS][LANES];

    block_group(const float * x, int n_blocks) : n_blocks(n_blocks) {
        for (int block = 0; block < LANES; ++block) {
            float values[QK_TRELLIS] = {};
            first_scale[block]       = TURBO_T_SCALE_MIN;
            kind[block]              = TURBO_BLOCK_ZERO;
            if (block < n_blocks) {
                kind[block] = turbo_prepare_block(&TRELLIS<BITS>, x + block * QK_TRELLIS, values, &first_scale[block]);
            }
            for (int i = 0; i < N_SCALES; ++i) {
                scales[i][block] = turbo_scale_of((uint8_t) (first_scale[block] + i));
            }
            for (int n = 0; n < QK_TRELLIS; ++n) {
                stations[n][block] = kind[block] == TURBO_BLOCK_ORDINARY ? values[n] : 0.0f;
            }
        }
    }

    float scale_of(const job & j) const { return scales[j.scale][j.block]; }

    // Runs a lap per lane, each from the costs of its first states; results are the costs of the last ones.
    template <bool TRACE> void run(const job * jobs, vi * cost, float (*last)[LANES], decisions * how) const {
        float inverse[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            inverse[lane] = TRELLIS<BITS>.x_scale / scale_of(jobs[lane]);
        }
        const vf    limit = splat((float) TURBO_T_X_MAX);
        const lanes from  = make_lanes([&](int lane) { return jobs[lane].block; });
        vi          x[QK_TRELLIS];
        for (int n = 0; n < QK_TRELLIS; ++n) {
            const vf scaled = mul(permute(load(stations[n]), from), load(inverse));
            x[n]            = to_words(min(max(scaled, sub(splat(0.0f), limit)), limit));
        }
        const vf common = run_lap<BITS, TRACE>(x, cost, how);
        for (int state = 0; state < N_STATES; ++state) {
            store(last[state], add(common, first_half_to_float(cost[state])));
        }
    }

    // ... each from one state
    template <bool TRACE> void run_closed(const job * jobs, float (*last)[LANES], decisions * how) const {
        vi cost[N_STATES];
        for (int state = 0; state < N_STATES; ++state) {
            int16_t first[N_WORDS16];
            for (int word = 0; word < N_WORDS16; ++word) {
                first[word] = jobs[word % LANES].state == state ? 0 : -1;
            }
            cost[state] = load_words16(first);
        }
        run<TRACE>(jobs, cost, last, how);
    }
};

// For each block, what closed laps that were not run cannot fall below: by scale and state
struct lower_bounds {
    float error[N_BOUNDS][LANES];

    // The smallest ones, the first of equals
    void smallest(float * bound, int * index) const {
        vf best  = load(error[0]);
        vf first = splat(0.0f);
        for (int i = 1; i < N_BOUNDS; ++i) {
            const vf other = load(error[i]);
            first          = select_gt(best, other, splat((float) i), first);
            best           = select_gt(best, other, other, best);
        }
        float where[LANES];
        store(bound, best);
        store(where, first);
        std::copy(where, where + LANES, index);
    }
};

template <int BITS> lower_bounds bounds_of(const block_group<BITS> & group) {
    lower_bounds bounds;
    for (int scale = 0; scale < N_SCALES; ++scale) {
        job jobs[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            jobs[lane] = { lane, scale, 0 };
        }
        vi cost[N_STATES];
        std::fill(cost, cost + N_STATES, splat_i16(0));
        float last[N_STATES][LANES];
        group.template run<false>(jobs, cost, last, nullptr);
        const vf d = load(group.scales[scale]);
        for (int state = 0; state < N_STATES; ++state) {
            store(bounds.error[scale * N_STATES + state], mul(load(last[state]), mul(d, d)));
        }
    }
    return bounds;
}

// The laps that may still be the best: of each block the most promising one, then of each the next, until lanes are full.
template <int BITS>
int next_jobs(const block_group<BITS> & group, const result * best, lower_bounds & bounds, job * jobs) {
    int n = 0;
    for (int before = -1; n < LANES && before < n;) {
        before = n;
        float bound[LANES];
        int   index[LANES];
        bounds.smallest(bound, index);
        for (int block = 0; block < group.n_blocks && n < LANES; ++block) {
            if (group.kind[block] == TURBO_BLOCK_ORDINARY && bound[block] <= best[block].error && bound[block] < INF) {
                jobs[n++]                         = { block, index[block] / N_STATES, index[block] % N_STATES };
                bounds.error[index[block]][block] = INF;
            }
        }
    }
    std::fill(jobs + n, jobs + LANES, job());
    return n;
}

// The paths of the first lanes, side by side, since each step of one waits for the step before
template <int BITS> void trace_back(const decisions & how, const job * jobs, turbo_path * paths) {
    int state[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        paths[lane] = {};
        state[lane] = jobs[lane].state;
    }
    for (int segment = TURBO_T_N_SEGMENTS - 1; segment >= 0; --segment) {
        int           book[LANES];
        turbo_segment bits[LANES] = {};
        for (int lane = 0; lane < LANES; ++lane) {
            book[lane] = how.coarse[segment][lane] >> state[lane] & 1;
        }
        for (int j = SEGMENT - 1; j >= 0; --j) {
            const int n = segment * SEGMENT + j;
            for (int lane = 0; lane < LANES; ++lane) {
                const int word   = book[lane] * LANES + lane;
                const int bit    = state[lane] & 1;
                const int before = state[lane] >> 1 | (how.from_high[n][word] >> state[lane] & 1) * (N_STATES / 2);
                turbo_add_station(&bits[lane], BITS, j, bit, how.plain[n][SUBSETS[before][bit]][word]);
                state[lane] = before;
            }
        }
        for (int lane = 0; lane < LANES; ++lane) {
            turbo_add_segment(&paths[lane], segment, book[lane], &bits[lane]);
        }
    }
}

template <int BITS> void encode_group(const float * x, int n_blocks, char * y) {
    const block_group<BITS> group(x, n_blocks);
    lower_bounds            bounds = bounds_of(group);
    result                  best[LANES];
    job                     jobs[LANES];
    float                   last[N_STATES][LANES];
    while (const int n = next_jobs(group, best, bounds, jobs)) {
        group.template run_closed<false>(jobs, last, nullptr);
        for (int lane = 0; lane < n; ++lane) {
            const job &  from  = jobs[lane];
            const float  d     = group.scale_of(from);
            const float  cost  = last[from.state][lane];
            const result found = { cost * (d * d), cost, from };
            best[from.block]   = std::min(best[from.block], found);
        }
    }

    for (int block = 0; block < LANES; ++block) {
        jobs[block]       = best[block].from;
        jobs[block].block = block;
    }
    decisions  how;
    turbo_path paths[LANES];
    group.template run_closed<true>(jobs, last, &how);
    trace_back<BITS>(how, jobs, paths);
    for (int block = 0; block < n_blocks; ++block, y += BLOCK_BYTES<BITS>) {
        if (group.kind[block] == TURBO_BLOCK_ORDINARY) {
            turbo_pack_block(BITS, group.first_scale[block] + jobs[block].scale, &paths[block], y);
        } else {
            memset(y, 0, BLOCK_BYTES<BITS>);
            y[0] = group.kind[block] == TURBO_BLOCK_NAN ? (char) TURBO_T_SCALE_NAN : 0;
        }
    }
}

template <int BITS> void quantize_row(const float * x, void * y, int64_t k) {
    assert(k % QK_TRELLIS == 0);
    const int64_t n_blocks = k / QK_TRELLIS;
    for (int64_t i = 0; i < n_blocks; i += LANES) {
        encode_group<BITS>(x + i * QK_TRELLIS, (int) std::min<int64_t>(LANES, n_blocks - i),
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
        const float d = turbo_scale_of((uint8_t) x[0]) / TURBO_T_LEVEL_STEPS;
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
