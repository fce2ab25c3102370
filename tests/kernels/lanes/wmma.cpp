// turbo/wmma.cuh and turbo/wmma-rows.cuh for Python: see test_lanes_wmma.py.

#include "attn.h"
#include "lanes_library.h"
#include "turbo/wmma-rows.cuh"

//
// instructions: registers of all lanes, [32][n]
//

template <int n, typename T, typename F>
static void multiply(const uint32_t * a, const uint32_t * b, T * d, F instruction) {
    const int lane = threadIdx.x;
    uint32_t  ra[n], rb[n];
    T         rd[8];
    memcpy(ra, a + n * lane, sizeof(ra));
    memcpy(rb, b + n * lane, sizeof(rb));
    memcpy(rd, d + 8 * lane, sizeof(rd));
    instruction(rd, ra, rb);
    memcpy(d + 8 * lane, rd, sizeof(rd));
}

static void wmma_s8(const uint32_t * a, const uint32_t * b, int32_t * d) {
    multiply<TURBO_WMMA_S8>(a, b, d, [](auto & rd, auto & ra, auto & rb) { turbo_wmma_s8(rd, ra, rb); });
}

static void wmma_f16(const uint32_t * a, const uint32_t * b, float * d) {
    multiply<TURBO_WMMA_F16>(a, b, d, [](auto & rd, auto & ra, auto & rb) { turbo_wmma_f16(rd, ra, rb); });
}

// rows: of each line of A
static void operand(const uint32_t * own, uint32_t * x, int32_t * rows) {
    const int lane = threadIdx.x;
    uint32_t  mine[2], all[2 * TURBO_WMMA_COPIES];
    memcpy(mine, own + 2 * lane, sizeof(mine));
    turbo_wmma_operand(all, mine);
    memcpy(x + 2 * TURBO_WMMA_COPIES * lane, all, sizeof(all));
    rows[lane] = turbo_wmma_row(turbo_wmma_line());
}

LANES_EXPORT const char * lanes_wmma_s8(const uint32_t * a, const uint32_t * b, int32_t * d) {
    return lanes::guarded([&] { lanes::launch(wmma_s8, dim3(1), dim3(32), a, b, d); });
}

LANES_EXPORT const char * lanes_wmma_f16(const uint32_t * a, const uint32_t * b, float * d) {
    return lanes::guarded([&] { lanes::launch(wmma_f16, dim3(1), dim3(32), a, b, d); });
}

LANES_EXPORT const char * lanes_wmma_operand(const uint32_t * own, uint32_t * x, int32_t * rows) {
    return lanes::guarded([&] { lanes::launch(operand, dim3(1), dim3(32), own, x, rows); });
}

#ifdef LANES_TYPE

using keys   = turbo_wmma_keys<LANES_TYPE, LANES_D>;
using values = turbo_wmma_values<LANES_TYPE, LANES_D>;
using tile   = turbo_wmma_tile<LANES_TYPE, LANES_D>;

// x: TURBO_TILE rows, stride bytes apart, of which n_valid are there
static tile stage(uint32_t * shared, const char * x, int stride, int n_valid) {
    if constexpr (tile::loader::prefetch) {
        if (n_valid == TURBO_TILE) {
            uint32_t regs[tile::loader::n_regs];
            tile::loader::load(regs, x, stride);
            tile::loader::store(shared, regs);
            turbo_syncwarp();
            return { shared };
        }
    }
    tile::loader::template copy<uint16_t, 1>(shared, x, stride, n_valid);
    turbo_syncwarp();
    return { shared };
}

// Operand A of a group: of query `line` of 16, as turbo_columns_load_queries places it.
static void query_operand(const int8_t * q, int b, uint32_t (&x)[keys::n][keys::n_regs]) {
    constexpr int n_words = keys::n * keys::n_own;

    uint32_t words[2][n_words] = {};
    for (int s = 0; s < keys::group / 32; ++s) {
        for (int l = 0; l < 8; ++l) {
            const int at = keys::query_word<1>(0, 0, s, l);
            for (int j = 0; j < 4; ++j) {
                const int value = b * keys::group + s * 32 + turbo_group_order<LANES_TYPE>(l, j);
                words[at / n_words][at % n_words] |= (uint32_t) (uint8_t) q[turbo_wmma_line() * LANES_D + value]
                                                     << 8 * j;
            }
        }
    }
    for (int i = 0; i < keys::n; ++i) {
        for (int r = 0; r < keys::n_regs; ++r) {
            const int half = TURBO_WMMA_COPIES == 2 ? r / keys::n_own : turbo_wmma_half();
            x[i][r]        = words[half][i * keys::n_own + r % keys::n_own];
        }
    }
}

template <int b = 0> static void dot_groups(const tile & t, const int8_t * q, int32_t * dots, float * scales) {
    if constexpr (b < keys::n_groups) {
        uint32_t a[keys::n][keys::n_regs];
        query_operand(q, b, a);
        for (int key0 = 0; key0 < TURBO_TILE; key0 += 16) {
            const int key = key0 + turbo_wmma_line();
            uint32_t  x[keys::n][keys::n_regs];
            float     d;
            keys::load<b>(t, key, x, d);
            int32_t sums[8] = {};
            for (int i = 0; i < keys::n; ++i) {
                turbo_wmma_s8(sums, a[i], x[i]);
            }
            for (int i = 0; i < 8; ++i) {
                // of which line of A the element is
                const int line = TURBO_WMMA_COPIES == 2 ? 2 * i + turbo_wmma_half() : i + 8 * turbo_wmma_half();

                dots[(key * 16 + line) * keys::n_groups + b] = sums[i];
            }
            scales[key * keys::n_groups + b] = d;
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
    __align__(16) __shared__ uint32_t work[values::tile_words];

    const tile t = stage(shared, x, stride, n_valid);
    for (int ic = 0; ic < values::n_chunks; ++ic) {
        for (int s = 0; s < 2; ++s) {
            if (s < values::n_passes) {
                turbo_syncwarp();
                values::unpack(t, s, ic, work);
                turbo_syncwarp();
            }
            for (int f0 = 0; f0 < values::n; f0 += 4) {
                uint32_t v[4][TURBO_WMMA_F16];
                values::load(t, work, 8 * s, ic, f0, v);
                // keys 8*s .. + 7 and 16 more, one at a time: line 0 of A
                for (int k = 0; k < 16; ++k) {
                    const int pair = k / 2;
                    uint32_t  p[TURBO_WMMA_F16];
                    for (int r = 0; r < TURBO_WMMA_F16; ++r) {
                        const bool hit = turbo_wmma_line() == 0 &&
                                         (TURBO_WMMA_COPIES == 2 || pair / 4 == turbo_wmma_half()) &&
                                         pair % TURBO_WMMA_F16 == r;
                        p[r] = hit ? 0x3c00u << 16 * (k % 2) : 0;
                    }
                    for (int i = 0; i < 4; ++i) {
                        float sums[8] = {};
                        turbo_wmma_f16(sums, p, v[i]);
                        if (turbo_wmma_half() == 0) {
                            const int key     = 8 * s + pair + 16 * (k % 2);
                            const int channel = ic * values::chunk + values::channel(f0 + i, turbo_wmma_line());

                            y[key * LANES_D + channel] = sums[0];
                        }
                    }
                }
            }
        }
    }
}

static const dim3 fragment_threads(32);

#    include "fragment_exports.h"

#endif  // LANES_TYPE
