#pragma once

// Attention of few queries over a long packed cache with wide heads, by matrix instructions: what decode-mma.cuh does, with the same arguments,
// parts and merge. Sums of such a head are more than the registers of a warp. So the warps of a block have each tile of 32 keys together:
//     scores    each warp multiplies its own channels of K; what all of them have goes through shared memory, and is added in one order
//     softmax   in every warp, of the same scores to the bit, so that all of them know the same maximum and sum
//     values    each warp has its own channels of V
// A warp brings the channels that it reads, so rows need no barrier. What a column's result depends on is as in decode-mma.cuh.

#include "decode-mma.cuh"
#include "decode-wide-scores.cuh"
#include "decode-wide.cuh"

#ifdef TURBO_MMA

// Template arguments as in turbo_mma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_mma_wide_shape {
    using parts = turbo_wide_parts<DK, TURBO_DECODE_WARPS>;

    static constexpr int own_K = parts::own;  // channels of a warp
    static constexpr int own_V = DV / TURBO_DECODE_WARPS;

    using own       = turbo_mma_shape<own_K, own_V, type_K, type_V, n_cols>;
    using keys      = turbo_mma_keys<type_K, DK>;
    using rest_tile = turbo_mma_tile<type_K, 64, false>;

    static constexpr int max(const int a, const int b) { return a > b ? a : b; }

    // 4-byte words of shared memory
    static constexpr int unit_words  = own::warp_words;
    static constexpr int rest_words  = parts::rest > 0 ? (TURBO_TILE * rest_tile::words + 3) / 4 * 4 : 0;
    static constexpr int scores_at   = parts::n * unit_words + rest_words;
    static constexpr int score_words = TURBO_TILE * n_cols;  // of a warp
    static constexpr int words       = max(scores_at + parts::n * score_words, n_cols * own_V);
    static constexpr int q_words     = own::q_words / own_K * DK;

    using scores = turbo_wide_scores<parts::n, TURBO_WARP, score_words>;

    // Of shared memory, with what the block knows of each column. A kernel may have 48 KiB.
    static constexpr int column_bytes =
        sizeof(turbo_decode_column) + TURBO_DECODE_WARPS * sizeof(float2) + (keys::n_groups + 2) * sizeof(float);
    static constexpr bool fits = 4 * (words + q_words) + n_cols * column_bytes <= 48 * 1024;
};

// As turbo_mma_blocks, where some kernels would need a few registers more than are left.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> static constexpr int turbo_mma_wide_blocks() {
    using shape = turbo_mma_wide_shape<DK, DV, type_K, type_V, n_cols>;

    constexpr int n = turbo_mma_blocks<shape::own_V, type_K, type_V, n_cols>();
    return n_cols > 8 && n > 2 && (turbo_is_trellis<type_K> || shape::parts::rest > 0) ? 2 :
           type_K == GGML_TYPE_F16 && n > 3                                            ? 3 :
                                                                                         n;
}

// The state of one warp. Template arguments as in turbo_mma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
struct turbo_mma_wide_warp : turbo_mma_warp<turbo_mma_wide_shape<DK, DV, type_K, type_V, n_cols>::own_K,
                                            DV / TURBO_DECODE_WARPS,
                                            type_K,
                                            type_V,
                                            n_cols> {
    using shape  = turbo_mma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using base   = turbo_mma_warp<shape::own_K, shape::own_V, type_K, type_V, n_cols>;
    using keys   = typename base::keys;
    using values = typename base::values;

    // This warp's part of the scores of a tile of K. Q, Q_d: of its channels.
    __device__ __forceinline__ void multiply_own(const typename keys::tile & t, const uint32_t * Q, const float * Q_d) {
        turbo_wide_clear_scores(base::s);
        base::template multiply_groups<0>(t, Q, Q_d);
    }

    // Adds those of the rest of the channels.
    __device__ __forceinline__ void multiply_rest(const typename shape::rest_tile & t,
                                                  const uint32_t *                  Q,
                                                  const float *                     Q_d) {
        turbo_mma_warp<64, shape::own_V, type_K, type_V, n_cols> rest;
        turbo_wide_copy_scores(rest.s, base::s);
        rest.template multiply_groups<0>(t, Q, Q_d);
        turbo_wide_copy_scores(base::s, rest.s);
    }

    // The scores of a tile, minus ref, from what all warps have written. Other arguments as of turbo_mma_warp::multiply_keys.
    __device__ __forceinline__ void read_scores(const float * scores,
                                                const float * slopes,
                                                const float   softcap,
                                                const bool    one_query) {
        shape::scores::read(base::s, scores, threadIdx.x);
        if (softcap != 0.0f) {
#    pragma unroll
            for (int i = 0; i < 8 * base::nt; ++i) {
                float & x = turbo_wide_score(base::s, i);
                x         = softcap * TURBO_LOG2E * tanhf(x * (1.0f / TURBO_LOG2E));
            }
        }
        base::template add_bias<false>(slopes, one_query);
        if (turbo_warp_any(base::unseen & TURBO_MMA_HIDDEN)) {
            if (one_query) {
                base::template hide<true>();
            } else {
                base::template hide<false>();
            }
        }
    }
};

// Grid: columns / n_cols, splits of the keys, KV heads x sequences. Empty where the GPU has no such instructions.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
__launch_bounds__(TURBO_DECODE_WARPS * TURBO_WARP, (turbo_mma_wide_blocks<DK, DV, type_K, type_V, n_cols>())) static
    __global__ void
    turbo_attn_decode_mma_wide_kernel(const turbo_attn_args a) {
    ggml_cuda_pdl_sync();
#    ifdef TURBO_MMA_DEVICE
    using shape  = turbo_mma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using parts  = typename shape::parts;
    using tile_K = typename shape::own::keys::tile;
    using tile_V = typename shape::own::values::tile;

    using tile_rest = typename shape::rest_tile;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __align__(16) __shared__ float    Q_d[n_cols * shape::keys::n_groups];
    __align__(16) __shared__ float    slopes[n_cols];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];

    const turbo_wide_block block(a, n_cols);
    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        const int c = threadIdx.x;
        cols[c]     = turbo_column_of(a, block.col0 + c, block.kv_head, block.seq);
        slopes[c]   = cols[c].slope * TURBO_LOG2E;
    }
    turbo_columns_load_queries<typename shape::keys, type_K, n_cols>(a, block.col0, block.kv_head, block.seq, Q, Q_d);
    __syncthreads();

    const turbo_wide_unit unit =
        turbo_wide_unit_of<shape, type_K, type_V, n_cols>(a, block, threadIdx.y, shared, Q, Q_d);

    const int n_masked = turbo_mma_count_masked(a, cols, n_cols);

    turbo_mma_wide_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init();

    // every group of copies is committed, empty ones too, so that one group may be left under way at each wait
    const int step    = gridDim.y * TURBO_TILE;
    const int n_whole = parts::aligned && a.aligned ? a.n_kv / TURBO_TILE * TURBO_TILE : 0;
    int       key0    = blockIdx.y * TURBO_TILE;
    uint32_t  seen    = 0;  // not 0: a query sees a key of this lane. The same in all warps

    turbo_mma_stream<tile_K>    K_rows(unit.K, a.nbk1, key0, step, unit.rows);
    turbo_mma_stream<tile_V>    V_rows(unit.V, a.nbv1, key0, step, unit.rows + shape::own::K_words);
    turbo_mma_stream<tile_rest> rest_rows(unit.K_rest, a.nbk1, key0, step, unit.rest);

    // Rows of a head that has a rest suit no vectors, so they are not on their way but there.
    const auto stage_K = [&](const int key) {
        K_rows.stage(a, a.nbk1, key, n_whole);
        if constexpr (parts::rest > 0) {
            rest_rows.stage(a, a.nbk1, parts::has_rest(unit.number, key / TURBO_TILE) ? key : a.n_kv, 0);
        }
    };
    if (key0 < a.n_kv) {
        stage_K(key0);
        V_rows.stage(a, a.nbv1, key0, n_whole);
        seen = warp.load_mask(a, cols, n_masked, key0);
    }
    while (key0 < a.n_kv) {
        const int next = key0 + step;

        turbo_async_wait<1>();
        turbo_syncwarp();
        const bool some = turbo_warp_any(seen);
        if (some) {
            warp.multiply_own(K_rows.current(a, a.nbk1, key0), unit.Q, unit.Q_d);
            if (parts::has_rest(unit.number, key0 / TURBO_TILE)) {
                warp.multiply_rest(rest_rows.current(a, a.nbk1, key0), unit.Q_rest, unit.Q_d_rest);
            }
            shape::scores::write(unit.scores, warp.s, unit.number, threadIdx.x);
        }
        __syncthreads();
        stage_K(next);
        if (some) {
            warp.read_scores(unit.scores, slopes, a.softcap, n_masked >= 0);
        }

        const bool any = some && warp.softmax();

        seen = 0;
        if (next < a.n_kv) {
            seen = warp.load_mask(a, cols, n_masked, next);
        }

        turbo_async_wait<1>();
        turbo_syncwarp();
        if (any) {
            warp.add_values(V_rows.current(a, a.nbv1, key0));
        }
        __syncthreads();
        V_rows.stage(a, a.nbv1, next, n_whole);

        key0 = next;
    }
    turbo_async_wait<0>();

    turbo_wide_finish<DV, parts::n>(warp, unit.number, a, cols, (float *) shared, top, meta);
#    else
    GGML_UNUSED(a);
#    endif  // TURBO_MMA_DEVICE
}

#endif  // TURBO_MMA
