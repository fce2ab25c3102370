// Attention of few queries: which decode kernels serve an op, and how they are launched.

#include "turbo/attn-host.cuh"
#include "turbo/attn-ways.cuh"
#include "turbo/decode-choice.cuh"
#include "turbo/decode-pairs.cuh"
#include "turbo/decode-wide.cuh"
#include "turbo/decode.cuh"
#include "turbo/launch.cuh"

// More queries than this are prefill: unpacking a slice once is then cheaper than unpacking it for every few columns. So are fewer, where
// the decode kernel would unpack the cache more often than this, and slices go to matrix cores.
static constexpr int TURBO_DECODE_MAX_QUERIES = 8;
static constexpr int TURBO_DECODE_MAX_PASSES  = 4;

// The same for decode by matrix instructions, which never makes way for slices below: drafts are attended as single tokens are.
static constexpr int TURBO_MMA_MAX_QUERIES = 16;

//
// kernels
//

// The decode kernels of a pair of types; null where they are not compiled.
struct turbo_decode_pair {
    turbo_attn_decode_t plain;
    turbo_attn_decode_t mma;   // with matrix instructions
    turbo_attn_decode_t wide;  // with those for wide heads
};

template <ggml_type type_K, ggml_type type_V> static turbo_decode_pair turbo_decode_pair_of() {
    turbo_decode_pair pair = { nullptr, nullptr, nullptr };
    if constexpr (turbo_is_decode_pair(type_K, type_V)) {
        pair.plain = ggml_cuda_turbo_decode_pair<type_K, type_V>;
        if constexpr (turbo_has_decode_mma(type_K, type_V)) {
            pair.mma  = ggml_cuda_turbo_decode_mma_pair<type_K, type_V>;
            pair.wide = ggml_cuda_turbo_decode_wide_pair<type_K, type_V>;
        }
    }
    return pair;
}

template <ggml_type type_K> static turbo_decode_pair turbo_decode_pair_of(const ggml_type type_v) {
    switch (type_v) {
#define TURBO_DECODE_V(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                               \
        return turbo_decode_pair_of<type_K, GGML_TYPE_##ENUM>();
        TURBO_DECODE_TYPES_X(TURBO_DECODE_V)
#undef TURBO_DECODE_V
        default:
            return { nullptr, nullptr, nullptr };
    }
}

static turbo_decode_pair turbo_decode_pair_of(const ggml_type type_k, const ggml_type type_v) {
    switch (type_k) {
#define TURBO_DECODE_K(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                               \
        return turbo_decode_pair_of<GGML_TYPE_##ENUM>(type_v);
        TURBO_DECODE_TYPES_X(TURBO_DECODE_K)
#undef TURBO_DECODE_K
        default:
            return { nullptr, nullptr, nullptr };
    }
}

// For the widest vector that divides the spans of a head, see turbo_tile_loader. Spans of an odd number of blocks have none.
static bool turbo_is_aligned(const ggml_tensor * t) {
    const size_t head  = t->ne[0] / ggml_blck_size(t->type) * ggml_type_size(t->type);
    const size_t width = t->type == GGML_TYPE_F16 || head % 16 == 0 ? 16 : head % 8 == 0 ? 8 : head % 4 == 0 ? 4 : 2;
    return (uintptr_t) t->data % width == 0 && t->nb[1] % width == 0 && t->nb[2] % width == 0 && t->nb[3] % width == 0;
}

// Of one launch for all keys; sinks are left to the caller.
static turbo_attn_args turbo_decode_args(const ggml_tensor * dst, const turbo_kv & kv) {
    const ggml_tensor * Q    = dst->src[0];
    const ggml_tensor * K    = kv.K;
    const ggml_tensor * V    = kv.V;
    const ggml_tensor * mask = kv.mask;

    turbo_attn_args a;
    a.Q     = (const char *) Q->data;
    a.K     = (const char *) K->data;
    a.V     = (const char *) V->data;
    a.mask  = mask ? (const char *) mask->data : nullptr;
    a.sinks = nullptr;
    a.dst   = (float *) dst->data;
    a.meta  = nullptr;

    a.part0      = 0;
    a.n_parts    = 1;
    a.n_q        = Q->ne[1];
    a.n_head     = Q->ne[2];
    a.gqa_ratio  = Q->ne[2] / K->ne[2];
    a.n_kv       = K->ne[1];
    a.n_mask_seq = mask ? mask->ne[3] : 1;

    a.nbq1 = Q->nb[1];
    a.nbq2 = Q->nb[2];
    a.nbq3 = Q->nb[3];
    a.nbk1 = K->nb[1];
    a.nbk2 = K->nb[2];
    a.nbk3 = K->nb[3];
    a.nbv1 = V->nb[1];
    a.nbv2 = V->nb[2];
    a.nbv3 = V->nb[3];
    a.nbm1 = mask ? mask->nb[1] : 0;
    a.nbm3 = mask ? mask->nb[3] : 0;

    const turbo_attn_params params = turbo_attn_params_of(dst);

    a.scale       = params.scale;
    a.softcap     = params.softcap;
    a.max_bias    = params.max_bias;
    a.n_head_log2 = params.n_head_log2;
    a.m0          = params.m0;
    a.m1          = params.m1;

    a.aligned = turbo_is_aligned(K) && turbo_is_aligned(V);
    return a;
}

// The decode kernel over one segment of keys. y of the grid are the splits of the keys.
struct turbo_decode_launch {
    turbo_decode_kernels kernels;
    turbo_attn_args      args;
    dim3                 grid;
};

// They read f16 in vectors only.
static bool turbo_suits_mma(const ggml_tensor * t) {
    return t->type != GGML_TYPE_F16 || turbo_is_aligned(t);
}

// Kernels of decode: with dot products, with matrix instructions, and with those for wide heads.
enum turbo_decode_family { TURBO_DECODE_PLAIN, TURBO_DECODE_OWN_TILES, TURBO_DECODE_WIDE };

// Which of them serve dst: all of its segments, so that a token's result is the same in every batch.
static turbo_decode_family turbo_decode_family_of(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const ggml_type type_k    = dst->src[1]->type;
    const ggml_type type_v    = dst->src[2]->type;
    const int       DK        = dst->src[0]->ne[0];
    const int       DV        = dst->ne[0];
    const int       n_columns = dst->src[0]->ne[1] * (dst->src[0]->ne[2] / dst->src[1]->ne[2]);

    const int cc = ggml_cuda_info().devices[ctx.device].cc;

    if (!turbo_decode_prefers_mma(cc, n_columns) || !turbo_suits_mma(dst->src[1]) || !turbo_suits_mma(dst->src[2])) {
        return TURBO_DECODE_PLAIN;
    }
    if (turbo_is_decode_mma(type_k, type_v, DK, DV) && turbo_decode_suits_warp(cc, DV)) {
        return TURBO_DECODE_OWN_TILES;
    }
    const bool wide =
        turbo_is_decode_wide(type_k, type_v, DK, DV) && (GGML_CUDA_CC_IS_RDNA3(cc) || !turbo_is_wide_on_rdna3(DK, DV));
    return wide ? TURBO_DECODE_WIDE : TURBO_DECODE_PLAIN;
}

// Splits of the keys: as many blocks as run at once, but no split without n_keys keys.
static int turbo_decode_n_split(const turbo_decode_kernels & kernels,
                                const int                    n_blocks,
                                const int                    n_kv,
                                const int                    n_keys) {
    const auto kernel    = kernels.widest ? kernels.widest : kernels.decode;
    const int  n_at_once = turbo_blocks_at_once(kernel, TURBO_DECODE_WARPS * TURBO_WARP, 0);
    return std::max(1, std::min((n_kv + n_keys - 1) / n_keys, n_at_once / n_blocks));
}

static turbo_decode_launch turbo_decode_make_launch(const ggml_tensor *       dst,
                                                    const turbo_kv &          kv,
                                                    const turbo_decode_family family) {
    turbo_decode_launch launch;
    launch.args = turbo_decode_args(dst, kv);

    const turbo_decode_pair   pair      = turbo_decode_pair_of(kv.K->type, kv.V->type);
    const turbo_attn_decode_t decode    = family == TURBO_DECODE_PLAIN ? pair.plain :
                                          family == TURBO_DECODE_WIDE  ? pair.wide :
                                                                         pair.mma;
    const int                 n_columns = launch.args.n_q * launch.args.gqa_ratio;

    launch.kernels = decode(dst->src[0]->ne[0], dst->ne[0], n_columns);
    launch.grid    = dim3((n_columns + launch.kernels.n_cols - 1) / launch.kernels.n_cols, 1, kv.K->ne[2] * dst->ne[3]);
    // not by the columns where a token's result shall be the same in every batch
    const int n_blocks = family == TURBO_DECODE_PLAIN ? launch.grid.x * launch.grid.z : launch.grid.z;
    // a tile for each warp; for all of them, two, which are one on CDNA3
    const int n_keys   = TURBO_TILE * (family == TURBO_DECODE_WIDE ? 2 : TURBO_DECODE_WARPS);
    launch.grid.y      = turbo_decode_n_split(launch.kernels, n_blocks, launch.args.n_kv, n_keys);
    return launch;
}

static void turbo_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const turbo_decode_family family) {
    turbo_decode_launch launches[2];
    int                 n_launches = 0;

    turbo_attn_args exact;  // of a segment that the kernel attends that merges
    bool            merges_exact = false;

    launches[n_launches++] = turbo_decode_make_launch(dst, turbo_first_kv(dst), family);
    if (ggml_turbo_flash_attn_has_segment(dst)) {
        exact        = turbo_decode_args(dst, turbo_second_kv(dst));
        merges_exact = ggml_cuda_turbo_merges_exact(exact);
        if (!merges_exact) {
            launches[n_launches++] = turbo_decode_make_launch(dst, turbo_second_kv(dst), family);
        }
    }
    if (dst->src[4]) {
        launches[0].args.sinks = (const float *) dst->src[4]->data;  // they count once
    }

    int n_parts = 0;
    for (int i = 0; i < n_launches; ++i) {
        launches[i].args.part0 = n_parts;
        n_parts += launches[i].grid.y;
    }
    exact.part0 = n_parts;
    n_parts     = std::max(n_parts, merges_exact ? 2 : 1);  // one part alone would be the result

    const int n_rows = ggml_nrows(dst);

    ggml_cuda_pool_alloc<float>  parts(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta(ctx.pool());
    if (n_parts > 1) {
        parts.alloc((size_t) n_rows * n_parts * dst->ne[0]);
        meta.alloc((size_t) n_rows * n_parts);
    }
    for (int i = 0; i < n_launches; ++i) {
        turbo_decode_launch & launch = launches[i];
        if (n_parts > 1) {
            launch.args.n_parts = n_parts;
            launch.args.dst     = parts.ptr;
            launch.args.meta    = meta.ptr;
        }
        turbo_launch(launch.kernels.decode, launch.grid, dim3(TURBO_WARP, TURBO_DECODE_WARPS), 0, ctx.stream(),
                     launch.args);
    }
    if (merges_exact) {
        exact.n_parts = n_parts;
        exact.dst     = parts.ptr;
        exact.meta    = meta.ptr;
        ggml_cuda_turbo_merge_exact(exact, dst->src[0]->ne[0], dst->ne[0], n_rows, (float *) dst->data, ctx.stream());
    } else if (n_parts > 1) {
        turbo_launch(launches[0].kernels.merge, dim3(n_rows), dim3(dst->ne[0]), 0, ctx.stream(),
                     (const float *) parts.ptr, (const float2 *) meta.ptr, (float *) dst->data, n_parts);
    }
}

//
// entry
//

// A directive in the arguments of GGML_LOG_WARN would be too much for MSVC.
static constexpr const char * TURBO_PAIRS_HINT =
    TURBO_ALL_PAIRS ? "Pairs of turbo types, q8_0 and f16 have one." :
                      "Pairs of turbo types, q8_0 and f16 have one in a build with GGML_TURBO_CUDA_ALL_PAIRS defined "
                      "(turbo-gguf build --preset rocm-all-pairs or cuda-all-pairs).";

static void turbo_warn_no_decode_kernel(const ggml_type type_k, const ggml_type type_v) {
    static bool warned = false;
    if (!warned) {
        GGML_LOG_WARN(
            "%s: no decode kernel for K/V types %s/%s is compiled, unpacking slices of the cache to f16 instead "
            "(slow). "
            "%s\n",
            __func__, ggml_type_name(type_k), ggml_type_name(type_v), TURBO_PAIRS_HINT);
        warned = true;
    }
}

// Whether the decode kernel serves an op of few queries faster than slices do.
static bool turbo_decode_pays(const int device, const ggml_tensor * dst, const turbo_attn_decode_t decode) {
    // Pascal but for the P100, and Maxwell, multiply half2 at 1/64 of the rate of f32, if at all; upstream's kernels for slices use f32 there.
    if (!fast_fp16_hardware_available(ggml_cuda_info().devices[device].cc)) {
        return false;
    }
    const int n_q       = dst->src[0]->ne[1];
    const int n_columns = n_q * (dst->src[0]->ne[2] / dst->src[1]->ne[2]);
    const int n_cols    = decode(dst->src[0]->ne[0], dst->ne[0], n_columns).n_cols;
    return n_q == 1 || n_columns <= TURBO_DECODE_MAX_PASSES * n_cols ||
           !ggml_cuda_turbo_slices_use_matrix_cores(device, dst);
}

bool ggml_cuda_turbo_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_type type_k = dst->src[1]->type;
    const ggml_type type_v = dst->src[2]->type;

    const turbo_decode_family family = turbo_decode_family_of(ctx, dst);

    const bool mma = family != TURBO_DECODE_PLAIN;
    if (dst->src[0]->ne[1] > (mma ? TURBO_MMA_MAX_QUERIES : TURBO_DECODE_MAX_QUERIES)) {
        return false;
    }
    const turbo_attn_decode_t decode = turbo_decode_pair_of(type_k, type_v).plain;
    if (!decode) {
        turbo_warn_no_decode_kernel(type_k, type_v);
        return false;
    }
    if (!mma && !turbo_decode_pays(ctx.device, dst, decode)) {
        return false;
    }
    turbo_decode(ctx, dst, family);
    return true;
}
