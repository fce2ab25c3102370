#pragma once

// Launches the decode kernel: chooses the columns of a block and the splits of the keys.

#include "turbo-fattn-decode.cuh"
#include "turbo-fattn-pairs.cuh"
#include "turbo-launch.cuh"

// Splits of the keys: as many blocks as run at once, but no split without a tile for each warp.
static inline int turbo_decode_n_split(const void * kernel, const int n_blocks, const int n_kv) {
    int n_active = 1;  // blocks on one multiprocessor
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_active, kernel, TURBO_DECODE_WARPS * TURBO_WARP, 0));

    const int n_sm    = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    const int n_tiles = (n_kv + TURBO_TILE * TURBO_DECODE_WARPS - 1) / (TURBO_TILE * TURBO_DECODE_WARPS);
    return std::max(1, std::min(n_tiles, n_active * n_sm / n_blocks));
}

template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static void turbo_fattn_decode_launch(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, turbo_fattn_args args) {
    const int n_seq  = dst->ne[3];
    const int n_rows = args.n_head * args.n_q * n_seq;

    dim3 grid((args.n_q * args.gqa_ratio + n_cols - 1) / n_cols, 1, args.n_head / args.gqa_ratio * n_seq);

    const auto kernel = turbo_fattn_decode_kernel<DK, DV, type_K, type_V, n_cols>;
    grid.y            = turbo_decode_n_split((const void *) kernel, grid.x * grid.z, args.n_kv);

    ggml_cuda_pool_alloc<float>  parts(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta(ctx.pool());
    if (grid.y > 1) {
        args.dst  = parts.alloc((size_t) n_rows * grid.y * DV);
        args.meta = meta.alloc((size_t) n_rows * grid.y);
    }

    turbo_launch(kernel, grid, dim3(TURBO_WARP, TURBO_DECODE_WARPS), 0, ctx.stream(), args);
    if (grid.y > 1) {
        turbo_launch(turbo_fattn_merge_splits<DV>, n_rows, DV, 0, ctx.stream(), args.dst, args.meta,
                     (float *) dst->data, (int) grid.y);
    }
}

template <int DK, int DV, ggml_type type_K, ggml_type type_V>
static void turbo_fattn_decode_columns(ggml_backend_cuda_context & ctx,
                                       const ggml_tensor *         dst,
                                       const turbo_fattn_args &    args) {
    const int n = args.n_q * args.gqa_ratio;
    if (n <= 2) {
        turbo_fattn_decode_launch<DK, DV, type_K, type_V, 2>(ctx, dst, args);
    } else if (n <= 4 || DV > 256) {
        turbo_fattn_decode_launch<DK, DV, type_K, type_V, 4>(ctx, dst, args);
    } else if constexpr (DV <= 256) {
        turbo_fattn_decode_launch<DK, DV, type_K, type_V, 8>(ctx, dst, args);
    }
}

// A turbo_fattn_decode_t: all head sizes of a pair of types.
template <ggml_type type_K, ggml_type type_V>
static void turbo_fattn_decode(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const turbo_fattn_args args) {
    const int DK = dst->src[0]->ne[0];
    const int DV = dst->ne[0];
#define TURBO_HEAD_SIZE(K, V)                                                                   \
    if constexpr (K % turbo_block_values(type_K) == 0 && V % turbo_block_values(type_V) == 0) { \
        if (DK == K && DV == V) {                                                               \
            turbo_fattn_decode_columns<K, V, type_K, type_V>(ctx, dst, args);                   \
            return;                                                                             \
        }                                                                                       \
    }
    TURBO_HEAD_SIZE(64, 64)
    TURBO_HEAD_SIZE(96, 96)
    TURBO_HEAD_SIZE(128, 128)
    TURBO_HEAD_SIZE(192, 128)
    TURBO_HEAD_SIZE(256, 256)
    TURBO_HEAD_SIZE(512, 512)
    TURBO_HEAD_SIZE(576, 512)
#undef TURBO_HEAD_SIZE
    GGML_ABORT("head sizes %d/%d", DK, DV);
}
