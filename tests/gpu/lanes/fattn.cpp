// turbo-fattn-decode.cuh for Python: see ../test_lanes_fattn.py.

#include "common.cuh"

// stand in for those of upstream's common.cuh
static inline float get_alibi_slope(float max_bias, uint32_t h, uint32_t n_head_log2, float m0, float m1) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    return h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2 * (h - n_head_log2) + 1);
}

static inline void ggml_cuda_mad(half2 & acc, const half2 v, const half2 u) {
    acc += v * u;
}

static inline void ggml_cuda_mad(float & acc, const half2 v, const half2 u) {
    const float2 p = __half22float2(v * u);
    acc += p.x + p.y;
}

#include "lanes_library.h"
#include "turbo-fattn-decode.cuh"

template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static void decode(turbo_fattn_args a, int n_seq, int n_split) {
    const dim3 grid((a.n_q * a.gqa_ratio + n_cols - 1) / n_cols, n_split, a.n_head / a.gqa_ratio * n_seq);
    const int  n_rows = a.n_head * a.n_q * n_seq;

    std::vector<float>  parts(size_t(n_rows) * n_split * DV);
    std::vector<float2> meta(size_t(n_rows) * n_split);
    float *             dst = a.dst;
    if (n_split > 1) {
        a.dst  = parts.data();
        a.meta = meta.data();
    }
    lanes::launch(turbo_fattn_decode_kernel<DK, DV, type_K, type_V, n_cols>, grid, dim3(TURBO_WARP, TURBO_DECODE_WARPS),
                  a);
    if (n_split > 1) {
        lanes::launch(turbo_fattn_merge_splits<DV>, dim3(n_rows), dim3(DV), parts.data(), meta.data(), dst, n_split);
    }
}

LANES_EXPORT const char * lanes_decode(const turbo_fattn_args * a, int64_t n_seq, int64_t n_split) {
    return lanes::guarded([&] { decode<LANES_DK, LANES_DV, LANES_K, LANES_V, LANES_COLS>(*a, n_seq, n_split); });
}
