// Encoding and dot products of the turbo types on the CPU: a portable body and one for AVX2, with equal results.
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
#endif

_Static_assert(QK_TURBO == QK8_0, "a turbo block meets one Q8_0 block");

#define N_ACC 4  // block ib of a row is added to accumulator ib % N_ACC

#if defined(__AVX2__)

const char * ggml_turbo_cpu_isa(void) {
    return "avx2";
}

typedef __m256i block_dot;  // eight partial sums

TURBO_INLINE block_dot dot_turbo2(const block_turbo2_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo2(x), y->qs);
}

TURBO_INLINE block_dot dot_turbo3(const block_turbo3_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo3(x), y->qs);
}

TURBO_INLINE block_dot dot_turbo4(const block_turbo4_0 * x, const block_q8_0 * y) {
    return dot_levels(levels_turbo4(x), y->qs);
}

TURBO_INLINE void accumulate(double * acc, const block_dot * dot, const float * d) {
    const __m256d product = _mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(d)), _mm256_cvtepi32_pd(sums_of_four(dot)));
    _mm256_storeu_pd(acc, _mm256_add_pd(_mm256_loadu_pd(acc), product));
}

void quantize_row_turbo2_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    static const int16_t thresholds[TURBO2_N_STEPS][1] = { TURBO2_THRESHOLDS };
    const __m128i        magnitudes = _mm_setr_epi8(TURBO2_MAGNITUDES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);

    const enum ggml_turbo_scale scale  = ggml_turbo_get_scale();
    block_turbo2_0 *            blocks = (block_turbo2_0 *) y;
    assert(k % QK_TURBO == 0);
    for (int64_t ib = 0; ib < k / QK_TURBO; ++ib) {
        pack_2bit_avx2(encode_block_avx2(2, magnitudes, thresholds[0], scale, x + ib * QK_TURBO, &blocks[ib].d),
                       blocks[ib].qs);
    }
}

void quantize_row_turbo3_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    static const int16_t thresholds[TURBO3_N_STEPS][3] = { TURBO3_THRESHOLDS };
    const __m128i        magnitudes = _mm_setr_epi8(TURBO3_MAGNITUDES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);

    const enum ggml_turbo_scale scale  = ggml_turbo_get_scale();
    block_turbo3_0 *            blocks = (block_turbo3_0 *) y;
    assert(k % QK_TURBO == 0);
    for (int64_t ib = 0; ib < k / QK_TURBO; ++ib) {
        const __m256i index = encode_block_avx2(4, magnitudes, thresholds[0], scale, x + ib * QK_TURBO, &blocks[ib].d);
        pack_2bit_avx2(index, blocks[ib].qs);
        pack_signs_avx2(index, blocks[ib].signs);
    }
}

void quantize_row_turbo4_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    static const int16_t thresholds[TURBO4_N_STEPS][7] = { TURBO4_THRESHOLDS };
    const __m128i        magnitudes                    = _mm_setr_epi8(TURBO4_MAGNITUDES, 0, 0, 0, 0, 0, 0, 0, 0);

    const enum ggml_turbo_scale scale  = ggml_turbo_get_scale();
    block_turbo4_0 *            blocks = (block_turbo4_0 *) y;
    assert(k % QK_TURBO == 0);
    for (int64_t ib = 0; ib < k / QK_TURBO; ++ib) {
        pack_4bit_avx2(encode_block_avx2(8, magnitudes, thresholds[0], scale, x + ib * QK_TURBO, &blocks[ib].d),
                       blocks[ib].qs);
    }
}

#else

const char * ggml_turbo_cpu_isa(void) {
    return "generic";
}

static const int8_t codebook2[4]  = { TURBO2_CODEBOOK };
static const int8_t codebook3[8]  = { TURBO3_CODEBOOK };
static const int8_t codebook4[16] = { TURBO4_CODEBOOK };

typedef int32_t block_dot;

static block_dot dot_turbo2(const block_turbo2_0 * x, const block_q8_0 * y) {
    int32_t sum = 0;
    for (int m = 0; m < 4; ++m) {
        for (int j = 0; j < 8; ++j) {
            sum += codebook2[x->qs[j] >> 2 * m & 3] * y->qs[j + 8 * m];
        }
    }
    return sum;
}

// Four values at a time, see ggml-turbo.h. What the masks keep comes from the same byte, so either byte order will do.
static block_dot dot_turbo3(const block_turbo3_0 * x, const block_q8_0 * y) {
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

static block_dot dot_turbo4(const block_turbo4_0 * x, const block_q8_0 * y) {
    int32_t sum = 0;
    for (int j = 0; j < QK_TURBO / 2; ++j) {
        sum += codebook4[x->qs[j] & 15] * y->qs[j];
        sum += codebook4[x->qs[j] >> 4] * y->qs[j + QK_TURBO / 2];
    }
    return sum;
}

static void accumulate(double * acc, const block_dot * dot, const float * d) {
    for (int i = 0; i < N_ACC; ++i) {
        acc[i] += (double) d[i] * (double) dot[i];
    }
}

void quantize_row_turbo2_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_turbo2_0_ref(x, (block_turbo2_0 *) y, k);
}

void quantize_row_turbo3_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_turbo3_0_ref(x, (block_turbo3_0 *) y, k);
}

void quantize_row_turbo4_0(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_turbo4_0_ref(x, (block_turbo4_0 *) y, k);
}

#endif

// The parameters are those of ggml_vec_dot_t; one row against one row (nrc 1), so the strides are not used.
#define DEFINE_VEC_DOT(bits)                                                                                         \
    TURBO_INLINE void step_turbo##bits(double * acc, const block_turbo##bits##_0 * x, const block_q8_0 * y, int n) { \
        block_dot dot[N_ACC];                                                                                        \
        float     d[N_ACC] = { 0.0f, 0.0f, 0.0f, 0.0f };                                                             \
        memset(dot, 0, sizeof(dot));                                                                                 \
        for (int i = 0; i < n; ++i) {                                                                                \
            dot[i] = dot_turbo##bits(x + i, y + i);                                                                  \
            d[i]   = GGML_CPU_FP16_TO_FP32(x[i].d) * GGML_CPU_FP16_TO_FP32(y[i].d);                                  \
        }                                                                                                            \
        accumulate(acc, dot, d);                                                                                     \
    }                                                                                                                \
                                                                                                                     \
    void ggml_vec_dot_turbo##bits##_0_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, \
                                           size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {           \
        assert(n % QK_TURBO == 0 && nrc == 1);                                                                       \
        (void) bs, (void) bx, (void) by, (void) nrc;                                                                 \
        const block_turbo##bits##_0 * x          = (const block_turbo##bits##_0 *) vx;                               \
        const block_q8_0 *            y          = (const block_q8_0 *) vy;                                          \
        const int                     nb         = n / QK_TURBO;                                                     \
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
