// Reference encoder and decoder of the trellis types: the judge of the numpy, SIMD and GPU versions, which store the same bits.
//
// For each scale to try, Viterbi's algorithm finds the path with the smallest sum of squared errors, as integers that are cut so that SIMD
// can do with 16 bits. In each segment it goes through both codebooks from the same states, and every state keeps the cheaper one. A closed
// path has to end in the state that it starts from: the exact way is one run for each state to start from. Most of them are not needed: a
// run from all states at once tells for each last state what no closed path through it can fall below.

#include "ggml-turbo-trellis-impl.h"

#include <assert.h>
#include <stdlib.h>

#define N_STATES    TRELLIS_N_STATES
#define UNREACHABLE (1 << 29)

static const turbo_trellis trellis2 = {
    2,
    TURBO2_T_REACH,
    TURBO2_T_X_STEPS,
    TURBO2_T_X_SCALE,
    { { TURBO2_T_FINE }, { TURBO2_T_COARSE } }
};
static const turbo_trellis trellis3 = {
    3,
    TURBO3_T_REACH,
    TURBO3_T_X_STEPS,
    TURBO3_T_X_SCALE,
    { { TURBO3_T_FINE }, { TURBO3_T_COARSE } }
};
static const turbo_trellis trellis4 = {
    4,
    TURBO4_T_REACH,
    TURBO4_T_X_STEPS,
    TURBO4_T_X_SCALE,
    { { TURBO4_T_FINE }, { TURBO4_T_COARSE } }
};

_Static_assert((int64_t) QK_TRELLIS * TRELLIS_RMS_MAX * TRELLIS_RMS_MAX <= INT32_MAX, "TRELLIS_RMS_MAX is too large");
// Every state can be reached from every other in three steps, so costs of states differ by three branches at most; a segment adds as many
// as it has stations, and SIMD takes the smallest off after each.
_Static_assert((3 + TRELLIS_SEGMENT) * TRELLIS_COST_MAX <= UINT16_MAX, "TRELLIS_COST_MAX is too large");
_Static_assert(TRELLIS_DISTANCE_MAX * TRELLIS_DISTANCE_MAX <= UINT16_MAX, "TRELLIS_DISTANCE_MAX is too large");

//
// encoder
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
static enum turbo_block_kind prepare_block(const turbo_trellis * t,
                                           const float *         x,
                                           float *               values,
                                           int *                 first_scale) {
    uint32_t max = 0;
    for (int n = 0; n < QK_TRELLIS; ++n) {
        const uint32_t bits      = turbo_bits_of(x[turbo_value_at(n)]);
        const uint32_t magnitude = bits & 0x7fffffff;
        max                      = magnitude > max ? magnitude : max;
        values[n] = turbo_float_of((magnitude < TURBO_MAX_FINITE ? magnitude : TURBO_MAX_FINITE) | (bits & 0x80000000));
    }
    const enum turbo_block_kind kind = turbo_kind_of_block(max);
    if (kind == TURBO_BLOCK_ORDINARY) {
        const float amax   = turbo_float_of(max < TURBO_MAX_FINITE ? max : TURBO_MAX_FINITE);
        const float to_rms = (float) TRELLIS_RMS_MAX / amax;
        int32_t     sum    = 0;
        for (int n = 0; n < QK_TRELLIS; ++n) {
            const int32_t i = (int32_t) rintf(fabsf(values[n]) * to_rms);
            sum += i * i;
        }
        *first_scale = turbo_first_scale(t, amax, sum);
    }
    return kind;
}

static int nearest_level(const turbo_trellis * t, int book, int subset, int32_t x, int32_t * distance) {
    int best  = subset;
    *distance = INT32_MAX;
    for (int level = subset; level < turbo_levels(t); level += 4) {
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

static void measure_stations(const turbo_trellis * t, const float * x, float d, stations * s) {
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
                    const int32_t low    = m[before] + s->cost[n][book][turbo_subset(before, state & 1)];
                    const int     above  = before | N_STATES / 2;
                    const int32_t high   = m[above] + s->cost[n][book][turbo_subset(above, state & 1)];
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

static turbo_path trace_back(const turbo_trellis * t, const stations * s, const decisions * how, int last) {
    turbo_path path = {
        0, 0, { 0, 0 },
          0
    };
    int state = last;
    for (int segment = TRELLIS_N_SEGMENTS - 1; segment >= 0; --segment) {
        const int     book = how->selector[segment][state];
        turbo_segment bits = { 0, 0, 0, 0 };
        for (int j = TRELLIS_SEGMENT - 1; j >= 0; --j) {
            const int n      = segment * TRELLIS_SEGMENT + j;
            const int bit    = state & 1;
            const int before = state >> 1 | (how->from_high[book][n][state] ? N_STATES / 2 : 0);
            int32_t   distance;
            const int level = nearest_level(t, book, turbo_subset(before, bit), s->x[n], &distance);
            turbo_add_station(&bits, t->bits, j, bit, level >> 2);
            state = before;
        }
        turbo_add_segment(&path, segment, book, &bits);
    }
    return path;
}

// Of closed paths with equal errors in binary32 the one of the smallest scale is taken, then the one of the smallest sum, and then the one of
// the smallest first state. Where paths meet, the one over the lower state stays, and the fine codebook.
static void encode_block(const turbo_trellis * t, const float * x, void * block) {
    uint8_t * bytes = (uint8_t *) block;
    float     values[QK_TRELLIS];
    int       first_scale = 0;
    switch (prepare_block(t, x, values, &first_scale)) {
        case TURBO_BLOCK_NAN:
            memset(bytes, 0, (size_t) (2 + QK_TRELLIS * t->bits / 8));
            bytes[0] = TRELLIS_SCALE_NAN;
            return;
        case TURBO_BLOCK_ZERO:
            memset(bytes, 0, (size_t) (2 + QK_TRELLIS * t->bits / 8));
            return;
        case TURBO_BLOCK_ORDINARY:
            break;
    }

    stations s[TRELLIS_N_SCALES];
    float    bound[TRELLIS_N_SCALES][N_STATES];
    float    squared[TRELLIS_N_SCALES];
    for (int i = 0; i < TRELLIS_N_SCALES; ++i) {
        const float d = turbo_scale_of((uint8_t) (first_scale + i));
        squared[i]    = d * d;
        measure_stations(t, values, d, &s[i]);
        int32_t cost[N_STATES] = { 0 };
        run_lap(&s[i], cost, NULL);
        for (int state = 0; state < N_STATES; ++state) {
            bound[i][state] = (float) (s[i].least + cost[state]) * squared[i];
        }
    }

    struct {
        float     error;
        int       scale;
        int32_t   cost;
        int       state;
        decisions how;
    } best, other;

    best.error = INFINITY;
    best.scale = 0;
    best.cost  = 0;
    best.state = 0;
    for (;;) {
        other.scale = 0;
        other.state = 0;
        for (int i = 0; i < TRELLIS_N_SCALES * N_STATES; ++i) {
            if (bound[i / N_STATES][i % N_STATES] < bound[other.scale][other.state]) {
                other.scale = i / N_STATES;
                other.state = i % N_STATES;
            }
        }
        if (!(bound[other.scale][other.state] <= best.error) || isinf(bound[other.scale][other.state])) {
            break;
        }
        bound[other.scale][other.state] = INFINITY;

        other.cost        = run_closed_lap(&s[other.scale], other.state, &other.how);
        other.error       = (float) other.cost * squared[other.scale];
        const bool better = other.error != best.error ? other.error < best.error :
                            other.scale != best.scale ? other.scale < best.scale :
                            other.cost != best.cost   ? other.cost < best.cost :
                                                        other.state < best.state;
        if (better) {
            best = other;
        }
    }
    const turbo_path path = trace_back(t, &s[best.scale], &best.how, best.state);
    turbo_pack_block(t->bits, first_scale + best.scale, &path, block);
}

static const turbo_trellis * trellis_of(enum ggml_type type) {
    return type == GGML_TYPE_TURBO2_T ? &trellis2 : type == GGML_TYPE_TURBO3_T ? &trellis3 : &trellis4;
}

void ggml_turbo_quantize_row_trellis(enum ggml_type              type,
                                     const float * GGML_RESTRICT x,
                                     void * GGML_RESTRICT        y,
                                     int64_t                     k) {
    assert(ggml_turbo_is_trellis(type));
    assert(k % QK_TRELLIS == 0);

    const turbo_trellis * t = trellis_of(type);
    for (int64_t ib = 0; ib < k / QK_TRELLIS; ++ib) {
        encode_block(t, x + ib * QK_TRELLIS, (char *) y + ib * (2 + QK_TRELLIS * t->bits / 8));
    }
}

void quantize_row_turbo2_t_ref(const float * GGML_RESTRICT x, block_turbo2_t * GGML_RESTRICT y, int64_t k) {
    ggml_turbo_quantize_row_trellis(GGML_TYPE_TURBO2_T, x, y, k);
}

void quantize_row_turbo3_t_ref(const float * GGML_RESTRICT x, block_turbo3_t * GGML_RESTRICT y, int64_t k) {
    ggml_turbo_quantize_row_trellis(GGML_TYPE_TURBO3_T, x, y, k);
}

void quantize_row_turbo4_t_ref(const float * GGML_RESTRICT x, block_turbo4_t * GGML_RESTRICT y, int64_t k) {
    ggml_turbo_quantize_row_trellis(GGML_TYPE_TURBO4_T, x, y, k);
}

//
// decoder
//

static void decode_row(const turbo_trellis * t, const void * x, float * y, int64_t k) {
    assert(k % QK_TRELLIS == 0);

    const uint8_t * block = (const uint8_t *) x;
    for (int64_t ib = 0; ib < k / QK_TRELLIS; ++ib, block += 2 + QK_TRELLIS * t->bits / 8, y += QK_TRELLIS) {
        int8_t levels[QK_TRELLIS];
        turbo_unpack_levels(t, block, levels);
        const float d = turbo_scale_of(block[0]) / (float) TRELLIS_LEVEL_STEPS;
        for (int i = 0; i < QK_TRELLIS; ++i) {
            y[i] = d * (float) levels[i];
        }
    }
}

void dequantize_row_turbo2_t(const block_turbo2_t * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    decode_row(&trellis2, x, y, k);
}

void dequantize_row_turbo3_t(const block_turbo3_t * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    decode_row(&trellis3, x, y, k);
}

void dequantize_row_turbo4_t(const block_turbo4_t * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    decode_row(&trellis4, x, y, k);
}
