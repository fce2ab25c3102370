// Reference for packing and unpacking blocks of the trellis types: the judge of the numpy, SIMD and GPU versions, which store the same bits.
//
// For each scale to try, Viterbi's algorithm finds the path with the smallest sum of squared errors, as integers that are cut so that SIMD
// can do with 16 bits. In each segment it goes through both codebooks from the same states, and every state keeps the cheaper one. A closed
// path has to end in the state that it starts from: the exact way is one run for each state to start from. Most of them are not needed: a
// run from all states at once tells for each last state what no closed path through it can fall below.

#include "turbo/trellis-impl.h"

#include <assert.h>
#include <stdlib.h>

#define N_STATES    TRELLIS_N_STATES
#define UNREACHABLE (1 << 29)

_Static_assert((int64_t) QK_TRELLIS * TRELLIS_RMS_MAX * TRELLIS_RMS_MAX <= INT32_MAX, "TRELLIS_RMS_MAX is too large");
// Every state can be reached from every other in three steps, so costs of states differ by three branches at most; a segment adds as many
// as it has stations, and SIMD takes the smallest off after each.
_Static_assert((3 + TRELLIS_SEGMENT) * TRELLIS_COST_MAX <= UINT16_MAX, "TRELLIS_COST_MAX is too large");
_Static_assert(TRELLIS_DISTANCE_MAX * TRELLIS_DISTANCE_MAX <= UINT16_MAX, "TRELLIS_DISTANCE_MAX is too large");

//
// encoding
//

// A block at one scale
typedef struct {
    int32_t x[QK_TRELLIS];
    int32_t cost[QK_TRELLIS][2][4];  // of each station, codebook and subset: of the nearest level
    int32_t least;                   // what all paths cost at least, and the costs above do not have
} stations;

// How each state came about
typedef struct {
    uint8_t from_high[2][QK_TRELLIS][N_STATES];  // the station before was in the state with the oldest bit set
    uint8_t selector[TRELLIS_N_SEGMENTS][N_STATES];
} decisions;

// Writes the values in the order of stations, infinities as +-FLT_MAX, and the smallest scale to try.
static enum trellis_block_kind prepare_block(const trellis_params * t,
                                             const float *          x,
                                             float *                values,
                                             int *                  first_scale) {
    uint32_t max = 0;
    for (int n = 0; n < QK_TRELLIS; ++n) {
        const uint32_t bits      = turbo_bits_of(x[trellis_value_at(n)]);
        const uint32_t magnitude = bits & 0x7fffffff;
        max                      = magnitude > max ? magnitude : max;
        values[n] =
            turbo_float_of((magnitude < TURBO_FLT_MAX_BITS ? magnitude : TURBO_FLT_MAX_BITS) | (bits & 0x80000000));
    }
    const enum trellis_block_kind kind = trellis_kind_of_block(max);
    if (kind == TRELLIS_BLOCK_ORDINARY) {
        const float amax   = turbo_float_of(max < TURBO_FLT_MAX_BITS ? max : TURBO_FLT_MAX_BITS);
        const float to_rms = (float) TRELLIS_RMS_MAX / amax;
        int32_t     sum    = 0;
        for (int n = 0; n < QK_TRELLIS; ++n) {
            const int32_t i = (int32_t) rintf(fabsf(values[n]) * to_rms);
            sum += i * i;
        }
        *first_scale = trellis_first_scale(t, amax, sum);
    }
    return kind;
}

static int nearest_level(const trellis_params * t, int book, int subset, int32_t x, int32_t * distance) {
    int best  = subset;
    *distance = INT32_MAX;
    for (int level = subset; level < trellis_levels(t); level += 4) {
        const int32_t other = abs(x - t->x_steps * t->codebooks[book][level]);
        if (other < *distance) {  // the first of equals stays
            *distance = other;
            best      = level;
        }
    }
    return best;
}

static int32_t at_most(int32_t x, int32_t limit) {
    return x < limit ? x : limit;
}

static void measure_stations(const trellis_params * t, const float * x, float d, stations * s) {
    const float limit   = (float) TRELLIS_X_MAX;
    const float inverse = t->x_scale / d;
    s->least            = 0;
    for (int n = 0; n < QK_TRELLIS; ++n) {
        const float scaled = x[n] * inverse;
        s->x[n]            = (int32_t) rintf(scaled < -limit ? -limit : scaled > limit ? limit : scaled);

        int32_t   least = INT32_MAX;
        int32_t * cost  = s->cost[n][0];
        for (int i = 0; i < 8; ++i) {
            nearest_level(t, i / 4, i % 4, s->x[n], &cost[i]);
            cost[i] = at_most(cost[i], TRELLIS_DISTANCE_MAX);
            cost[i] *= cost[i];
            least = at_most(cost[i], least);
        }
        for (int i = 0; i < 8; ++i) {
            cost[i] = at_most(cost[i] - least, TRELLIS_COST_MAX);
        }
        s->least += least;
    }
}

// One lap: from the costs of the first states to those of the last. how: may be NULL
static void run_lap(const stations * s, int32_t * cost, decisions * how) {
    for (int segment = 0; segment < TRELLIS_N_SEGMENTS; ++segment) {
        int32_t end[2][N_STATES];
        for (int book = 0; book < 2; ++book) {
            int32_t m[N_STATES];
            memcpy(m, cost, sizeof(m));
            for (int n = segment * TRELLIS_SEGMENT; n < (segment + 1) * TRELLIS_SEGMENT; ++n) {
                for (int state = 0; state < N_STATES; ++state) {
                    const int     before = state >> 1;
                    const int32_t low    = m[before] + s->cost[n][book][trellis_subset(before, state & 1)];
                    const int     above  = before | N_STATES / 2;
                    const int32_t high   = m[above] + s->cost[n][book][trellis_subset(above, state & 1)];
                    end[book][state]     = high < low ? high : low;
                    if (how) {
                        how->from_high[book][n][state] = high < low;
                    }
                }
                memcpy(m, end[book], sizeof(m));
            }
        }
        for (int state = 0; state < N_STATES; ++state) {
            const bool coarse = end[1][state] < end[0][state];
            cost[state]       = end[coarse][state];
            if (how) {
                how->selector[segment][state] = coarse;
            }
        }
    }
}

static int32_t run_closed_lap(const stations * s, int first, decisions * how) {
    int32_t cost[N_STATES];
    for (int state = 0; state < N_STATES; ++state) {
        cost[state] = state == first ? 0 : UNREACHABLE;
    }
    run_lap(s, cost, how);
    return s->least + cost[first];
}

static trellis_path trace_back(const trellis_params * t, const stations * s, const decisions * how, int last) {
    trellis_path path = {
        0, 0, { 0, 0 },
          0
    };
    int state = last;
    for (int segment = TRELLIS_N_SEGMENTS - 1; segment >= 0; --segment) {
        const int       book = how->selector[segment][state];
        trellis_segment bits = { 0, 0, 0, 0 };
        for (int j = TRELLIS_SEGMENT - 1; j >= 0; --j) {
            const int n      = segment * TRELLIS_SEGMENT + j;
            const int bit    = state & 1;
            const int before = state >> 1 | (how->from_high[book][n][state] ? N_STATES / 2 : 0);
            int32_t   distance;
            const int level = nearest_level(t, book, trellis_subset(before, bit), s->x[n], &distance);
            trellis_add_station(&bits, t->bits, j, bit, level >> 2);
            state = before;
        }
        trellis_add_segment(&path, segment, book, &bits);
    }
    return path;
}

// A block at all scales to try
typedef struct {
    stations at[TRELLIS_N_SCALES];
    float    squared[TRELLIS_N_SCALES];  // scales
    float    bound[TRELLIS_N_SCALES]
               [N_STATES];  // what no closed path through a last state falls below; infinity when that path is known
} scales_to_try;

typedef struct {
    float     error;
    int       scale;
    int32_t   cost;
    int       state;
    decisions how;
} closed_path;

static void measure_scales(const trellis_params * t, const float * values, int first_scale, scales_to_try * s) {
    for (int i = 0; i < TRELLIS_N_SCALES; ++i) {
        const float d = trellis_scale_of((uint8_t) (first_scale + i));
        s->squared[i] = d * d;
        measure_stations(t, values, d, &s->at[i]);
        int32_t cost[N_STATES] = { 0 };
        run_lap(&s->at[i], cost, NULL);
        for (int state = 0; state < N_STATES; ++state) {
            s->bound[i][state] = (float) (s->at[i].least + cost[state]) * s->squared[i];
        }
    }
}

// Of closed paths with equal errors in binary32 the one of the smallest scale is taken, then the one of the smallest sum, and then the one of
// the smallest first state. Where paths meet, the one over the lower state stays, and the fine codebook.
static bool is_better(const closed_path * path, const closed_path * best) {
    return path->error != best->error ? path->error < best->error :
           path->scale != best->scale ? path->scale < best->scale :
           path->cost != best->cost   ? path->cost < best->cost :
                                        path->state < best->state;
}

// The path with the smallest error: those with the lowest bounds are run first, until no bound is below the error.
static void find_best_path(scales_to_try * s, closed_path * best) {
    best->error = INFINITY;
    best->scale = 0;
    best->cost  = 0;
    best->state = 0;
    for (;;) {
        closed_path other;
        other.scale = 0;
        other.state = 0;
        for (int i = 0; i < TRELLIS_N_SCALES * N_STATES; ++i) {
            if (s->bound[i / N_STATES][i % N_STATES] < s->bound[other.scale][other.state]) {
                other.scale = i / N_STATES;
                other.state = i % N_STATES;
            }
        }
        float * bound = &s->bound[other.scale][other.state];
        if (!(*bound <= best->error) || isinf(*bound)) {
            return;
        }
        *bound = INFINITY;

        other.cost  = run_closed_lap(&s->at[other.scale], other.state, &other.how);
        other.error = (float) other.cost * s->squared[other.scale];
        if (is_better(&other, best)) {
            *best = other;
        }
    }
}

static void trellis_encode_block(const trellis_params * t, const float * x, void * block) {
    uint8_t * bytes = (uint8_t *) block;
    float     values[QK_TRELLIS];
    int       first_scale = 0;

    const enum trellis_block_kind kind = prepare_block(t, x, values, &first_scale);
    if (kind != TRELLIS_BLOCK_ORDINARY) {
        memset(bytes, 0, trellis_block_bytes(t));
        bytes[0] = kind == TRELLIS_BLOCK_NAN ? TRELLIS_SCALE_NAN : 0;
        return;
    }

    scales_to_try s;
    closed_path   best;
    measure_scales(t, values, first_scale, &s);
    find_best_path(&s, &best);

    const trellis_path path = trace_back(t, &s.at[best.scale], &best.how, best.state);
    trellis_pack_block(t->bits, first_scale + best.scale, &path, block);
}

static const trellis_params * params_of(enum ggml_type type) {
    switch (type) {
#define PARAMS_CASE(ENUM, NAME, C_NAME, FAMILY, BITS)                        \
    case GGML_TYPE_##ENUM:                                                   \
        {                                                                    \
            static const trellis_params params = TRELLIS_PARAMS(ENUM, BITS); \
            return &params;                                                  \
        }
        GGML_TURBO_TRELLIS_TYPES_X(PARAMS_CASE)
        default:
            assert(!"no trellis type");
            return NULL;
    }
}

void ggml_turbo_quantize_row_trellis(enum ggml_type              type,
                                     const float * GGML_RESTRICT x,
                                     void * GGML_RESTRICT        y,
                                     int64_t                     k) {
    assert(k % QK_TRELLIS == 0);

    const trellis_params * t = params_of(type);
    for (int64_t ib = 0; ib < k / QK_TRELLIS; ++ib) {
        trellis_encode_block(t, x + ib * QK_TRELLIS, (char *) y + (size_t) ib * trellis_block_bytes(t));
    }
}

//
// unpacking
//

static void trellis_dequantize_row(const trellis_params * t, const void * x, float * y, int64_t k) {
    assert(k % QK_TRELLIS == 0);

    const uint8_t * block = (const uint8_t *) x;
    for (int64_t ib = 0; ib < k / QK_TRELLIS; ++ib, block += trellis_block_bytes(t), y += QK_TRELLIS) {
        int8_t levels[QK_TRELLIS];
        trellis_unpack_levels(t, block, levels);
        const float d = trellis_scale_of(block[0]) / (float) TRELLIS_LEVEL_STEPS;
        for (int i = 0; i < QK_TRELLIS; ++i) {
            y[i] = d * (float) levels[i];
        }
    }
}

#define DEFINE_ROWS(ENUM, NAME, C_NAME, FAMILY, BITS)                                                              \
    void quantize_row_##C_NAME##_ref(const float * GGML_RESTRICT x, block_##C_NAME * GGML_RESTRICT y, int64_t k) { \
        ggml_turbo_quantize_row_trellis(GGML_TYPE_##ENUM, x, y, k);                                                \
    }                                                                                                              \
                                                                                                                   \
    void dequantize_row_##C_NAME(const block_##C_NAME * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {     \
        trellis_dequantize_row(params_of(GGML_TYPE_##ENUM), x, y, k);                                              \
    }
GGML_TURBO_TRELLIS_TYPES_X(DEFINE_ROWS)
