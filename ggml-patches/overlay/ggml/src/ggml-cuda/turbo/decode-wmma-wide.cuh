#pragma once

// Attention of few queries over a long packed cache with wide heads, by AMD's matrix instructions: what decode-wmma.cuh does, with the same
// arguments, parts and merge. As in decode-mma-wide.cuh, the warps of a block have each tile of 32 keys together: each multiplies its own
// channels of K, adds up the scores of all, and has its own channels of V.

#include "decode-mfma-wide.cuh"
#include "decode-wide-scores.cuh"
#include "decode-wide-tiles.cuh"
#include "decode-wide.cuh"
#include "decode-wmma.cuh"

#ifdef TURBO_WMMA

// Template arguments as in turbo_wmma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_wmma_wide_shape {
    using parts = turbo_wide_parts<DK, TURBO_DECODE_WARPS>;

    static constexpr int own_K = parts::own;  // channels of a warp
    static constexpr int own_V = DV / TURBO_DECODE_WARPS;

    using own       = turbo_wmma_shape<own_K, own_V, type_K, type_V, n_cols>;
    using keys      = turbo_wmma_keys<type_K, DK>;
    using rest_tile = turbo_wmma_tile<type_K, 64>;

    static constexpr int  tile    = TURBO_TILE;  // keys
    static constexpr bool aligned = parts::aligned;

    template <bool full> using stream_K = turbo_wmma_stream<type_K, own_K, full>;
    template <bool full> using stream_V = turbo_wmma_stream<type_V, own_V, full>;
    using stream_rest                   = turbo_wmma_stream<type_K, 64, false>;

    // 4-byte words of shared memory. Scores lie where rows of K were, and unpacked values will be
    static constexpr int more_words = own::max(TURBO_TILE * n_cols - own::work_words, 0);
    static constexpr int unit_words = own::warp_words + more_words;
    static constexpr int V_at       = own::work_words + more_words;  // of a unit: rows of V
    static constexpr int prob_at    = V_at + own::V_words;           // and its probabilities
    static constexpr int rest_words = parts::rest > 0 ? (TURBO_TILE * rest_tile::words + 3) / 4 * 4 : 0;
    static constexpr int scores_at  = 0;
    static constexpr int words      = own::max(parts::n * unit_words + rest_words, n_cols * own_V);
    static constexpr int q_words    = own::q_words / own_K * DK;

    using scores = turbo_wide_scores<parts::n, TURBO_WARP, unit_words>;
};

// The state of one warp. Template arguments as in turbo_wmma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
struct turbo_wmma_wide_warp : turbo_wmma_warp<turbo_wmma_wide_shape<DK, DV, type_K, type_V, n_cols>::own_K,
                                              DV / TURBO_DECODE_WARPS,
                                              type_K,
                                              type_V,
                                              n_cols> {
    using shape = turbo_wmma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using base  = turbo_wmma_warp<shape::own_K, shape::own_V, type_K, type_V, n_cols>;
    using rest  = turbo_wmma_warp<64, shape::own_V, type_K, type_V, n_cols>;
    using mask  = typename base::mask;

    static __device__ __forceinline__ int lane() { return threadIdx.x; }

    // The scores of a tile, minus ref, from what all warps have written. Other arguments as of turbo_wmma_warp::add_base.
    template <bool full>
    __device__ __forceinline__ void read_scores(const turbo_attn_args &    a,
                                                const turbo_wmma_columns & cols,
                                                const mask &               m,
                                                const int                  key0,
                                                const float *              scores) {
        shape::scores::read(base::s, scores, lane());
        if (a.softcap != 0.0f) {
            base::cap_scores(a.softcap);
        }
        base::template add_base<full>(a, cols, m, key0);
    }
};

// Grid: columns / n_cols, splits of the keys, KV heads x sequences. CDNA3's waves have 64 lanes, and a way of their own. Empty where the GPU has
// no such instructions, or the head is not wide for it. Shared memory leaves so few blocks that registers need no limit.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
__launch_bounds__(TURBO_DECODE_WARPS * TURBO_WARP, 1) static __global__ void turbo_attn_decode_wmma_wide_kernel(
    const turbo_attn_args a) {
    ggml_cuda_pdl_sync();
#    ifdef TURBO_WMMA_DEVICE
    if constexpr (TURBO_WMMA_COPIES == 1 && turbo_is_wide_on_rdna3(DK, DV)) {
        return;
    }
    using shape = turbo_wmma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using own   = typename shape::own;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __align__(16) __shared__ float    Q_d[n_cols * shape::keys::n_groups];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];
    __align__(16) __shared__ float    slope[n_cols];
    __align__(16) __shared__ float    refs[TURBO_DECODE_WARPS][n_cols];

    const turbo_wide_block block(a, n_cols);
    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        const int c = threadIdx.x;
        cols[c]     = turbo_column_of(a, block.col0 + c, block.kv_head, block.seq);

        slope[c % 2 * own::nc + c / 2] = cols[c].slope * TURBO_LOG2E;
    }
    turbo_columns_load_queries<typename shape::keys, type_K, n_cols>(a, block.col0, block.kv_head, block.seq, Q, Q_d);
    __syncthreads();

    const turbo_wide_unit unit =
        turbo_wide_unit_of<shape, type_K, type_V, n_cols>(a, block, turbo_uniform(threadIdx.y), shared, Q, Q_d);

    const bool   one_query = block.col0 / a.gqa_ratio == min((block.col0 + n_cols - 1) / a.gqa_ratio, a.n_q - 1);
    const half * mask = one_query && a.mask ? turbo_column_of(a, block.col0, block.kv_head, block.seq).mask : nullptr;
    const turbo_wmma_columns columns = { cols, mask, slope };

    turbo_wmma_wide_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init(refs[unit.number]);

    turbo_all_tiles<turbo_wide_steps>(warp, a, columns, unit, blockIdx.y, gridDim.y);
    turbo_wide_finish<DV, shape::parts::n>(warp, unit.number, a, cols, (float *) shared, top, meta);
#    elif defined(TURBO_MFMA_DEVICE)
    if constexpr (!turbo_is_wide_on_rdna3(DK, DV)) {
        turbo_mfma_wide_attend<DK, DV, type_K, type_V, n_cols>(a);
    }
#    else
    GGML_UNUSED(a);
#    endif  // TURBO_WMMA_DEVICE
}

#endif  // TURBO_WMMA
