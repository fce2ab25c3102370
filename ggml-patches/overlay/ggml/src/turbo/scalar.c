// Reference for packing and unpacking blocks of the scalar types: the judge of the numpy, SIMD and GPU versions, which store the same bits.
//
// The encoder works on integers, so that "the same bits" does not depend on compiler flags: each block is scaled to
// t = round(|x| * SCALAR_T_MAX / max|x|), and the thresholds of every step that the search tries are then constants. What is left in
// binary32 are single multiplications, divisions and one square root, never a product that is added to something: there is
// nothing to contract into an FMA and no sum whose order matters.

#include "ggml-impl.h"
#include "turbo/scalar-impl.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define MAX_MAGNITUDES 8
#define N_STEPS        4

typedef struct {
    int     n;  // magnitudes: half of the codebook
    int16_t magnitudes[MAX_MAGNITUDES];
    int16_t thresholds[N_STEPS][MAX_MAGNITUDES - 1];
    int16_t plain[MAX_MAGNITUDES - 1];
} scalar_codec;

#define CHECK_STEPS(ENUM, NAME, C_NAME, FAMILY, BITS) _Static_assert(ENUM##_N_STEPS == N_STEPS, "steps to try");
GGML_TURBO_SCALAR_TYPES_X(CHECK_STEPS)
// sums of 32 products of t and t, or of t and a magnitude (at most 127), stay below 2^31
_Static_assert((int64_t) QK_SCALAR * SCALAR_T_MAX * SCALAR_T_MAX <= INT32_MAX, "SCALAR_T_MAX is too large");

// codec2, codebook2 and so on, by bits
#define DEFINE_CODEC(ENUM, NAME, C_NAME, FAMILY, BITS)                                  \
    static const scalar_codec codec##BITS = {                                           \
        1 << (BITS - 1), { ENUM##_MAGNITUDES }, { ENUM##_THRESHOLDS }, { ENUM##_PLAIN } \
    };                                                                                  \
    static const int8_t codebook##BITS[1 << BITS] = { ENUM##_CODEBOOK };
GGML_TURBO_SCALAR_TYPES_X(DEFINE_CODEC)

//
// encoding
//

// A block as integers: |x[i]| is about t[i] * unit.
typedef struct {
    int32_t  t[QK_SCALAR];
    uint32_t negative;  // bit i: sign bit of x[i]
    float    unit;
    bool     is_nan;
    bool     is_zero;
} scalar_ints;

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
static void scalar_block_to_ints(const float * x, scalar_ints * b) {
    uint32_t max = 0;
    b->negative  = 0;
    for (int i = 0; i < QK_SCALAR; ++i) {
        const uint32_t u = bits_of(x[i]);
        const uint32_t a = u & 0x7fffffff;
        max              = a > max ? a : max;
        b->negative |= (u >> 31) << i;
    }

    b->is_nan        = max > TURBO_INFINITY_BITS;
    const float amax = float_of(max < TURBO_FLT_MAX_BITS ? max : TURBO_FLT_MAX_BITS);
    b->is_zero       = amax < SCALAR_AMAX_MIN;
    if (b->is_nan || b->is_zero) {
        return;
    }

    b->unit           = amax / (float) SCALAR_T_MAX;
    const float scale = (float) SCALAR_T_MAX / amax;
    for (int i = 0; i < QK_SCALAR; ++i) {
        const uint32_t a = bits_of(x[i]) & 0x7fffffff;
        b->t[i]          = (int32_t) rintf(float_of(a < TURBO_FLT_MAX_BITS ? a : TURBO_FLT_MAX_BITS) * scale);
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
} scalar_fit;

static scalar_fit fit_step(const scalar_codec * codec, const int16_t * thresholds, const int32_t * t) {
    scalar_fit fit = { 0, 0 };
    for (int i = 0; i < QK_SCALAR; ++i) {
        const int32_t c = codec->magnitudes[magnitude_index(thresholds, codec->n, t[i])];
        fit.tc += t[i] * c;
        fit.cc += c * c;
    }
    return fit;
}

// <t,c>^2 / |c|^2: what the best scale takes off the squared error
static float fit_gain(scalar_fit fit) {
    return (float) fit.tc * (float) fit.tc / (float) fit.cc;
}

static const int16_t * best_thresholds(const scalar_codec * codec, bool search, const int32_t * t, scalar_fit * best) {
    if (!search) {
        *best = fit_step(codec, codec->plain, t);
        return codec->plain;
    }
    int best_step = 0;
    *best         = fit_step(codec, codec->thresholds[0], t);
    for (int step = 1; step < N_STEPS; ++step) {
        const scalar_fit fit = fit_step(codec, codec->thresholds[step], t);
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
static ggml_fp16_t scalar_encode_block(const scalar_codec *  codec,
                                       enum ggml_turbo_scale scale,
                                       bool                  search,
                                       const float *         x,
                                       uint8_t *             index) {
    scalar_ints b;
    scalar_block_to_ints(x, &b);
    memset(index, 0, QK_SCALAR);
    if (b.is_nan) {
        return SCALAR_HALF_NAN;
    }
    if (b.is_zero) {
        return 0;
    }

    scalar_fit      fit;
    const int16_t * thresholds = best_thresholds(codec, search, b.t, &fit);

    const float       d    = scalar_block_scale(scale, fit.tc, fit.cc, sum_of_squares(b.t), b.unit);
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

static void encode_turbo2(enum ggml_turbo_scale scale, bool search, const float * x, block_turbo2_0 * block) {
    uint8_t index[QK_SCALAR];
    block->d = scalar_encode_block(&codec2, scale, search, x, index);
    pack_2bit(index, block->qs);
}

static void encode_turbo3(enum ggml_turbo_scale scale, bool search, const float * x, block_turbo3_0 * block) {
    uint8_t index[QK_SCALAR];
    block->d = scalar_encode_block(&codec3, scale, search, x, index);
    pack_2bit(index, block->qs);
    pack_signs(index, block->signs);
}

static void encode_turbo4(enum ggml_turbo_scale scale, bool search, const float * x, block_turbo4_0 * block) {
    uint8_t index[QK_SCALAR];
    block->d = scalar_encode_block(&codec4, scale, search, x, index);
    pack_4bit(index, block->qs);
}

void ggml_turbo_quantize_row_scalar(enum ggml_type              type,
                                    enum ggml_turbo_scale       scale,
                                    bool                        search,
                                    const float * GGML_RESTRICT x,
                                    void * GGML_RESTRICT        y,
                                    int64_t                     k) {
    assert(k % QK_SCALAR == 0);

    const int64_t n_blocks = k / QK_SCALAR;
    switch (type) {
#define ENCODE_ROW(ENUM, NAME, C_NAME, FAMILY, BITS)                                     \
    case GGML_TYPE_##ENUM:                                                               \
        for (int64_t ib = 0; ib < n_blocks; ++ib) {                                      \
            encode_##NAME(scale, search, x + ib * QK_SCALAR, (block_##C_NAME *) y + ib); \
        }                                                                                \
        break;
        GGML_TURBO_SCALAR_TYPES_X(ENCODE_ROW)
        default:
            assert(!"no scalar type");
    }
}

#define DEFINE_QUANTIZE(ENUM, NAME, C_NAME, FAMILY, BITS)                                                          \
    void quantize_row_##C_NAME##_ref(const float * GGML_RESTRICT x, block_##C_NAME * GGML_RESTRICT y, int64_t k) { \
        ggml_turbo_quantize_row_scalar(GGML_TYPE_##ENUM, ggml_turbo_get_scale(), true, x, y, k);                   \
    }
GGML_TURBO_SCALAR_TYPES_X(DEFINE_QUANTIZE)

//
// unpacking
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
            y[ib * QK_SCALAR + j]                 = d * (float) codebook4[x[ib].qs[j] & 15];
            y[ib * QK_SCALAR + j + QK_SCALAR / 2] = d * (float) codebook4[x[ib].qs[j] >> 4];
        }
    }
}

//
// decay
//

// Replaces the index of each value; returns the d that fits them, from the one so far. The levels so far are the integers of the block and
// d is their unit. A block that has decayed already keeps its d: all three sums are equal, and so are all quotients 1.
static ggml_fp16_t scalar_decay_block(const int8_t *        codebook,
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
    return GGML_FP32_TO_FP16(scalar_block_scale(scale, tc, cc, tt, GGML_FP16_TO_FP32(d)));
}

static void decay_turbo3(enum ggml_turbo_scale scale, block_turbo3_0 * block) {
    uint8_t index[QK_SCALAR];
    for (int i = 0; i < QK_SCALAR; ++i) {
        index[i] = (uint8_t) index_3bit(block, i);
    }
    block->d = scalar_decay_block(codebook3, codec3.n, scale, block->d, index);
    pack_2bit(index, block->qs);
}

static void decay_turbo4(enum ggml_turbo_scale scale, block_turbo4_0 * block) {
    uint8_t index[QK_SCALAR];
    for (int j = 0; j < QK_SCALAR / 2; ++j) {
        index[j]                 = block->qs[j] & 15;
        index[j + QK_SCALAR / 2] = block->qs[j] >> 4;
    }
    block->d = scalar_decay_block(codebook4, codec4.n, scale, block->d, index);
    pack_4bit(index, block->qs);
}

void ggml_turbo_decay_row(enum ggml_type type, enum ggml_turbo_scale scale, void * y, int64_t k) {
    assert(ggml_turbo_decays(type));
    assert(k % QK_SCALAR == 0);

    for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {
        if (type == GGML_TYPE_TURBO3_0) {
            block_turbo3_0 * block = (block_turbo3_0 *) y + ib;
            if (scalar_is_finite(block->d)) {
                decay_turbo3(scale, block);
            }
        } else {
            block_turbo4_0 * block = (block_turbo4_0 *) y + ib;
            if (scalar_is_finite(block->d)) {
                decay_turbo4(scale, block);
            }
        }
    }
}
