// Slices through upstream's tile kernel, which works on every GPU.

#include "common.cuh"
#include "fattn-tile.cuh"
#include "turbo/list.h"
#include "turbo/prefill.cuh"

// gridDim.y blocks share the keys of a tile; part y of a row is row * gridDim.y + y.
template <int DV> struct turbo_tile_parts {
    const float *  values;
    const float2 * meta;
    int            n_parts;

    const __device__ __forceinline__ float * values_of(const int64_t row, const int ip) const {
        return values + (row * n_parts + ip) * DV;
    }

    __device__ __forceinline__ float2 meta_of(const int64_t row, const int ip) const {
        return meta[row * n_parts + ip];
    }
};

// DK, DV: head sizes of K and V in values. n_cols: queries of a tile.
template <int DK, int DV, int n_cols, bool use_softcap>
static void turbo_prefill_tile(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    const int cc = ggml_cuda_info().devices[ctx.device].cc;

    const fattn_kernel_t kernel    = flash_attn_tile<DK, DV, n_cols, 1, use_softcap>;
    const int            n_threads = ggml_cuda_fattn_tile_get_nthreads(DK, DV, n_cols, cc);
    const int            step      = ggml_cuda_fattn_tile_get_nbatch_fa(DK, DV, n_cols, cc);
    const dim3           block(WARP_SIZE, n_threads / WARP_SIZE);

    dim3 grid((slice.src[0]->ne[1] + n_cols - 1) / n_cols, 1, slice.src[0]->ne[2] * slice.src[0]->ne[3]);
    grid.y = turbo_attn_n_parts(kernel, slice, n_threads, 0, grid.x * grid.z, step);
    if (grid.y == 1) {
        turbo_attn_launch_upstream(kernel, slice, grid, block, 0, (float *) slice.data, nullptr, ctx.stream());
        return;
    }

    const size_t                 n_parts = (size_t) ggml_nrows(&slice) * grid.y;
    ggml_cuda_pool_alloc<float>  values(ctx.pool(), n_parts * DV);
    ggml_cuda_pool_alloc<float2> meta(ctx.pool(), n_parts);

    turbo_attn_launch_upstream(kernel, slice, grid, block, 0, values.ptr, meta.ptr, ctx.stream());
    turbo_attn_merge<DV>(ctx, slice, turbo_tile_parts<DV>{ values.ptr, meta.ptr, (int) grid.y });
}

// Upstream compiles the soft cap for heads from 128 on, and tiles of 16 columns at most for the largest.
template <int DK, int DV> static void turbo_prefill_tile_head(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    constexpr int n_cols = DV > 256 ? 16 : 32;

    const float softcap = turbo_attn_params_of(&slice).softcap;
    if constexpr (DV >= 128) {
        if (softcap != 0.0f) {
            turbo_prefill_tile<DK, DV, n_cols, true>(ctx, slice);
            return;
        }
    }
    turbo_prefill_tile<DK, DV, n_cols, false>(ctx, slice);
}

void ggml_cuda_turbo_prefill_tile(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    const int DK = slice.src[0]->ne[0];
    const int DV = slice.ne[0];
#define TURBO_HEAD_SIZE(K, V)                             \
    if (DK == K && DV == V) {                             \
        return turbo_prefill_tile_head<K, V>(ctx, slice); \
    }
    GGML_TURBO_HEAD_SIZES_X(TURBO_HEAD_SIZE)
#undef TURBO_HEAD_SIZE
    GGML_ABORT("head sizes %d/%d", DK, DV);
}
