// Slices through upstream's tile kernel, which works on every GPU.

#include "common.cuh"
#include "fattn-tile.cuh"
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

template <int DK, int DV, int n_cols>
static void turbo_prefill_tile_softcap(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    float softcap;
    memcpy(&softcap, (const float *) slice.op_params + 2, sizeof(float));
    if (softcap == 0.0f) {
        turbo_prefill_tile<DK, DV, n_cols, false>(ctx, slice);
    } else {
        turbo_prefill_tile<DK, DV, n_cols, true>(ctx, slice);
    }
}

void ggml_cuda_turbo_prefill_tile(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    switch (slice.src[0]->ne[0]) {
        case 64:
            return turbo_prefill_tile<64, 64, 32, false>(ctx, slice);
        case 96:
            return turbo_prefill_tile<96, 96, 32, false>(ctx, slice);
        case 128:
            return turbo_prefill_tile_softcap<128, 128, 32>(ctx, slice);
        case 192:
            return turbo_prefill_tile_softcap<192, 128, 32>(ctx, slice);
        case 256:
            return turbo_prefill_tile_softcap<256, 256, 32>(ctx, slice);
        case 512:
            return turbo_prefill_tile_softcap<512, 512, 16>(ctx, slice);
        case 576:
            return turbo_prefill_tile_softcap<576, 512, 16>(ctx, slice);
        default:
            GGML_ABORT("head size %d", (int) slice.src[0]->ne[0]);
    }
}
