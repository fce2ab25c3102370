// Reference encoder and decoder of the turbo types: the judge of the numpy, SIMD and GPU versions, which store the same bits.
//
// The encoder works on integers, so that "the same bits" does not depend on compiler flags: each block is scaled to
// t = round(|x| * SCALAR_T_MAX / max|x|), and the thresholds of every step that the search tries are then constants. What is left in
// binary32 are single multiplications, divisions and one square root, never a product that is added to something: there is
// nothing to contract into an FMA and no sum whose order matters.

#include "ggml-impl.h"
#include "ggml-turbo-impl.h"
#include "ggml-turbo-trellis.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_MAGNITUDES 8
#define N_STEPS        4

typedef struct {
    int     n;  // magnitudes: half of the codebook
    int16_t magnitudes[MAX_MAGNITUDES];
    int16_t thresholds[N_STEPS][MAX_MAGNITUDES - 1];
    int16_t plain[MAX_MAGNITUDES - 1];
} turbo_codec;

_Static_assert(TURBO2_0_N_STEPS == N_STEPS && TURBO3_0_N_STEPS == N_STEPS && TURBO4_0_N_STEPS == N_STEPS, "steps to try");
// sums of 32 products of t and t, or of t and a magnitude (at most 127), stay below 2^31
_Static_assert((int64_t) QK_SCALAR * SCALAR_T_MAX * SCALAR_T_MAX <= INT32_MAX, "SCALAR_T_MAX is too large");

static const turbo_codec codec2 = { 2, { TURBO2_0_MAGNITUDES }, { TURBO2_0_THRESHOLDS }, { TURBO2_0_PLAIN } };
static const turbo_codec codec3 = { 4, { TURBO3_0_MAGNITUDES }, { TURBO3_0_THRESHOLDS }, { TURBO3_0_PLAIN } };
static const turbo_codec codec4 = { 8, { TURBO4_0_MAGNITUDES }, { TURBO4_0_THRESHOLDS }, { TURBO4_0_PLAIN } };

static const int8_t codebook2[4]  = { TURBO2_0_CODEBOOK };
static const int8_t codebook3[8]  = { TURBO3_0_CODEBOOK };
static const int8_t codebook4[16] = { TURBO4_0_CODEBOOK };

//
// scale rule of the process
//

#define SCALE_UNSET (-1)

static int g_scale = SCALE_UNSET;

#if defined(__GNUC__) || defined(__clang__)
static int scale_load(void) {
    return __atomic_load_n(&g_scale, __ATOMIC_RELAXED);
}

static void scale_store(int scale) {
    __atomic_store_n(&g_scale, scale, __ATOMIC_RELAXED);
}

// a value set by ggml_turbo_set_scale in the meantime wins
static void scale_store_first(int scale) {
    int expected = SCALE_UNSET;
    __atomic_compare_exchange_n(&g_scale, &expected, scale, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#else
#    include <intrin.h>

static int scale_load(void) {
    return *(volatile int *) &g_scale;
}

static void scale_store(int scale) {
    *(volatile int *) &g_scale = scale;
}

static void scale_store_first(int scale) {
    _InterlockedCompareExchange((volatile long *) &g_scale, scale, SCALE_UNSET);
}
#endif

static enum ggml_turbo_scale scale_from_environment(void) {
    const char * name = getenv("TURBO_SCALE");
    if (name == NULL || strcmp(name, "matched") == 0) {
        return GGML_TURBO_SCALE_MATCHED_NORM;
    }
    if (strcmp(name, "ls") == 0) {
        return GGML_TURBO_SCALE_LEAST_SQUARES;
    }
    if (strcmp(name, "ip") == 0) {
        return GGML_TURBO_SCALE_INNER_PRODUCT;
    }
    fprintf(stderr, "TURBO_SCALE=%s is not one of ls, matched, ip: using matched\n", name);
    return GGML_TURBO_SCALE_MATCHED_NORM;
}

void ggml_turbo_set_scale(enum ggml_turbo_scale scale) {
    scale_store((int) scale);
}

enum ggml_turbo_scale ggml_turbo_get_scale(void) {
    if (scale_load() == SCALE_UNSET) {
        scale_store_first((int) scale_from_environment());
    }
    return (enum ggml_turbo_scale) scale_load();
}

//
// encoder
//

// A block as integers: |x[i]| is about t[i] * unit.
typedef struct {
    int32_t  t[QK_SCALAR];
    uint32_t negative;  // bit i: sign bit of x[i]
    float    unit;
    bool     is_nan;
    bool     is_zero;
} turbo_ints;

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    return u;
}

static float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

// Magnitudes are compared as integers: the order of the bit patterns is that of the numbers, NaN comes last.
static void block_to_ints(const float * x, turbo_ints * b) {
    const uint32_t max_finite = 0x7f7fffff;
    const uint32_t infinity   = 0x7f800000;

    uint32_t max = 0;
    b->negative  = 0;
    for (int i = 0; i < QK_SCALAR; ++i) {
        const uint32_t u = bits_of(x[i]);
        const uint32_t a = u & 0x7fffffff;
        max              = a > max ? a : max;
        b->negative |= (u >> 31) << i;
    }

    b->is_nan        = max > infinity;
    const float amax = float_of(max < max_finite ? max : max_finite);
    b->is_zero       = amax < SCALAR_AMAX_MIN;
    if (b->is_nan || b->is_zero) {
        return;
    }

    b->unit           = amax / (float) SCALAR_T_MAX;
    const float scale = (float) SCALAR_T_MAX / amax;
    for (int i = 0; i < QK_SCALAR; ++i) {
        const uint32_t a = bits_of(x[i]) & 0x7fffffff;
        b->t[i]          = (int32_t) rintf(float_of(a < max_finite ? a : max_finite) * scale);
    }
}

static int magnitude_index(const int16_t * thresholds, int n, int32_t t) {
    int m = 0;
    for (int k = 0; k < n - 1; ++k) {
        m += t > thresholds[k];
    }
    return m;
}

typedef struct {
    int32_t tc;  // <t,c>, c: magnitudes chosen for t
    int32_t cc;  // |c|^2
} turbo_fit;

static turbo_fit fit_step(const turbo_codec * codec, const int16_t * thresholds, const int32_t * t) {
    turbo_fit fit = { 0, 0 };
    for (int i = 0; i < QK_SCALAR; ++i) {
        const int32_t c = codec->magnitudes[magnitude_index(thresholds, codec->n, t[i])];
        fit.tc += t[i] * c;
        fit.cc += c * c;
    }
    return fit;
}

// <t,c>^2 / |c|^2: what the best scale takes off the squared error
static float fit_gain(turbo_fit fit) {
    return (float) fit.tc * (float) fit.tc / (float) fit.cc;
}

static const int16_t * best_thresholds(const turbo_codec * codec, bool search, const int32_t * t, turbo_fit * best) {
    if (!search) {
        *best = fit_step(codec, codec->plain, t);
        return codec->plain;
    }
    int best_step = 0;
    *best         = fit_step(codec, codec->thresholds[0], t);
    for (int step = 1; step < N_STEPS; ++step) {
        const turbo_fit fit = fit_step(codec, codec->thresholds[step], t);
        if (fit_gain(fit) > fit_gain(*best)) {  // the first of equals stays
            *best     = fit;
            best_step = step;
        }
    }
    return codec->thresholds[best_step];
}

static int32_t sum_of_squares(const int32_t * t) {
    int32_t sum = 0;
    for (int i = 0; i < QK_SCALAR; ++i) {
        sum += t[i] * t[i];
    }
    return sum;
}

// Writes the index of each value; returns d, with the indices all 0 where d is 0 or NaN.
static ggml_fp16_t encode_block(const turbo_codec *   codec,
                                enum ggml_turbo_scale scale,
                                bool                  search,
                                const float *         x,
                                uint8_t *             index) {
    turbo_ints b;
    block_to_ints(x, &b);
    memset(index, 0, QK_SCALAR);
    if (b.is_nan) {
        return SCALAR_HALF_NAN;
    }
    if (b.is_zero) {
        return 0;
    }

    turbo_fit       fit;
    const int16_t * thresholds = best_thresholds(codec, search, b.t, &fit);

    const float       d    = turbo_block_scale(scale, fit.tc, fit.cc, sum_of_squares(b.t), b.unit);
    const ggml_fp16_t half = GGML_FP32_TO_FP16(d);
    if (half == 0) {
        return 0;
    }
    for (int i = 0; i < QK_SCALAR; ++i) {
        const int m = magnitude_index(thresholds, codec->n, b.t[i]);
        index[i]    = (uint8_t) ((b.negative >> i & 1) ? codec->n - 1 - m : codec->n + m);
    }
    return half;
}

static void pack_2bit(const uint8_t * index, uint8_t * qs) {
    for (int j = 0; j < QK_SCALAR / 4; ++j) {
        qs[j] =
            (uint8_t) ((index[j] & 3) | (index[j + 8] & 3) << 2 | (index[j + 16] & 3) << 4 | (index[j + 24] & 3) << 6);
    }
}

static void pack_signs(const uint8_t * index, uint8_t * signs) {
    memset(signs, 0, QK_SCALAR / 8);
    for (int i = 0; i < QK_SCALAR; ++i) {
        signs[i % 4] |= (uint8_t) ((index[i] >> 2) << (i / 4));
    }
}

static void pack_4bit(const uint8_t * index, uint8_t * qs) {
    for (int j = 0; j < QK_SCALAR / 2; ++j) {
        qs[j] = (uint8_t) (index[j] | index[j + 16] << 4);
    }
}

void ggml_turbo_quantize_row(enum ggml_type              type,
                             enum ggml_turbo_scale       scale,
                             bool                        search,
                             const float * GGML_RESTRICT x,
                             void * GGML_RESTRICT        y,
                             int64_t                     k) {
    assert(ggml_is_turbo(type) && !ggml_turbo_is_trellis(type));
    assert(k % QK_SCALAR == 0);

    uint8_t index[QK_SCALAR];
    for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {
        const float * xb = x + ib * QK_SCALAR;
        if (type == GGML_TYPE_TURBO2_0) {
            block_turbo2_0 * block = (block_turbo2_0 *) y + ib;
            block->d               = encode_block(&codec2, scale, search, xb, index);
            pack_2bit(index, block->qs);
        } else if (type == GGML_TYPE_TURBO3_0) {
            block_turbo3_0 * block = (block_turbo3_0 *) y + ib;
            block->d               = encode_block(&codec3, scale, search, xb, index);
            pack_2bit(index, block->qs);
            pack_signs(index, block->signs);
        } else {
            block_turbo4_0 * block = (block_turbo4_0 *) y + ib;
            block->d               = encode_block(&codec4, scale, search, xb, index);
            pack_4bit(index, block->qs);
        }
    }
}

void quantize_row_turbo2_0_ref(const float * GGML_RESTRICT x, block_turbo2_0 * GGML_RESTRICT y, int64_t k) {
    ggml_turbo_quantize_row(GGML_TYPE_TURBO2_0, ggml_turbo_get_scale(), true, x, y, k);
}

void quantize_row_turbo3_0_ref(const float * GGML_RESTRICT x, block_turbo3_0 * GGML_RESTRICT y, int64_t k) {
    ggml_turbo_quantize_row(GGML_TYPE_TURBO3_0, ggml_turbo_get_scale(), true, x, y, k);
}

void quantize_row_turbo4_0_ref(const float * GGML_RESTRICT x, block_turbo4_0 * GGML_RESTRICT y, int64_t k) {
    ggml_turbo_quantize_row(GGML_TYPE_TURBO4_0, ggml_turbo_get_scale(), true, x, y, k);
}

//
// decoder
//

static int index_2bit(const uint8_t * qs, int i) {
    return qs[i % 8] >> 2 * (i / 8) & 3;
}

static int index_3bit(const block_turbo3_0 * block, int i) {
    return index_2bit(block->qs, i) | (block->signs[i % 4] >> (i / 4) & 1) << 2;
}

void dequantize_row_turbo2_0(const block_turbo2_0 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_SCALAR == 0);
    for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {
        const float d = GGML_FP16_TO_FP32(x[ib].d);
        for (int i = 0; i < QK_SCALAR; ++i) {
            y[ib * QK_SCALAR + i] = d * (float) codebook2[index_2bit(x[ib].qs, i)];
        }
    }
}

void dequantize_row_turbo3_0(const block_turbo3_0 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_SCALAR == 0);
    for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {
        const float d = GGML_FP16_TO_FP32(x[ib].d);
        for (int i = 0; i < QK_SCALAR; ++i) {
            y[ib * QK_SCALAR + i] = d * (float) codebook3[index_3bit(x + ib, i)];
        }
    }
}

void dequantize_row_turbo4_0(const block_turbo4_0 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_SCALAR == 0);
    for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {
        const float d = GGML_FP16_TO_FP32(x[ib].d);
        for (int j = 0; j < QK_SCALAR / 2; ++j) {
            y[ib * QK_SCALAR + j]                = d * (float) codebook4[x[ib].qs[j] & 15];
            y[ib * QK_SCALAR + j + QK_SCALAR / 2] = d * (float) codebook4[x[ib].qs[j] >> 4];
        }
    }
}

//
// decay
//

bool ggml_turbo_decays(enum ggml_type type) {
    return type == GGML_TYPE_TURBO3_0 || type == GGML_TYPE_TURBO4_0;
}

static bool is_finite(ggml_fp16_t half) {
    return (half & 0x7c00) != 0x7c00;
}

// Replaces the index of each value; returns the d that fits them, from the one so far. The levels so far are the integers of the block and
// d is their unit. A block that has decayed already keeps its d: all three sums are equal, and so are all quotients 1.
static ggml_fp16_t decay_block(const int8_t *        codebook,
                               int                   n,  // magnitudes
                               enum ggml_turbo_scale scale,
                               ggml_fp16_t           d,
                               uint8_t *             index) {
    int32_t tc = 0;
    int32_t cc = 0;
    int32_t tt = 0;
    for (int i = 0; i < QK_SCALAR; ++i) {
        const int32_t t = codebook[index[i]];
        index[i]        = (uint8_t) ((index[i] & ~1) | (index[i] >= n));
        const int32_t c = codebook[index[i]];
        tc += t * c;
        cc += c * c;
        tt += t * t;
    }
    return GGML_FP32_TO_FP16(turbo_block_scale(scale, tc, cc, tt, GGML_FP16_TO_FP32(d)));
}

static void decay_turbo3(enum ggml_turbo_scale scale, block_turbo3_0 * block) {
    uint8_t index[QK_SCALAR];
    for (int i = 0; i < QK_SCALAR; ++i) {
        index[i] = (uint8_t) index_3bit(block, i);
    }
    block->d = decay_block(codebook3, codec3.n, scale, block->d, index);
    pack_2bit(index, block->qs);
}

static void decay_turbo4(enum ggml_turbo_scale scale, block_turbo4_0 * block) {
    uint8_t index[QK_SCALAR];
    for (int j = 0; j < QK_SCALAR / 2; ++j) {
        index[j]                = block->qs[j] & 15;
        index[j + QK_SCALAR / 2] = block->qs[j] >> 4;
    }
    block->d = decay_block(codebook4, codec4.n, scale, block->d, index);
    pack_4bit(index, block->qs);
}

void ggml_turbo_decay_row(enum ggml_type type, enum ggml_turbo_scale scale, void * y, int64_t k) {
    assert(ggml_turbo_decays(type));
    assert(k % QK_SCALAR == 0);

    for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {
        if (type == GGML_TYPE_TURBO3_0) {
            block_turbo3_0 * block = (block_turbo3_0 *) y + ib;
            if (is_finite(block->d)) {
                decay_turbo3(scale, block);
            }
        } else {
            block_turbo4_0 * block = (block_turbo4_0 *) y + ib;
            if (is_finite(block->d)) {
                decay_turbo4(scale, block);
            }
        }
    }
}

//
// whole tensors
//

static size_t block_bytes(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_TURBO2_0:
            return sizeof(block_turbo2_0);
        case GGML_TYPE_TURBO3_0:
            return sizeof(block_turbo3_0);
        case GGML_TYPE_TURBO4_0:
            return sizeof(block_turbo4_0);
        case GGML_TYPE_TURBO2_T:
            return sizeof(block_turbo2_t);
        case GGML_TYPE_TURBO3_T:
            return sizeof(block_turbo3_t);
        case GGML_TYPE_TURBO4_T:
            return sizeof(block_turbo4_t);
        default:
            return 0;
    }
}

// A row is a whole number of blocks and blocks do not depend on each other, so the rows are encoded as one.
size_t ggml_turbo_quantize(enum ggml_type              type,
                           const float * GGML_RESTRICT src,
                           void * GGML_RESTRICT        dst,
                           int64_t                     nrows,
                           int64_t                     n_per_row) {
    if (ggml_turbo_is_trellis(type)) {
        assert(n_per_row % QK_TRELLIS == 0);
        ggml_turbo_quantize_row_trellis(type, src, dst, nrows * n_per_row);
        return (size_t) (nrows * n_per_row / QK_TRELLIS) * block_bytes(type);
    }
    assert(n_per_row % QK_SCALAR == 0);
    ggml_turbo_quantize_row(type, ggml_turbo_get_scale(), true, src, dst, nrows * n_per_row);
    return (size_t) (nrows * n_per_row / QK_SCALAR) * block_bytes(type);
}

// Whether the scale that a block starts with is neither infinite nor NaN: whether not all bits of its exponent are set
static bool has_finite_scale(enum ggml_type type, const void * block) {
    if (ggml_turbo_is_trellis(type)) {
        return *(const uint8_t *) block <= TRELLIS_SCALE_MAX;
    }
    ggml_fp16_t d;
    memcpy(&d, block, sizeof(d));
    return is_finite(d);
}

bool ggml_turbo_validate_row(enum ggml_type type, const void * data, size_t nbytes) {
    const size_t size = block_bytes(type);
    if (size == 0 || nbytes % size != 0) {
        fprintf(stderr, "%s: %zu bytes are no whole number of blocks of type %d\n", __func__, nbytes, (int) type);
        return false;
    }
    for (size_t ib = 0; ib < nbytes / size; ++ib) {
        if (!has_finite_scale(type, (const char *) data + ib * size)) {
            fprintf(stderr, "%s: found inf or nan scale at block %zu\n", __func__, ib);
            return false;
        }
    }
    return true;
}
