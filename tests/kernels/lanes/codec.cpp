// turbo/scalar.cuh for Python: see test_lanes_codec.py.

#include "ggml-cuda/common.cuh"
#include "lanes_library.h"
#include "turbo/scalar.cuh"

template <ggml_type type>
static void encode_kernel(const float *                        x,
                          typename turbo_traits<type>::block * y,
                          ggml_turbo_scale                     rule,
                          int64_t                              n_blocks) {
    const int64_t i     = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int     lane  = i % 8;
    const bool    store = i / 8 < n_blocks;

    float v[4];
    for (int k = 0; k < 4; ++k) {
        v[k] = store ? x[i / 8 * QK_SCALAR + lane + 8 * k] : 0.0f;
    }
    turbo_encode_block<type>(v, rule, lane, store, y + i / 8);
}

template <ggml_type type> static void encode(const float * x, void * y, ggml_turbo_scale rule, int64_t n_blocks) {
    using block = typename turbo_traits<type>::block;
    lanes::launch(encode_kernel<type>, dim3((8 * n_blocks + 127) / 128), dim3(128), x, static_cast<block *>(y), rule,
                  n_blocks);
}

// one block by itself, or quarter by quarter
template <ggml_type type> static void unpack(const void * x, float * y, int64_t n_blocks, bool by_quarters) {
    const auto * blocks = static_cast<const typename turbo_traits<type>::block *>(x);
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        uint32_t words[turbo_traits<type>::words];
        memcpy(words, blocks[ib].qs, sizeof(words));
        int32_t w[8];
        if (by_quarters) {
            for (int q = 0; q < 4; ++q) {
                int32_t pair[2];
                turbo_unpack_quarter<type>(words[turbo_quarter_qs<type>(q)], words[turbo_traits<type>::words - 1], q,
                                           pair);
                w[turbo_quarter_word(q, 0)] = pair[0];
                w[turbo_quarter_word(q, 1)] = pair[1];
            }
        } else {
            turbo_unpack_block<type>(words, w);
        }
        for (int i = 0; i < 8; ++i) {
            for (int b = 0; b < 4; ++b) {
                const auto value = static_cast<int8_t>(w[i] >> 8 * b);
                y[ib * QK_SCALAR + turbo_value_order(i, b)] =
                    static_cast<float>(blocks[ib].d) * static_cast<float>(value);
            }
        }
    }
}

LANES_EXPORT const char * lanes_encode(int64_t type, const float * x, void * y, int64_t rule, int64_t n_blocks) {
    return lanes::guarded([&] {
        lanes::for_scalar_type(type, [&](auto t) { encode<t>(x, y, static_cast<ggml_turbo_scale>(rule), n_blocks); });
    });
}

LANES_EXPORT const char * lanes_unpack(int64_t type, const void * x, float * y, int64_t n_blocks, bool by_quarters) {
    return lanes::guarded(
        [&] { lanes::for_scalar_type(type, [&](auto t) { unpack<t>(x, y, n_blocks, by_quarters); }); });
}
