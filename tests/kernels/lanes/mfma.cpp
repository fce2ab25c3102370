// turbo/mfma.cuh and turbo/mfma-rows.cuh for Python: see test_lanes_mfma.py. A wave is a block of (32, 2) threads.

#include "attn.h"
#include "lanes_library.h"
#include "turbo/mfma-rows.cuh"

static const dim3 fragment_threads(TURBO_WARP, 2);

//
// instructions: registers of all lanes, [64][n]
//

template <typename T>
static void product(void (*multiply)(T (&)[4], const uint32_t (&)[2], const uint32_t (&)[2]),
                    const uint32_t * a,
                    const uint32_t * b,
                    T *              d) {
    const int lane = turbo_mfma_half() * TURBO_WARP + threadIdx.x;
    uint32_t  ra[2], rb[2];
    T         rd[4];
    memcpy(ra, a + 2 * lane, sizeof(ra));
    memcpy(rb, b + 2 * lane, sizeof(rb));
    memcpy(rd, d + 4 * lane, sizeof(rd));
    multiply(rd, ra, rb);
    memcpy(d + 4 * lane, rd, sizeof(rd));
}

static void mfma_s8(const uint32_t * a, const uint32_t * b, int32_t * d) {
    product<int32_t>([](auto & rd, const auto & ra, const auto & rb) { turbo_mfma_s8(rd, ra, rb); }, a, b, d);
}

static void mfma_f16(const uint32_t * a, const uint32_t * b, float * d) {
    product<float>([](auto & rd, const auto & ra, const auto & rb) { turbo_mfma_f16(rd, ra, rb); }, a, b, d);
}

static void over_columns(const float * x, float * sum, float * most) {
    const int lane = turbo_mfma_half() * TURBO_WARP + threadIdx.x;
    sum[lane]      = turbo_mfma_column_sum(x[lane]);
    most[lane]     = turbo_mfma_column_max(x[lane]);
}

LANES_EXPORT const char * lanes_mfma_s8(const uint32_t * a, const uint32_t * b, int32_t * d) {
    return lanes::guarded([&] { lanes::launch(mfma_s8, dim3(1), fragment_threads, a, b, d); });
}

LANES_EXPORT const char * lanes_mfma_f16(const uint32_t * a, const uint32_t * b, float * d) {
    return lanes::guarded([&] { lanes::launch(mfma_f16, dim3(1), fragment_threads, a, b, d); });
}

LANES_EXPORT const char * lanes_mfma_over_columns(const float * x, float * sum, float * most) {
    return lanes::guarded([&] { lanes::launch(over_columns, dim3(1), fragment_threads, x, sum, most); });
}

#ifdef LANES_TYPE

using keys   = turbo_mfma_keys<LANES_TYPE, LANES_D>;
using values = turbo_mfma_values<LANES_TYPE, LANES_D>;
using tile   = turbo_wmma_tile<LANES_TYPE, LANES_D>;

static constexpr int n_rows = 16;  // of a fragment

// x: rows, stride bytes apart, of which n_valid are there. Both halves of the wave copy the same.
static tile stage(uint32_t * shared, const char * x, int stride, int n_valid) {
    tile::loader::template copy<uint16_t, 1>(shared, x, stride, n_valid);
    turbo_mfma_syncwave();
    return { shared };
}

// Operand B of a group: of query `line` of 16, as turbo_columns_load_queries places it.
static void query_operand(const int8_t * q, int b, uint32_t (&x)[keys::n][2]) {
    uint32_t words[4][keys::n][2] = {};
    for (int s = 0; s < keys::group / 32; ++s) {
        for (int l = 0; l < 8; ++l) {
            const int at = keys::query_word<1>(0, 0, s, l);
            for (int j = 0; j < 4; ++j) {
                const int value = b * keys::group + s * 32 + turbo_group_order<LANES_TYPE>(l, j);
                (&words[0][0][0])[at] |= (uint32_t) (uint8_t) q[turbo_wmma_line() * LANES_D + value] << 8 * j;
            }
        }
    }
    memcpy(x, words[turbo_mfma_part()], sizeof(x));
}

template <int b = 0> static void dot_groups(const tile & t, const int8_t * q, int32_t * dots, float * scales) {
    if constexpr (b < keys::n_groups) {
        uint32_t y[keys::n][2];
        query_operand(q, b, y);
        for (int key0 = 0; key0 < TURBO_TILE; key0 += n_rows) {
            uint32_t x[keys::n][2];
            keys::load<b>(t, key0 + turbo_wmma_line(), x);
            int32_t sums[4] = {};
            for (int i = 0; i < keys::n; ++i) {
                turbo_mfma_s8(sums, x[i], y[i]);
            }
            for (int r = 0; r < 4; ++r) {
                const int key = key0 + 4 * turbo_mfma_part() + r;

                dots[(key * 16 + turbo_wmma_line()) * keys::n_groups + b] = sums[r];
                scales[key * keys::n_groups + b]                          = __half2float(keys::scale<b>(t, key));
            }
        }
        dot_groups<b + 1>(t, q, dots, scales);
    }
}

// q: [16][D] queries; dots: [32][16][groups], scales: [32][groups]
static void dot_keys(const char * x, int stride, int n_valid, const int8_t * q, int32_t * dots, float * scales) {
    __align__(16) __shared__ uint32_t shared[TURBO_TILE * tile::words + 1];
    dot_groups(stage(shared, x, stride, n_valid), q, dots, scales);
}

// y: [32][D], each value by a product with a probability of 1
static void sum_values(const char * x, int stride, int n_valid, float * y) {
    __align__(16) __shared__ uint32_t shared[TURBO_TILE * tile::words + 1];

    const tile t = stage(shared, x, stride, n_valid);
    for (int key0 = 0; key0 < TURBO_TILE; key0 += n_rows) {
        for (int ic = 0; ic < values::n_chunks; ++ic) {
            uint32_t v[values::n][2];
            values::load(t, key0, ic, v);
            // one key at a time: column 0
            for (int k = 0; k < n_rows; ++k) {
                const bool     own  = turbo_wmma_line() == 0 && k / 4 == turbo_mfma_part();
                const uint32_t one  = own ? 0x3c00u << 16 * (k % 2) : 0;
                const uint32_t p[2] = { k % 4 < 2 ? one : 0, k % 4 < 2 ? 0 : one };
                for (int i = 0; i < values::n; ++i) {
                    float sums[4] = {};
                    turbo_mfma_f16(sums, v[i], p);
                    for (int r = 0; r < 4 && turbo_wmma_line() == 0; ++r) {
                        const int channel = ic * values::chunk + values::channel(i, 4 * turbo_mfma_part() + r);

                        y[(key0 + k) * LANES_D + channel] = sums[r];
                    }
                }
            }
        }
    }
}

#    include "fragment_exports.h"

#endif  // LANES_TYPE
