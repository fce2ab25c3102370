#pragma once

// Attention of few queries over a long packed cache, by AMD's matrix instructions: what decode.cuh does, with the same arguments, parts and
// merge.
//
// A block works on up to n_cols columns and on a range of keys, split over its warps in tiles of 32 keys. Within a warp, for a tile:
//     scores    columns x keys: the int8 query times int8 levels, summed in integers over a block of K. A lane has the keys whose blocks it
//               unpacks, so their scale is at hand
//     softmax   online, on the fragments of scores; probabilities go through shared memory, where both become operand A
//     values    columns x channels: probabilities in f16 times V in f16, summed in f32
// Rows of the next K are on their way in registers during softmax and values, and of V during scores. No step mixes columns, and which
// warp has a key depends on the grid's y only: so a column's result is the same whatever other columns there are.

#include "decode-columns.cuh"
#include "decode-mfma.cuh"
#include "decode-tiles.cuh"
#include "decode-wmma-warp.cuh"

#ifdef TURBO_WMMA

// Grid: columns / n_cols, splits of the keys, KV heads x sequences. CDNA3's waves have 64 lanes, and a way of their own. Empty where the GPU has
// no such instructions, or too few registers.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
__launch_bounds__(TURBO_DECODE_WARPS * TURBO_WARP, (turbo_mfma_min_waves<DV, type_K, type_V>())) static __global__ void
turbo_attn_decode_wmma_kernel(const turbo_attn_args a) {
    ggml_cuda_pdl_sync();
#    ifdef TURBO_WMMA_DEVICE
    if constexpr (TURBO_WMMA_COPIES == 2 && DV > TURBO_RDNA3_MAX_DV) {
        return;
    }
    using shape = turbo_wmma_shape<DK, DV, type_K, type_V, n_cols>;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __align__(16) __shared__ float    Q_d[n_cols * shape::keys::n_groups];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];
    __align__(16) __shared__ float    slope[n_cols];
    __align__(16) __shared__ float    refs[TURBO_DECODE_WARPS][n_cols];

    const int col0    = blockIdx.x * n_cols;
    const int n_kv_h  = a.n_head / a.gqa_ratio;
    const int kv_head = blockIdx.z % n_kv_h;
    const int seq     = blockIdx.z / n_kv_h;

    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        const int c = threadIdx.x;
        cols[c]     = turbo_column_of(a, col0 + c, kv_head, seq);

        slope[c % 2 * shape::nc + c / 2] = cols[c].slope * TURBO_LOG2E;
    }
    turbo_columns_load_queries<typename shape::keys, type_K, n_cols>(a, col0, kv_head, seq, Q, Q_d);
    __syncthreads();

    const char * K = a.K + seq * a.nbk3 + (int64_t) kv_head * a.nbk2;
    const char * V = a.V + seq * a.nbv3 + (int64_t) kv_head * a.nbv2;

    const turbo_unit unit = { K, V, Q, Q_d, shared + threadIdx.y * shape::warp_words };

    const bool               one_query = col0 / a.gqa_ratio == min((col0 + n_cols - 1) / a.gqa_ratio, a.n_q - 1);
    const half *             mask      = one_query && a.mask ? turbo_column_of(a, col0, kv_head, seq).mask : nullptr;
    const turbo_wmma_columns columns   = { cols, mask, slope };

    turbo_wmma_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init(refs[threadIdx.y]);

    const int it = turbo_uniform(blockIdx.y * TURBO_DECODE_WARPS + threadIdx.y);
    turbo_all_tiles<turbo_steps>(warp, a, columns, unit, it, gridDim.y * TURBO_DECODE_WARPS);
    turbo_columns_finish<DV>(warp, a, cols, (float *) shared, top, meta);
#    elif defined(TURBO_MFMA_DEVICE)
    turbo_mfma_attend<DK, DV, type_K, type_V, n_cols>(a);
#    else
    GGML_UNUSED(a);
#    endif  // TURBO_WMMA_DEVICE
}

#endif  // TURBO_WMMA
