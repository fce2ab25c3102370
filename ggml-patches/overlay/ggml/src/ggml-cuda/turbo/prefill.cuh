#pragma once

// Attention of many queries: a slice of K and V at a time is unpacked to f16 and given to upstream's own kernels. A second segment of keys
// is in f16 already: it stands behind the only slice, or is the last one. Where there are several slices, the kernels are launched such that
// they leave partial results, which are merged into the result by online softmax. So the scratch does not depend on the length of the context.

#include "attn-host.cuh"
#include "ggml-cuda/fattn-common.cuh"
#include "launch.cuh"

// The attention op of one slice. Upstream's host code takes it for the tensor that it is, and hands it on to our launchers.
struct turbo_slice : ggml_tensor {
    // The result so far: data is [DV, n_head, n_q, n_seq], to be divided by the sums in the end; state: maximum and sum of each row.
    float2 * state;
    bool     first, last;
};

// Whether upstream's kernel for matrix cores is compiled for a slice like this; the tile kernel works for all.
bool ggml_cuda_turbo_prefill_mma_supported(int device, const turbo_slice & slice);
void ggml_cuda_turbo_prefill_mma(ggml_backend_cuda_context & ctx, turbo_slice & slice);
void ggml_cuda_turbo_prefill_tile(ggml_backend_cuda_context & ctx, turbo_slice & slice);

//
// merging
//

// Rows of a block of threads, of which each has four channels.
template <int DV> static constexpr int turbo_merge_rows = DV < 512 ? 512 / DV : 1;

// DV: head size of V in values. Parts tells where the parts of a row are that several blocks left. One of them may lie where the result
// goes to: a thread reads its channels of all parts first.
template <int DV, typename Parts>
static __global__ void turbo_attn_merge_slice(const Parts parts,
                                              float *     dst,
                                              float2 *    state,
                                              const int   n_rows,
                                              const bool  first,
                                              const bool  last) {
    ggml_cuda_pdl_sync();
    const int64_t row   = min((int) (blockIdx.x * turbo_merge_rows<DV> + threadIdx.y), n_rows - 1);
    const bool    store = row == blockIdx.x * turbo_merge_rows<DV> + threadIdx.y;
    const int     i     = 4 * threadIdx.x;

    float max = first ? -FLT_MAX / 2.0f : state[row].x;
    float sum = first ? 0.0f : state[row].y;

    __align__(16) float val[4] = {};
    if (!first) {
        ggml_cuda_memcpy_1<16>(val, dst + row * DV + i);
    }

    for (int ip = 0; ip < parts.n_parts; ++ip) {
        const float2 meta    = parts.meta_of(row, ip);
        const float  max_new = fmaxf(max, meta.x);
        const float  factor  = expf(max - max_new);
        const float  add     = expf(meta.x - max_new);

        __align__(16) float part[4];
        ggml_cuda_memcpy_1<16>(part, parts.values_of(row, ip) + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            val[j] = factor * val[j] + add * part[j];
        }
        sum = factor * sum + add * meta.y;
        max = max_new;
    }

    __syncthreads();  // everybody has read the state
    if (!store) {
        return;
    }
    if (last) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            val[j] = sum != 0.0f ? val[j] / sum : 0.0f;
        }
    } else if (i == 0) {
        state[row] = make_float2(max, sum);
    }
    ggml_cuda_memcpy_1<16>(dst + row * DV + i, val);
}

template <int DV, typename Parts>
static void turbo_attn_merge(ggml_backend_cuda_context & ctx, const turbo_slice & slice, const Parts & parts) {
    constexpr int rows = turbo_merge_rows<DV>;

    const int n_rows = ggml_nrows(&slice);
    turbo_launch(turbo_attn_merge_slice<DV, Parts>, dim3((n_rows + rows - 1) / rows), dim3(DV / 4, rows), 0,
                 ctx.stream(), parts, (float *) slice.data, slice.state, n_rows, slice.first, slice.last);
}

//
// launching
//

// Calls one of upstream's attention kernels for a slice.
static inline void turbo_attn_launch_upstream(const fattn_kernel_t kernel,
                                              const turbo_slice &  slice,
                                              const dim3           grid,
                                              const dim3           block,
                                              const size_t         shared,
                                              float *              dst,
                                              float2 *             meta,
                                              cudaStream_t         stream) {
    const ggml_tensor * Q     = slice.src[0];
    const ggml_tensor * K     = slice.src[1];
    const ggml_tensor * V     = slice.src[2];
    const ggml_tensor * mask  = slice.src[3];
    const ggml_tensor * sinks = slice.src[4];

    const turbo_attn_params p = turbo_attn_params_of(&slice);

    // clang-format off
    turbo_launch(kernel, grid, block, shared, stream,
        (const char *) Q->data, (const char *) K->data, (const char *) V->data,
        (const char *) (mask ? mask->data : nullptr), (const char *) (sinks ? sinks->data : nullptr), (const int *) nullptr,
        dst, meta, p.scale, p.max_bias, p.m0, p.m1, p.n_head_log2, p.softcap,
        (int32_t) Q->ne[0], init_fastdiv_values(Q->ne[1]), (int32_t) Q->ne[2], (int32_t) Q->ne[3],
        (int32_t) Q->nb[1], (int32_t) Q->nb[2], (int32_t) Q->nb[3],
        (int32_t) K->ne[0], (int32_t) K->ne[1], (int32_t) K->ne[2], (int32_t) K->ne[3],
        (int32_t) K->nb[1], (int32_t) K->nb[2], (int64_t) K->nb[3],
        (int32_t) V->nb[1], (int32_t) V->nb[2], (int64_t) V->nb[3],
        (int32_t) (mask ? mask->ne[1] : 0), (int32_t) (mask ? mask->ne[2] : 0), (int32_t) (mask ? mask->ne[3] : 0),
        (int32_t) (mask ? mask->nb[1] : 0), (int32_t) (mask ? mask->nb[2] : 0), (int64_t) (mask ? mask->nb[3] : 0));
    // clang-format on
}

// Blocks that share the keys of one tile of the result: enough to fill the device, and not more than there are steps of n_keys_step keys.
// One leaves a finished result, which is right for the only slice; several leave parts. So a slice of one step has a block without keys.
static inline int turbo_attn_n_parts(const fattn_kernel_t kernel,
                                     const turbo_slice &  slice,
                                     const int            n_threads,
                                     const size_t         shared,
                                     const int            n_tiles,
                                     const int            n_keys_step) {
    const int n_at_once = turbo_blocks_at_once(kernel, n_threads, shared);
    const int n_steps   = (slice.src[1]->ne[1] + n_keys_step - 1) / n_keys_step;
    const int n_min     = slice.first && slice.last ? 1 : 2;
    return std::max(std::min({ n_at_once / n_tiles, n_steps, 8 }), n_min);
}
