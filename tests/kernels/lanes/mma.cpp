// turbo/mma.cuh and turbo/mma-rows.cuh for Python: see test_lanes_mma.py.

#include "attn.h"
#include "lanes_library.h"
#include "turbo/mma-rows.cuh"

//
// instructions: registers of all lanes, [32][n]
//

static void mma_s8(const uint32_t * a, const uint32_t * b, const int32_t * c, int32_t * d) {
    const int lane = threadIdx.x;
    uint32_t  ra[4], rb[2];
    int32_t   rc[4], rd[4];
    memcpy(ra, a + 4 * lane, sizeof(ra));
    memcpy(rb, b + 2 * lane, sizeof(rb));
    memcpy(rc, c + 4 * lane, sizeof(rc));
    turbo_mma_s8(rd, ra, rb, rc);
    memcpy(d + 4 * lane, rd, sizeof(rd));
}

static void mma_f16(const uint32_t * a, const uint32_t * b, float * c) {
    const int lane = threadIdx.x;
    uint32_t  ra[4], rb[2];
    float     rc[4];
    memcpy(ra, a + 4 * lane, sizeof(ra));
    memcpy(rb, b + 2 * lane, sizeof(rb));
    memcpy(rc, c + 4 * lane, sizeof(rc));
    turbo_mma_f16(rc, ra, rb);
    memcpy(c + 4 * lane, rc, sizeof(rc));
}

static void transpose(const uint32_t * x, uint32_t * y) {
    y[threadIdx.x] = turbo_mma_transpose(x[threadIdx.x]);
}

LANES_EXPORT const char * lanes_mma_s8(const uint32_t * a, const uint32_t * b, const int32_t * c, int32_t * d) {
    return lanes::guarded([&] { lanes::launch(mma_s8, dim3(1), dim3(32), a, b, c, d); });
}

LANES_EXPORT const char * lanes_mma_f16(const uint32_t * a, const uint32_t * b, float * c) {
    return lanes::guarded([&] { lanes::launch(mma_f16, dim3(1), dim3(32), a, b, c); });
}

LANES_EXPORT const char * lanes_mma_transpose(const uint32_t * x, uint32_t * y) {
    return lanes::guarded([&] { lanes::launch(transpose, dim3(1), dim3(32), x, y); });
}

//
// asynchronous copies: words of 32 lanes reversed by way of shared memory, in two groups
//

template <bool waits> static void reverse(const uint32_t * x, uint32_t * y) {
    __align__(16) __shared__ uint32_t shared[64];
    const int                         lane = threadIdx.x;
    shared[lane] = shared[32 + lane] = 0;
    turbo_syncwarp();
    for (int i = 0; i < 2; ++i) {
        turbo_async_copy<4>(shared + 32 * i + lane, x + 32 * i + lane);
        turbo_async_commit();
    }
    for (int i = 0; i < 2; ++i) {
        if (i == 0) {
            turbo_async_wait<1>();
        } else if (waits) {
            turbo_async_wait<0>();
        }
        turbo_syncwarp();
        y[32 * i + lane] = shared[32 * i + 31 - lane];
    }
}

LANES_EXPORT const char * lanes_reverse(const uint32_t * x, uint32_t * y, bool waits) {
    return lanes::guarded([&] { lanes::launch(waits ? reverse<true> : reverse<false>, dim3(1), dim3(32), x, y); });
}

#ifdef LANES_TYPE

using keys   = turbo_mma_keys<LANES_TYPE, LANES_D>;
using values = turbo_mma_values<LANES_TYPE, LANES_D>;

static constexpr int n_blocks = keys::n_groups * keys::n_blocks;  // of a row

// x: TURBO_TILE rows, stride bytes apart, of which n_valid are there
template <typename tile> static tile stage(uint32_t * shared, const char * x, int stride, int n_valid) {
    if (n_valid == TURBO_TILE) {
        tile::load(shared + tile::lane_words(), x + tile::lane_bytes(stride), stride);
    } else {
        tile::copy(shared, x, stride, n_valid);
    }
    turbo_async_commit();
    turbo_async_wait<0>();
    turbo_syncwarp();
    return { shared };
}

template <int b = 0> static void dot_groups(const keys::tile & t, const int8_t * q, int32_t * dots, float * scales) {
    if constexpr (b < keys::n_groups) {
        const int row = turbo_mma_row(), part = turbo_mma_part();
        for (int key0 = 0; key0 < TURBO_TILE; key0 += 16) {
            uint32_t a[keys::n][4];
            float    d[keys::n_blocks][2];
            keys::load<b>(t, key0, a, d);

            int32_t c[keys::n_blocks][4] = {};
            for (int m = 0; m < keys::n; ++m) {
                uint32_t words[2] = {};
                for (int half = 0; half < keys::group / 32; ++half) {
                    for (int l = 0; l < 8; ++l) {
                        const turbo_mma_place at = keys::place(half, l);
                        for (int j = 0; j < 4 && at.step == m && at.part == part; ++j) {
                            const int value = b * keys::group + half * 32 + turbo_group_order<LANES_TYPE>(l, j);
                            words[at.reg] |= (uint32_t) (uint8_t) q[row * LANES_D + value] << 8 * j;
                        }
                    }
                }
                turbo_mma_s8(c[m % keys::n_blocks], a[m], words, c[m % keys::n_blocks]);
            }
            for (int m = 0; m < keys::n_blocks; ++m) {
                for (int i = 0; i < 4; ++i) {
                    const int key   = key0 + i / 2 * 8 + turbo_mma_key(row);
                    const int block = b * keys::n_blocks + m;

                    dots[(key * 8 + 2 * part + i % 2) * n_blocks + block] = c[m][i];
                    scales[key * n_blocks + block]                        = d[m][i / 2] * keys::scale_unit;
                }
            }
        }
        dot_groups<b + 1>(t, q, dots, scales);
    }
}

// q: [8][D] queries; dots: [32][8][blocks], scales: [32][blocks]
static void dot_keys(const char * x, int stride, int n_valid, const int8_t * q, int32_t * dots, float * scales) {
    __align__(16) __shared__ uint32_t shared[TURBO_TILE * keys::tile::words];
    dot_groups(stage<keys::tile>(shared, x, stride, n_valid), q, dots, scales);
}

// y: [32][D], each value by a product with a probability of 1
static void sum_values(const char * x, int stride, int n_valid, float * y) {
    __align__(16) __shared__ uint32_t shared[TURBO_TILE * values::tile::words];

    const auto t   = stage<values::tile>(shared, x, stride, n_valid);
    const int  row = turbo_mma_row(), part = turbo_mma_part();
    for (int key = 0; key < TURBO_TILE; ++key) {
        // column 0 of the probabilities, as scores have it: rows are keys
        uint32_t p[2];
        for (int r = 0; r < 2; ++r) {
            const bool hit = part == 0 && key % 16 == 8 * r + turbo_mma_key(row);
            p[r]           = turbo_mma_transpose(hit ? 0x3c00 : 0);
        }
        for (int ic = 0; ic < values::n_chunks; ++ic) {
            auto fragments = values::fragments::read(t, key / 16 * 16, ic);
            for (int i = 0; i < values::n_tiles; ++i) {
                uint32_t a[2][4];
                float    c[4] = {};
                fragments.get(i / 2, a);
                turbo_mma_f16(c, a[i % 2], p);
                for (int r = 0; r < 2 && part == 0; ++r) {
                    y[key * LANES_D + ic * values::chunk + values::channel(i, row, r)] = c[2 * r];
                }
            }
        }
    }
}

static const dim3 fragment_threads(32);

#    include "fragment_exports.h"

#endif  // LANES_TYPE
