// Flash attention with a turbo type as K, as V, or as both, or over two segments of keys: which kernels serve an op.

#include "convert.cuh"
#include "fattn.cuh"
#include "turbo/attn-host.cuh"
#include "turbo/decode-choice.cuh"
#include "turbo/decode-pairs.cuh"
#include "turbo/decode-wide.cuh"
#include "turbo/decode.cuh"
#include "turbo/prefill-slices.cuh"
#include "turbo/prefill.cuh"
#include "turbo/turbo.cuh"

// More queries than this are prefill: unpacking a slice once is then cheaper than unpacking it for every few columns. So are fewer, where
// the decode kernel would unpack the cache more often than this, and slices go to matrix cores.
static constexpr int TURBO_DECODE_MAX_QUERIES = 8;
static constexpr int TURBO_DECODE_MAX_PASSES  = 4;

// The same for decode by matrix instructions, which never makes way for slices below: drafts are attended as single tokens are.
static constexpr int TURBO_MMA_MAX_QUERIES = 16;

// One of the segments of keys of an op. Without a mask all keys are seen.
struct turbo_kv {
    const ggml_tensor * K;
    const ggml_tensor * V;
    const ggml_tensor * mask;
};

static turbo_kv turbo_first_kv(const ggml_tensor * dst) {
    return { dst->src[1], dst->src[2], dst->src[3] };
}

// What ggml_turbo_flash_attn_add_segment added.
static turbo_kv turbo_second_kv(const ggml_tensor * dst) {
    return { dst->src[5], dst->src[6], dst->src[7] };
}

//
// what is supported
//

static bool turbo_is_head_size(const int64_t DK, const int64_t DV) {
#define TURBO_IS_HEAD_SIZE(K, V) || (DK == K && DV == V)
    return false GGML_TURBO_HEAD_SIZES_X(TURBO_IS_HEAD_SIZE);
#undef TURBO_IS_HEAD_SIZE
}

static bool turbo_has_whole_blocks(const ggml_tensor * t) {
    return t->ne[0] % ggml_blck_size(t->type) == 0;
}

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

static bool turbo_to_f16_supported(const ggml_type type) {
    return ggml_is_turbo(type) || type == GGML_TYPE_F16 || ggml_get_to_fp16_nc_cuda(type) != nullptr;
}

// f16 rows, aligned for the widest loads, with the shape of the first segment's.
static bool turbo_is_second(const ggml_tensor * second, const ggml_tensor * first) {
    return second && second->type == GGML_TYPE_F16 && second->nb[0] == sizeof(half) && second->ne[0] == first->ne[0] &&
           second->ne[1] > 0 && second->ne[2] == first->ne[2] && second->ne[3] == first->ne[3] &&
           second->nb[1] % 16 == 0 && second->nb[2] % 16 == 0 && second->nb[3] % 16 == 0;
}

static bool turbo_second_kv_supported(const ggml_tensor * dst) {
    const ggml_tensor * Q    = dst->src[0];
    const turbo_kv      kv   = turbo_second_kv(dst);
    const ggml_tensor * mask = kv.mask;

    return dst->src[3] && turbo_is_second(kv.K, dst->src[1]) && turbo_is_second(kv.V, dst->src[2]) &&
           kv.V->ne[1] == kv.K->ne[1] && mask && mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(half) &&
           mask->ne[0] == kv.K->ne[1] && mask->ne[1] >= Q->ne[1] && mask->ne[2] == 1 && Q->ne[3] % mask->ne[3] == 0;
}

bool ggml_cuda_turbo_flash_attn_supported(const int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);
#ifdef FLASH_ATTN_AVAILABLE
    const ggml_tensor * Q    = dst->src[0];
    const ggml_tensor * K    = dst->src[1];
    const ggml_tensor * V    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    // upstream's kernels have the soft cap for some head sizes only
    const float softcap = turbo_attn_params_of(dst).softcap;

    return Q->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && turbo_is_head_size(K->ne[0], V->ne[0]) &&
           turbo_has_whole_blocks(K) && turbo_has_whole_blocks(V) && turbo_to_f16_supported(K->type) &&
           turbo_to_f16_supported(V->type) && Q->nb[0] == sizeof(float) && K->nb[0] == ggml_type_size(K->type) &&
           V->nb[0] == ggml_type_size(V->type) && Q->ne[2] % K->ne[2] == 0 && K->ne[2] == V->ne[2] &&
           K->ne[3] == Q->ne[3] && V->ne[3] == Q->ne[3] &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1)) && (softcap == 0.0f || V->ne[0] >= 128) &&
           (!ggml_turbo_flash_attn_has_segment(dst) || turbo_second_kv_supported(dst));
#else
    GGML_UNUSED(dst);
    return false;
#endif  // FLASH_ATTN_AVAILABLE
}

//
// decode
//

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
// prefill
//

static bool turbo_is_view_of(const ggml_tensor * V, const ggml_tensor * K) {
    return V->data == K->data && V->type == K->type && V->nb[1] == K->nb[1] && V->nb[2] == K->nb[2] &&
           V->nb[3] == K->nb[3];
}

// n keys of a cache from key0 on, as f16; unpacked into scratch unless they are f16 already.
static ggml_tensor turbo_slice_of(const ggml_tensor * cache,
                                  const int64_t       key0,
                                  const int64_t       n,
                                  half *              scratch,
                                  cudaStream_t        stream) {
    ggml_tensor t = *cache;
    t.ne[1]       = n;
    t.data        = (char *) cache->data + key0 * cache->nb[1];
    t.view_src    = nullptr;
    if (cache->type == GGML_TYPE_F16) {
        return t;
    }

    if (ggml_is_turbo(cache->type)) {
        ggml_cuda_turbo_to_f16(cache->type, (const char *) t.data, scratch, t.ne, t.nb, stream);
    } else {
        const size_t ts = ggml_type_size(cache->type);
        ggml_get_to_fp16_nc_cuda(cache->type)(t.data, scratch, t.ne[0], t.ne[1], t.ne[2], t.ne[3], t.nb[1] / ts,
                                              t.nb[2] / ts, t.nb[3] / ts, stream);
    }
    t.type  = GGML_TYPE_F16;
    t.data  = scratch;
    t.nb[0] = sizeof(half);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        t.nb[i] = t.nb[i - 1] * t.ne[i - 1];
    }
    return t;
}

// Attention over one of the segments of keys of dst. state: between the first segment and the last.
static void turbo_prefill_kv(ggml_backend_cuda_context & ctx,
                             const ggml_tensor *         dst,
                             const turbo_kv &            kv,
                             float2 *                    state,
                             const bool                  is_first,
                             const bool                  is_last) {
    const ggml_tensor * K = kv.K;
    const ggml_tensor * V = kv.V;

    const bool    V_is_K_view = turbo_is_view_of(V, K);
    const int64_t n_keys      = turbo_slice_keys(ctx.device, dst->src[0]->ne[1], K, V);
    const int64_t n_max       = std::min(K->ne[1], n_keys + 2 * FATTN_KQ_STRIDE);

    // allocated in this order too: the pool wants it back in reverse
    ggml_cuda_pool_alloc<half> K_f16(ctx.pool());
    ggml_cuda_pool_alloc<half> V_f16(ctx.pool());
    if (K->type != GGML_TYPE_F16) {
        K_f16.alloc(K->ne[0] * n_max * K->ne[2] * K->ne[3]);
    }
    if (V->type != GGML_TYPE_F16 && !V_is_K_view) {
        V_f16.alloc(V->ne[0] * n_max * V->ne[2] * V->ne[3]);
    }

    int64_t n;
    for (int64_t key0 = 0; key0 < K->ne[1]; key0 += n) {
        // a short rest goes with the slice before it
        n = K->ne[1] - key0;
        n = n <= n_keys + 2 * FATTN_KQ_STRIDE ? n : n_keys;

        ggml_tensor K_slice = turbo_slice_of(K, key0, n, K_f16.ptr, ctx.stream());
        ggml_tensor V_slice = V_is_K_view ? K_slice : turbo_slice_of(V, key0, n, V_f16.ptr, ctx.stream());
        ggml_tensor mask;
        V_slice.ne[0] = V->ne[0];

        turbo_slice slice;
        (ggml_tensor &) slice = *dst;
        slice.state           = state;
        slice.first           = is_first && key0 == 0;
        slice.last            = is_last && key0 + n == K->ne[1];
        slice.src[1]          = &K_slice;
        slice.src[2]          = &V_slice;
        ggml_set_op_params_i32(&slice, 4, 0);  // no list of selected keys
        if (kv.mask) {
            mask         = *kv.mask;
            mask.ne[0]   = n;
            mask.data    = (half *) mask.data + key0;
            slice.src[3] = &mask;
        }
        if (!slice.last) {
            slice.src[4] = nullptr;  // sinks count once
        }

        // upstream's kernels for 576/512 take V from K
        const bool whole = slice.first && slice.last && (V_is_K_view || K->ne[0] != 576);
        if (whole && ggml_cuda_flash_attn_ext_supported(ctx.device, &slice)) {
            ggml_cuda_flash_attn_ext(ctx, &slice);
        } else if (ggml_cuda_turbo_prefill_mma_supported(ctx.device, slice)) {
            ggml_cuda_turbo_prefill_mma(ctx, slice);
        } else {
            ggml_cuda_turbo_prefill_tile(ctx, slice);
        }
    }
}

static void turbo_prefill(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const bool has_second = ggml_turbo_flash_attn_has_segment(dst);

    ggml_cuda_pool_alloc<float2> state(ctx.pool(), ggml_nrows(dst));
    turbo_prefill_kv(ctx, dst, turbo_first_kv(dst), state.ptr, true, !has_second);
    if (has_second) {
        turbo_prefill_kv(ctx, dst, turbo_second_kv(dst), state.ptr, false, true);
    }
}

// Of slices that are not the only one.
static bool turbo_slices_use_matrix_cores(const int device, const ggml_tensor * dst) {
    turbo_slice slice;
    (ggml_tensor &) slice = *dst;
    slice.state           = nullptr;
    slice.first = slice.last = true;
    return ggml_cuda_turbo_prefill_mma_supported(device, slice);
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
    return n_q == 1 || n_columns <= TURBO_DECODE_MAX_PASSES * n_cols || !turbo_slices_use_matrix_cores(device, dst);
}

void ggml_cuda_turbo_flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    ggml_cuda_set_device(ctx.device);

    const ggml_type type_k = dst->src[1]->type;
    const ggml_type type_v = dst->src[2]->type;

    const turbo_decode_family family = turbo_decode_family_of(ctx, dst);

    const bool mma = family != TURBO_DECODE_PLAIN;
    if (dst->src[0]->ne[1] <= (mma ? TURBO_MMA_MAX_QUERIES : TURBO_DECODE_MAX_QUERIES)) {
        const turbo_attn_decode_t decode = turbo_decode_pair_of(type_k, type_v).plain;
        if (!decode) {
            turbo_warn_no_decode_kernel(type_k, type_v);
        } else if (mma || turbo_decode_pays(ctx.device, dst, decode)) {
            turbo_decode(ctx, dst, family);
            return;
        }
    }
    turbo_prefill(ctx, dst);
}
