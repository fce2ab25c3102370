#pragma once

// Slices through upstream's kernel for matrix cores. Its host code, which knows the configuration of the kernel for each device, is used as
// it is, except that it calls our launcher; under other names, so that upstream's own instances stay what they are.
//
// For files that instantiate the kernel for some of the tiles of prefill-tiles.cuh.

#include "prefill-tiles.cuh"
#include "prefill.cuh"

// The kernel counts the steps over the keys of all tiles of the result, and gives each block an equal share. Here n_parts blocks share a
// tile. The last one writes its part to the result and its maximum and sum to meta[block]; the others write both to a buffer behind:
// meta[n_blocks + block], then the values.
//
//     DV        head size of V in values
//     ncols1    queries of a tile
//     ncols2    query heads of a tile, which share a KV head
template <int DV, int ncols1, int ncols2> struct turbo_mma_parts {
    float *        result;
    const float2 * meta;
    int            n_parts, n_blocks;
    int            n_q, n_head, gqa_ratio, n_tiles_q, n_tiles_gqa;

    __device__ __forceinline__ int64_t block_of(const int64_t row, const int ip) const {
        const int h = row % n_head;
        const int q = row / n_head % n_q;
        const int s = row / n_head / n_q;

        const int64_t group =
            (int64_t) (s * (n_head / gqa_ratio) + h / gqa_ratio) * n_tiles_gqa + h % gqa_ratio / ncols2;
        return (group * n_tiles_q + q / ncols1) * n_parts + ip;
    }

    __device__ __forceinline__ int column_of(const int64_t row) const {
        return row / n_head % n_q % ncols1 * ncols2 + row % n_head % gqa_ratio % ncols2;
    }

    __device__ __forceinline__ float2 meta_of(const int64_t row, const int ip) const {
        const int64_t block = block_of(row, ip) + (ip + 1 < n_parts ? n_blocks : 0);
        return meta[block * ncols1 * ncols2 + column_of(row)];
    }

    const __device__ __forceinline__ float * values_of(const int64_t row, const int ip) const {
        if (ip + 1 == n_parts) {
            return result + row * DV;
        }
        const float * values = (const float *) (meta + (int64_t) 2 * n_blocks * ncols1 * ncols2);
        return values + (block_of(row, ip) * ncols1 * ncols2 + column_of(row)) * DV;
    }
};

// The lanes of a warp are the only int among the flags at the end of launch_fattn's arguments. Newer upstreams have more flags, before
// and behind it.
template <typename First, typename... Rest> static int turbo_warp_size_of(First first, Rest... rest) {
    if constexpr (std::is_same_v<First, int>) {
        return first;
    } else {
        static_assert(std::is_same_v<First, bool>, "launch_fattn has a new kind of argument");
        return turbo_warp_size_of(rest...);
    }
}

template <int DV, int ncols1, int ncols2, typename... Rest>
static void turbo_launch_attn(ggml_backend_cuda_context & ctx,
                              ggml_tensor *               dst,
                              fattn_kernel_t              kernel,
                              int                         nwarps,
                              size_t                      nbytes_shared,
                              int                         nbatch_fa,
                              Rest... rest) {
    const turbo_slice & slice     = *static_cast<turbo_slice *>(dst);
    const int           warp_size = turbo_warp_size_of(rest...);

    const ggml_tensor * Q = slice.src[0];
    const ggml_tensor * K = slice.src[1];

    turbo_mma_parts<DV, ncols1, ncols2> parts;
    parts.n_q         = Q->ne[1];
    parts.n_head      = Q->ne[2];
    parts.gqa_ratio   = Q->ne[2] / K->ne[2];
    parts.n_tiles_q   = (parts.n_q + ncols1 - 1) / ncols1;
    parts.n_tiles_gqa = (parts.gqa_ratio + ncols2 - 1) / ncols2;

    const int  n_tiles = parts.n_tiles_q * parts.n_tiles_gqa * K->ne[2] * Q->ne[3];
    const dim3 block(warp_size, nwarps);
    parts.n_parts  = turbo_attn_n_parts(kernel, slice, warp_size * nwarps, nbytes_shared, n_tiles, nbatch_fa);
    parts.n_blocks = parts.n_parts * n_tiles;
    GGML_ASSERT((parts.n_parts - 1) * nbatch_fa < K->ne[1]);  // a block without keys would leave nothing
    if (parts.n_parts == 1) {
        turbo_attn_launch_upstream(kernel, slice, dim3(parts.n_blocks), block, nbytes_shared, (float *) slice.data,
                                   nullptr, ctx.stream());
        return;
    }

    // the last parts of the first slice lie where the result goes to
    ggml_cuda_pool_alloc<float> result(ctx.pool());
    parts.result = slice.first ? (float *) slice.data : result.alloc(ggml_nelements(&slice));
    ggml_cuda_pool_alloc<float2> meta(ctx.pool(), (size_t) parts.n_blocks * ncols1 * ncols2 * (2 + DV / 2));
    parts.meta = meta.ptr;

    turbo_attn_launch_upstream(kernel, slice, dim3(parts.n_blocks), block, nbytes_shared, parts.result, meta.ptr,
                               ctx.stream());
    turbo_attn_merge<DV>(ctx, slice, parts);
}

#define launch_fattn                          turbo_launch_attn
#define ggml_cuda_flash_attn_ext_mma_f16_case ggml_cuda_turbo_mma_f16_case
#include "ggml-cuda/fattn-mma-f16.cuh"

// The header only declares its instances.
#define TURBO_MMA_INSTANCE(DK, DV, ncols1, ncols2) DECL_FATTN_MMA_F16_CASE(DK, DV, ncols1, ncols2);

#define TURBO_MMA_CALL(DK, DV, ncols1, ncols2)                             \
    if (tile.is({ DK, DV, ncols1, ncols2 })) {                             \
        ggml_cuda_turbo_mma_f16_case<DK, DV, ncols1, ncols2>(ctx, &slice); \
        return;                                                            \
    }
