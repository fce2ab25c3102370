// Encoding and dot products of the scalar types on the CPU: a portable body, and one over the building blocks of AVX2 or NEON, with equal
// results.
//
// A dot product goes four blocks at a time (one row of head size 128): the integer sums of four blocks meet in one vector, are
// multiplied by the four products of scales and added to four binary64 accumulators. Each product has at most 20 + 22 significant
// bits, so it is exact whether or not the compiler fuses it with the addition.

#include "ggml-cpu-impl.h"
#include "kernels.h"
#include "simd-mappings.h"

#include <assert.h>
#include <string.h>

#if defined(_MSC_VER)
#    define TURBO_INLINE static __forceinline
#else
#    define TURBO_INLINE static inline __attribute__((always_inline))
#endif

#if defined(__AVX2__)
#    include "scalar-avx2.h"
#    define SCALAR_SIMD "avx2"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#    include "scalar-neon.h"
#    define SCALAR_SIMD "neon"
#endif

_Static_assert(QK_SCALAR == QK8_0, "a turbo block meets one Q8_0 block");

#define N_ACC 4  // block ib of a row is added to accumulator ib % N_ACC

#if defined(SCALAR_SIMD)

// What an instruction set has to offer. Vectors hold one byte for each value of a block (simd_bytes), its integers and signs
// (simd_ints) or partial sums over it (simd_sums); simd_four has a sum of each of four blocks.
//
//     levels_turbo*(block)                      levels of a block
//     dot_levels(levels, y)                     levels times the int8 at y
//     sums_of_four(v)                           the sum of each of four vectors
//     store_four(p, sums)                       to memory
//     add_products(acc, d, sums)                acc[i] += d[i] * sums[i] in binary64
//
//     max_magnitude_bits(x)                     largest |x|, as its bits: NaN comes last
//     simd_block_to_ints(x, scale)                   t = round(|x| * scale) to nearest even, with infinity as the largest number
//     magnitude_indices(thresholds, n, ints)    how many of n - 1 thresholds each t exceeds
//     fit_sums(magnitudes, m, ints, tc, cc)     <t,c> and |c|^2 for the magnitudes c = magnitudes[m]
//     best_of_four(tc, cc)                      which gain <t,c>^2 / |c|^2 is the largest, the first of equals
//     sum_of_squares(ints)                      |t|^2
//     signed_indices(m, n, ints)                indices in the codebook, in the order of the values
//     pack_*(indices, p)                        as they are stored; pack_2bit takes the low two bits

const char * ggml_turbo_cpu_scalar_isa(void) {
    return SCALAR_SIMD;
}

//
// encoder: the arithmetic of turbo/scalar.c; equal bits are a test
//

#    define N_STEPS 4

#    define CHECK_STEPS(ENUM, NAME, C_NAME, FAMILY, BITS) _Static_assert(ENUM##_N_STEPS == N_STEPS, "steps to try");
GGML_TURBO_SCALAR_TYPES_X(CHECK_STEPS)

// Writes d and returns the index of each value. n: magnitudes, half of the codebook; thresholds: n - 1 for each step.
TURBO_INLINE simd_bytes simd_encode_block(int                   n,
                                          const int8_t *        magnitudes,
                                          const int16_t *       thresholds,
                                          enum ggml_turbo_scale scale,
                                          const float *         x,
                                          ggml_half *           d) {
    simd_bytes zeros;
    memset(&zeros, 0, sizeof(zeros));
    const uint32_t max    = max_magnitude_bits(x);
    const uint32_t finite = max < TURBO_FLT_MAX_BITS ? max : TURBO_FLT_MAX_BITS;
    float          amax;
    memcpy(&amax, &finite, sizeof(amax));
    if (max > TURBO_INFINITY_BITS || amax < SCALAR_AMAX_MIN) {
        *d = max > TURBO_INFINITY_BITS ? SCALAR_HALF_NAN : 0;
        return zeros;
    }

    const simd_ints b = simd_block_to_ints(x, (float) SCALAR_T_MAX / amax);
    simd_bytes      m[N_STEPS];
    simd_sums       tc[N_STEPS];
    simd_sums       cc[N_STEPS];
    for (int step = 0; step < N_STEPS; ++step) {
        m[step] = magnitude_indices(thresholds + step * (n - 1), n, &b);
        fit_sums(magnitudes, m[step], &b, &tc[step], &cc[step]);
    }
    int32_t         tcs[N_STEPS];
    int32_t         ccs[N_STEPS];
    const simd_four tc4 = sums_of_four(tc);
    const simd_four cc4 = sums_of_four(cc);
    store_four(tcs, tc4);
    store_four(ccs, cc4);
    const int best = best_of_four(tc4, cc4);

    const int32_t tt = scale == GGML_TURBO_SCALE_LEAST_SQUARES ? 0 : sum_of_squares(&b);
    *d = GGML_CPU_FP32_TO_FP16(scalar_block_scale(scale, tcs[best], ccs[best], tt, amax / (float) SCALAR_T_MAX));
    return *d == 0 ? zeros : signed_indices(m[best], n, &b);
}

TURBO_INLINE void encode_turbo2(enum ggml_turbo_scale scale, const float * x, block_turbo2_0 * block) {
    static const int8_t  magnitudes[16]                  = { TURBO2_0_MAGNITUDES };
    static const int16_t thresholds[TURBO2_0_N_STEPS][1] = { TURBO2_0_THRESHOLDS };
    pack_2bit(simd_encode_block(2, magnitudes, thresholds[0], scale, x, &block->d), block->qs);
}

TURBO_INLINE void encode_turbo3(enum ggml_turbo_scale scale, const float * x, block_turbo3_0 * block) {
    static const int8_t  magnitudes[16]                  = { TURBO3_0_MAGNITUDES };
    static const int16_t thresholds[TURBO3_0_N_STEPS][3] = { TURBO3_0_THRESHOLDS };
    const simd_bytes     index = simd_encode_block(4, magnitudes, thresholds[0], scale, x, &block->d);
    pack_2bit(index, block->qs);
    pack_signs(index, block->signs);
}

TURBO_INLINE void encode_turbo4(enum ggml_turbo_scale scale, const float * x, block_turbo4_0 * block) {
    static const int8_t  magnitudes[16]                  = { TURBO4_0_MAGNITUDES };
    static const int16_t thresholds[TURBO4_0_N_STEPS][7] = { TURBO4_0_THRESHOLDS };
    pack_4bit(simd_encode_block(8, magnitudes, thresholds[0], scale, x, &block->d), block->qs);
}

//
// dot product
//

TURBO_INLINE simd_sums dot_turbo2(const block_turbo2_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo2(x), y->qs);
}

TURBO_INLINE simd_sums dot_turbo3(const block_turbo3_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo3(x), y->qs);
}

TURBO_INLINE simd_sums dot_turbo4(const block_turbo4_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo4(x), y->qs);
}

TURBO_INLINE void accumulate(double * acc, const float * d, const simd_sums * dot) {
    add_products(acc, d, sums_of_four(dot));
}

#else

const char * ggml_turbo_cpu_scalar_isa(void) {
    return "generic";
}

#    define DEFINE_ENCODER(ENUM, NAME, C_NAME, FAMILY, BITS)                                              \
        static void encode_##NAME(enum ggml_turbo_scale scale, const float * x, block_##C_NAME * block) { \
            ggml_turbo_quantize_row_scalar(GGML_TYPE_##ENUM, scale, true, x, block, QK_SCALAR);           \
        }                                                                                                 \
        static const int8_t codebook##BITS[1 << BITS] = { ENUM##_CODEBOOK };
GGML_TURBO_SCALAR_TYPES_X(DEFINE_ENCODER)

typedef int32_t simd_sums;

static simd_sums dot_turbo2(const block_turbo2_0 * x, const block_q8_0 * y) {
    int32_t sum = 0;
    for (int m = 0; m < 4; ++m) {
        for (int j = 0; j < 8; ++j) {
            sum += codebook2[x->qs[j] >> 2 * m & 3] * y->qs[j + 8 * m];
        }
    }
    return sum;
}

// Four values at a time, see turbo/scalar.h. What the masks keep comes from the same byte, so either byte order will do.
static simd_sums dot_turbo3(const block_turbo3_0 * x, const block_q8_0 * y) {
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

static simd_sums dot_turbo4(const block_turbo4_0 * x, const block_q8_0 * y) {
    int32_t sum = 0;
    for (int j = 0; j < QK_SCALAR / 2; ++j) {
        sum += codebook4[x->qs[j] & 15] * y->qs[j];
        sum += codebook4[x->qs[j] >> 4] * y->qs[j + QK_SCALAR / 2];
    }
    return sum;
}

static void accumulate(double * acc, const float * d, const simd_sums * dot) {
    for (int i = 0; i < N_ACC; ++i) {
        acc[i] += (double) d[i] * (double) dot[i];
    }
}

#endif

#define DEFINE_QUANTIZE_ROW(ENUM, NAME, C_NAME, FAMILY, BITS)                                      \
    void quantize_row_##C_NAME(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) { \
        const enum ggml_turbo_scale scale  = ggml_turbo_get_scale();                               \
        block_##C_NAME *            blocks = (block_##C_NAME *) y;                                 \
        assert(k % QK_SCALAR == 0);                                                                \
        for (int64_t ib = 0; ib < k / QK_SCALAR; ++ib) {                                           \
            encode_##NAME(scale, x + ib * QK_SCALAR, blocks + ib);                                 \
        }                                                                                          \
    }

GGML_TURBO_SCALAR_TYPES_X(DEFINE_QUANTIZE_ROW)

// The parameters are those of ggml_vec_dot_t; one row against one row (nrc 1), so the strides are not used.
#define DEFINE_VEC_DOT(ENUM, NAME, C_NAME, FAMILY, BITS)                                                        \
    TURBO_INLINE void step_##NAME(double * acc, const block_##C_NAME * x, const block_q8_0 * y, int n) {        \
        simd_sums dot[N_ACC];                                                                                   \
        float     d[N_ACC] = { 0.0f, 0.0f, 0.0f, 0.0f };                                                        \
        memset(dot, 0, sizeof(dot));                                                                            \
        for (int i = 0; i < n; ++i) {                                                                           \
            dot[i] = dot_##NAME(x + i, y + i);                                                                  \
            d[i]   = GGML_CPU_FP16_TO_FP32(x[i].d) * GGML_CPU_FP16_TO_FP32(y[i].d);                             \
        }                                                                                                       \
        accumulate(acc, d, dot);                                                                                \
    }                                                                                                           \
                                                                                                                \
    void ggml_vec_dot_##C_NAME##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, \
                                      size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {           \
        assert(n % QK_SCALAR == 0 && nrc == 1);                                                                 \
        (void) bs, (void) bx, (void) by, (void) nrc;                                                            \
        const block_##C_NAME * x          = (const block_##C_NAME *) vx;                                        \
        const block_q8_0 *     y          = (const block_q8_0 *) vy;                                            \
        const int              nb         = n / QK_SCALAR;                                                      \
        double                 acc[N_ACC] = { 0.0, 0.0, 0.0, 0.0 };                                             \
        int                    ib         = 0;                                                                  \
        for (; ib + N_ACC <= nb; ib += N_ACC) {                                                                 \
            step_##NAME(acc, x + ib, y + ib, N_ACC);                                                            \
        }                                                                                                       \
        if (ib < nb) {                                                                                          \
            step_##NAME(acc, x + ib, y + ib, nb - ib);                                                          \
        }                                                                                                       \
        *s = (float) ((acc[0] + acc[2]) + (acc[1] + acc[3]));                                                   \
    }

GGML_TURBO_SCALAR_TYPES_X(DEFINE_VEC_DOT)
