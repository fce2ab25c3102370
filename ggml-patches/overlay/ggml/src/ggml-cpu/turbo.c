// Encoding and dot products of the turbo types on the CPU: a portable body, and one over the building blocks of AVX2 or NEON, with equal
// results.
//
// A dot product goes four blocks at a time (one row of head size 128): the integer sums of four blocks meet in one vector, are
// multiplied by the four products of scales and added to four binary64 accumulators. Each product has at most 20 + 22 significant
// bits, so it is exact whether or not the compiler fuses it with the addition.

#include "turbo.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>
#include <string.h>

#if defined(_MSC_VER)
#    define TURBO_INLINE static __forceinline
#else
#    define TURBO_INLINE static inline __attribute__((always_inline))
#endif

#if defined(__AVX2__)
#    include "turbo-avx2.h"
#    define TURBO_SIMD "avx2"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#    include "turbo-neon.h"
#    define TURBO_SIMD "neon"
#endif

_Static_assert(QK_SCALAR == QK8_0, "a turbo block meets one Q8_0 block");

#define N_ACC 4  // block ib of a row is added to accumulator ib % N_ACC

#if defined(TURBO_SIMD)

// What an instruction set has to offer. Vectors hold one byte for each value of a block (turbo_bytes), its integers and signs
// (turbo_ints) or partial sums over it (turbo_sums); turbo_four has a sum of each of four blocks.
//
//     levels_turbo*(block)                      levels of a block
//     dot_levels(levels, y)                     levels times the int8 at y
//     sums_of_four(v)                           the sum of each of four vectors
//     store_four(p, sums)                       to memory
//     add_products(acc, d, sums)                acc[i] += d[i] * sums[i] in binary64
//
//     max_magnitude_bits(x)                     largest |x|, as its bits: NaN comes last
//     block_to_ints(x, scale)                   t = round(|x| * scale) to nearest even, with infinity as the largest number
//     magnitude_indices(thresholds, n, ints)    how many of n - 1 thresholds each t exceeds
//     fit_sums(magnitudes, m, ints, tc, cc)     <t,c> and |c|^2 for the magnitudes c = magnitudes[m]
//     best_of_four(tc, cc)                      which gain <t,c>^2 / |c|^2 is the largest, the first of equals
//     sum_of_squares(ints)                      |t|^2
//     signed_indices(m, n, ints)                indices in the codebook, in the order of the values
//     pack_*(indices, p)                        as they are stored; pack_2bit takes the low two bits

const char * ggml_turbo_cpu_isa(void) {
    return TURBO_SIMD;
}

//
// encoder: the arithmetic of ggml-turbo.c; equal bits are a test
//

#    define N_STEPS 4

_Static_assert(TURBO2_0_N_STEPS == N_STEPS && TURBO3_0_N_STEPS == N_STEPS && TURBO4_0_N_STEPS == N_STEPS, "steps to try");

// Writes d and returns the index of each value. n: magnitudes, half of the codebook; thresholds: n - 1 for each step.
TURBO_INLINE turbo_bytes encode_block(int                   n,
                                      const int8_t *        magnitudes,
                                      const int16_t *       thresholds,
                                      enum ggml_turbo_scale scale,
                                      const float *         x,
                                      ggml_half *           d) {
    const uint32_t max_finite = 0x7f7fffff;
    const uint32_t infinity   = 0x7f800000;

    turbo_bytes zeros;
    memset(&zeros, 0, sizeof(zeros));
    const uint32_t max    = max_magnitude_bits(x);
    const uint32_t finite = max < max_finite ? max : max_finite;
    float          amax;
    memcpy(&amax, &finite, sizeof(amax));
    if (max > infinity || amax < SCALAR_AMAX_MIN) {
        *d = max > infinity ? SCALAR_HALF_NAN : 0;
        return zeros;
    }

    const turbo_ints b = block_to_ints(x, (float) SCALAR_T_MAX / amax);
    turbo_bytes      m[N_STEPS];
    turbo_sums       tc[N_STEPS];
    turbo_sums       cc[N_STEPS];
    for (int step = 0; step < N_STEPS; ++step) {
        m[step] = magnitude_indices(thresholds + step * (n - 1), n, &b);
        fit_sums(magnitudes, m[step], &b, &tc[step], &cc[step]);
    }
    int32_t          tcs[N_STEPS];
    int32_t          ccs[N_STEPS];
    const turbo_four tc4 = sums_of_four(tc);
    const turbo_four cc4 = sums_of_four(cc);
    store_four(tcs, tc4);
    store_four(ccs, cc4);
    const int best = best_of_four(tc4, cc4);

    const int32_t tt = scale == GGML_TURBO_SCALE_LEAST_SQUARES ? 0 : sum_of_squares(&b);
    *d = GGML_CPU_FP32_TO_FP16(turbo_block_scale(scale, tcs[best], ccs[best], tt, amax / (float) SCALAR_T_MAX));
    return *d == 0 ? zeros : signed_indices(m[best], n, &b);
}

TURBO_INLINE void encode_turbo2(enum ggml_turbo_scale scale, const float * x, block_turbo2_0 * block) {
    static const int8_t  magnitudes[16]                = { TURBO2_0_MAGNITUDES };
    static const int16_t thresholds[TURBO2_0_N_STEPS][1] = { TURBO2_0_THRESHOLDS };
    pack_2bit(encode_block(2, magnitudes, thresholds[0], scale, x, &block->d), block->qs);
}

TURBO_INLINE void encode_turbo3(enum ggml_turbo_scale scale, const float * x, block_turbo3_0 * block) {
    static const int8_t  magnitudes[16]                = { TURBO3_0_MAGNITUDES };
    static const int16_t thresholds[TURBO3_0_N_STEPS][3] = { TURBO3_0_THRESHOLDS };
    const turbo_bytes    index = encode_block(4, magnitudes, thresholds[0], scale, x, &block->d);
    pack_2bit(index, block->qs);
    pack_signs(index, block->signs);
}

TURBO_INLINE void encode_turbo4(enum ggml_turbo_scale scale, const float * x, block_turbo4_0 * block) {
    static const int8_t  magnitudes[16]                = { TURBO4_0_MAGNITUDES };
    static const int16_t thresholds[TURBO4_0_N_STEPS][7] = { TURBO4_0_THRESHOLDS };
    pack_4bit(encode_block(8, magnitudes, thresholds[0], scale, x, &block->d), block->qs);
}

//
// dot product
//

TURBO_INLINE turbo_sums dot_turbo2(const block_turbo2_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo2(x), y->qs);
}

TURBO_INLINE turbo_sums dot_turbo3(const block_turbo3_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo3(x), y->qs);
}

TURBO_INLINE turbo_sums dot_turbo4(const block_turbo4_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo4(x), y->qs);
}

TURBO_INLINE void accumulate(double * acc, const float * d, const turbo_sums * dot) {
    add_products(acc, d, sums_of_four(dot));
}

#else

const char * ggml_turbo_cpu_isa(void) {
    return "generic";
}

static void encode_turbo2(enum ggml_turbo_scale scale, const float * x, block_turbo2_0 * block) {
    ggml_turbo_quantize_row(GGML_TYPE_TURBO2_0, scale, true, x, block, QK_SCALAR);
}

static void encode_turbo3(enum ggml_turbo_scale scale, const float * x, block_turbo3_0 * block) {
    ggml_turbo_quantize_row(GGML_TYPE_TURBO3_0, scale, true, x, block, QK_SCALAR);
}

static void encode_turbo4(enum ggml_turbo_scale scale, const float * x, block_turbo4_0 * block) {
    ggml_turbo_quantize_row(GGML_TYPE_TURBO4_0, scale, true, x, block, QK_SCALAR);
}

static const int8_t codebook2[4]  = { TURBO2_0_CODEBOOK };
static const int8_t codebook3[8]  = { TURBO3_0_CODEBOOK };
static const int8_t codebook4[16] = { TURBO4_0_CODEBOOK };

typedef int32_t turbo_sums;

static turbo_sums dot_turbo2(const block_turbo2_0 * x, const block_q8_0 * y) {
    int32_t sum = 0;
    for (int m = 0; m < 4; ++m) {
        for (int j = 0; j < 8; ++j) {
            sum += codebook2[x->qs[j] >> 2 * m & 3] * y->qs[j + 8 * m];
        }
    }
    return sum;
}

// Four values at a time, see ggml-turbo.h. What the masks keep comes from the same byte, so either byte order will do.
static turbo_sums dot_turbo3(const block_turbo3_0 * x, const block_q8_0 * y) {
    uint32_t s;
    memcpy(&s, x->signs, sizeof(s));
    int32_t sum = 0;
    for (int p = 0; p < 4; ++p) {
        for (int h = 0; h < 2; ++h) {
            uint32_t q;
            memcpy(&q, x->qs + 4 * h, sizeof(q));
            const uint32_t four = (q >> 2 * p & 0x03030303) | (s >> (2 * p + h) & 0x01010101) << 2;
            uint8_t        index[4];
            memcpy(index, &four, sizeof(four));
            for (int k = 0; k < 4; ++k) {
                sum += codebook3[index[k]] * y->qs[8 * p + 4 * h + k];
            }
        }
    }
    return sum;
}

static turbo_sums dot_turbo4(const block_turbo4_0 * x, const block_q8_0 * y) {
    int32_t sum = 0;
    for (int j = 0; j < QK_SCALAR / 2; ++j) {
        sum += codebook4[x->qs[j] & 15] * y->qs[j];
        sum += codebook4[x->qs[j] >> 4] * y->qs[j + QK_SCALAR / 2];
    }
    return sum;
}

static void accumulate(double * acc, const float * d, const turbo_sums * dot) {
    for (int i = 0; i < N_ACC; ++i) {
        acc[i] += (double) d[i] * (double) dot[i];
    }
}

#endif

#define DEFINE_QUANTIZE_ROW(bits)                                                                         \
    void quantize_row_turbo##bits##_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) { \
        const enum ggml_turbo_scale scale  = ggml_turbo_get_scale();                                      \
        block_turbo##bits##_0 *     blocks = (block_turbo##bits##_0 *) y;                                 \
        assert(k % QK_SCALAR == 0);                                                                        \
        for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {                                                   \
            encode_turbo##bits(scale, x + ib * QK_SCALAR, blocks + ib);                                    \
        }                                                                                                 \
    }

DEFINE_QUANTIZE_ROW(2)
DEFINE_QUANTIZE_ROW(3)
DEFINE_QUANTIZE_ROW(4)

// The parameters are those of ggml_vec_dot_t; one row against one row (nrc 1), so the strides are not used.
#define DEFINE_VEC_DOT(bits)                                                                                         \
    TURBO_INLINE void step_turbo##bits(double * acc, const block_turbo##bits##_0 * x, const block_q8_0 * y, int n) { \
        turbo_sums dot[N_ACC];                                                                                       \
        float      d[N_ACC] = { 0.0f, 0.0f, 0.0f, 0.0f };                                                            \
        memset(dot, 0, sizeof(dot));                                                                                 \
        for (int i = 0; i < n; ++i) {                                                                                \
            dot[i] = dot_turbo##bits(x + i, y + i);                                                                  \
            d[i]   = GGML_CPU_FP16_TO_FP32(x[i].d) * GGML_CPU_FP16_TO_FP32(y[i].d);                                  \
        }                                                                                                            \
        accumulate(acc, d, dot);                                                                                     \
    }                                                                                                                \
                                                                                                                     \
    void ggml_vec_dot_turbo##bits##_0_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, \
                                           size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {           \
        assert(n % QK_SCALAR == 0 && nrc == 1);                                                                       \
        (void) bs, (void) bx, (void) by, (void) nrc;                                                                 \
        const block_turbo##bits##_0 * x          = (const block_turbo##bits##_0 *) vx;                               \
        const block_q8_0 *            y          = (const block_q8_0 *) vy;                                          \
        const int                     nb         = n / QK_SCALAR;                                                     \
        double                        acc[N_ACC] = { 0.0, 0.0, 0.0, 0.0 };                                           \
        int                           ib         = 0;                                                                \
        for (; ib + N_ACC <= nb; ib += N_ACC) {                                                                      \
            step_turbo##bits(acc, x + ib, y + ib, N_ACC);                                                            \
        }                                                                                                            \
        if (ib < nb) {                                                                                               \
            step_turbo##bits(acc, x + ib, y + ib, nb - ib);                                                          \
        }                                                                                                            \
        *s = (float) ((acc[0] + acc[2]) + (acc[1] + acc[3]));                                                        \
    }

DEFINE_VEC_DOT(2)
DEFINE_VEC_DOT(3)
DEFINE_VEC_DOT(4)
