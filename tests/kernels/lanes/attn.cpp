// turbo/decode.cuh for Python: see test_lanes_attn.py.

#include "attn.h"

#include "lanes_library.h"
#include "turbo/decode-mma-wide.cuh"
#include "turbo/decode-wmma-wide.cuh"
#include "turbo/merge-exact.cuh"

#if !defined(LANES_MMA)
#    define LANES_KERNEL turbo_attn_decode_kernel
#elif defined(LANES_GFX) && (LANES_DV > 256 || (LANES_DV == 256 && LANES_GFX == 11))
#    define LANES_KERNEL turbo_attn_decode_wmma_wide_kernel
#elif defined(LANES_GFX)
#    define LANES_KERNEL turbo_attn_decode_wmma_kernel
#elif LANES_DV > 256
#    define LANES_KERNEL turbo_attn_decode_mma_wide_kernel
#else
#    define LANES_KERNEL turbo_attn_decode_mma_kernel
#endif  // !defined(LANES_MMA)

#include <limits>

// a: its grid has parts a.part0 .. a.part0 + n_split - 1
template <ggml_type type_K, ggml_type type_V>
static void launch(const turbo_attn_args & a, int64_t n_seq, int64_t n_split) {
    const dim3 grid((a.n_q * a.gqa_ratio + LANES_COLS - 1) / LANES_COLS, n_split, a.n_head / a.gqa_ratio * n_seq);
    lanes::launch(LANES_KERNEL<LANES_DK, LANES_DV, type_K, type_V, LANES_COLS>, grid,
                  dim3(TURBO_WARP, TURBO_DECODE_WARPS), a);
}

// second: of the segment of keys in f16, or null
static void decode(turbo_attn_args a, const turbo_attn_args * second, int64_t n_seq, int64_t n_split) {
    const int n_rows = a.n_head * a.n_q * n_seq;
    a.part0          = 0;
    a.n_parts        = second ? 2 * n_split : n_split;

    const float         nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float>  parts(size_t(n_rows) * a.n_parts * LANES_DV, nan);
    std::vector<float2> meta(size_t(n_rows) * a.n_parts, float2{ nan, nan });
    float *             dst = a.dst;
    if (a.n_parts > 1) {
        a.dst  = parts.data();
        a.meta = meta.data();
    }
    launch<LANES_K, LANES_V>(a, n_seq, n_split);
#ifdef LANES_SECOND
    turbo_attn_args b = *second;
    b.dst             = a.dst;
    b.meta            = a.meta;
    b.part0           = n_split;
    b.n_parts         = a.n_parts;
    launch<GGML_TYPE_F16, GGML_TYPE_F16>(b, n_seq, n_split);
#endif  // LANES_SECOND
    if (a.n_parts > 1) {
        lanes::launch(turbo_attn_merge_parts<LANES_DV>, dim3(n_rows), dim3(LANES_DV), parts.data(), meta.data(), dst,
                      a.n_parts);
    }
}

#ifdef LANES_SECOND
// The same, but the segment in f16 is attended by the kernel that merges.
static void decode_merging(turbo_attn_args a, turbo_attn_args second, int64_t n_seq, int64_t n_split) {
    const int n_rows = a.n_head * a.n_q * n_seq;
    a.part0          = 0;
    a.n_parts        = std::max<int>(n_split, 2);

    const float         nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float>  parts(size_t(n_rows) * a.n_parts * LANES_DV, nan);
    std::vector<float2> meta(size_t(n_rows) * a.n_parts, float2{ nan, nan });
    float *             dst = a.dst;
    second.dst = a.dst = parts.data();
    second.meta = a.meta = meta.data();
    second.part0         = n_split;
    second.n_parts       = a.n_parts;
    launch<LANES_K, LANES_V>(a, n_seq, n_split);
    lanes::launch(turbo_attn_merge_exact<LANES_DK, LANES_DV>, dim3(n_rows), dim3(LANES_DV), second, dst);
}

LANES_EXPORT const char * lanes_decode_merging(const turbo_attn_args * a,
                                               const turbo_attn_args * second,
                                               int64_t                 n_seq,
                                               int64_t                 n_split) {
    return lanes::guarded([&] { decode_merging(*a, *second, n_seq, n_split); });
}
#endif  // LANES_SECOND

LANES_EXPORT const char * lanes_decode(const turbo_attn_args * a,
                                       const turbo_attn_args * second,
                                       int64_t                 n_seq,
                                       int64_t                 n_split) {
    return lanes::guarded([&] { decode(*a, second, n_seq, n_split); });
}

// Dot products of 4 values that K has taken so far.
LANES_EXPORT const char * lanes_dot_products(int64_t * n) {
    *n = lanes::dot_products;
    return nullptr;
}
