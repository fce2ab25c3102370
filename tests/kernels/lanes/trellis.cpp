// turbo/trellis.cuh, turbo/trellis-encode.cuh and turbo/trellis-wide.cuh for Python: see test_lanes_trellis.py.

#include "ggml-cuda/common.cuh"
#include "lanes_library.h"
#include "turbo/trellis-encode.cuh"
#include "turbo/trellis-wide.cuh"

template <ggml_type type>
static void encode_kernel(const float * x, typename turbo_traits<type>::block * y, int64_t n_blocks) {
    __shared__ turbo_trellis_scratch            scratch;
    __align__(16) __shared__ turbo_shared_costs costs;

    turbo_load_costs<type>(costs, threadIdx.x);
    __syncthreads();

    const int64_t ib    = int64_t(blockIdx.x) * TRELLIS_BLOCKS + threadIdx.x / TRELLIS_LANES;
    const bool    store = ib < n_blocks;

    float v[8];
    for (int k = 0; k < 8; ++k) {
        v[k] = store ? x[ib * QK_TRELLIS + threadIdx.x % TRELLIS_LANES + 8 * k] : 0.0f;
    }
    turbo_encode_trellis<type>(v, threadIdx.x, store, costs, scratch, y + ib);
}

template <ggml_type type> static void encode(const float * x, void * y, int64_t n_blocks) {
    using block = typename turbo_traits<type>::block;
    lanes::launch(encode_kernel<type>, dim3((n_blocks + TRELLIS_BLOCKS - 1) / TRELLIS_BLOCKS), dim3(TRELLIS_THREADS), x,
                  static_cast<block *>(y), n_blocks);
}

static void encode_wide_kernel(ggml_type type, const float * x, uint8_t * y) {
    __shared__ turbo_wide_scratch scratch;

    const turbo_trellis_numbers t = turbo_trellis_numbers_of(type);
    turbo_wide_table            table;
    table.load(t.costs, threadIdx.x);

    const float * block = x + blockIdx.x * QK_TRELLIS + threadIdx.x % 32;
    const float   v[2]  = { block[0], block[32] };
    turbo_encode_wide(v, threadIdx.x, t, table, scratch, [y](int block_bytes) { return y + blockIdx.x * block_bytes; });
}

// one half by itself, or quarter by quarter
template <ggml_type type> static void unpack(const void * x, float * y, int64_t n_blocks, bool by_quarters) {
    const auto * blocks = static_cast<const typename turbo_traits<type>::block *>(x);
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        uint32_t words[turbo_traits<type>::words];
        memcpy(words, blocks[ib].coded, sizeof(words));
        const float d = turbo_trellis_scale(blocks[ib].d) * (1.0f / TRELLIS_LEVEL_STEPS);
        for (int half = 0; half < 2; ++half) {
            int32_t w[8];
            if (by_quarters) {
                const auto shared = turbo_read_half(words[half], words[1 - half], blocks[ib].selectors >> 4 * half);
                for (int q = 0; q < 4; ++q) {
                    int32_t pair[2];
                    turbo_unpack_trellis_quarter<type>(shared, words[turbo_low_word<type>(half, q)],
                                                       words[turbo_high_word<type>(half)], q, pair);
                    w[turbo_quarter_word(q, 0)] = pair[0];
                    w[turbo_quarter_word(q, 1)] = pair[1];
                }
            } else {
                turbo_unpack_trellis_half<type>(words, blocks[ib].selectors, half, w);
            }
            for (int i = 0; i < 8; ++i) {
                for (int b = 0; b < 4; ++b) {
                    const auto value                                         = static_cast<int8_t>(w[i] >> 8 * b);
                    y[ib * QK_TRELLIS + 32 * half + turbo_value_order(i, b)] = d * static_cast<float>(value);
                }
            }
        }
    }
}

LANES_EXPORT const char * lanes_encode(int64_t type, const float * x, void * y, int64_t n_blocks) {
    return lanes::guarded([&] { lanes::for_trellis_type(type, [&](auto t) { encode<t>(x, y, n_blocks); }); });
}

LANES_EXPORT const char * lanes_encode_wide(int64_t type, const float * x, void * y, int64_t n_blocks) {
    return lanes::guarded([&] {
        lanes::launch(encode_wide_kernel, dim3(n_blocks), dim3(TRELLIS_WIDE_THREADS), static_cast<ggml_type>(type), x,
                      static_cast<uint8_t *>(y));
    });
}

LANES_EXPORT const char * lanes_unpack(int64_t type, const void * x, float * y, int64_t n_blocks, bool by_quarters) {
    return lanes::guarded(
        [&] { lanes::for_trellis_type(type, [&](auto t) { unpack<t>(x, y, n_blocks, by_quarters); }); });
}
