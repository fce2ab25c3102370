#pragma once

// Attention of few queries over a long packed cache with wide heads, by AMD's matrix instructions: what decode-wmma.cuh does, with the same
// arguments, parts and merge. As in decode-mma-wide.cuh, the warps of a block have each tile of 32 keys together: each multiplies its own
// channels of K, adds up the scores of all, and has its own channels of V.

#include "decode-mfma-wide.cuh"
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

    // 4-byte words of shared memory. Scores lie where rows of K were, and unpacked values will be
    static constexpr int more_words = own::max(TURBO_TILE * n_cols - own::work_words, 0);
    static constexpr int unit_words = own::warp_words + more_words;
    static constexpr int rest_words = parts::rest > 0 ? (TURBO_TILE * rest_tile::words + 3) / 4 * 4 : 0;
    static constexpr int scores_at  = 0;
    static constexpr int words      = own::max(parts::n * unit_words + rest_words, n_cols * own_V);
    static constexpr int q_words    = own::q_words / own_K * DK;
};

// The state of one warp. Template arguments as in turbo_wmma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
struct turbo_wmma_wide_warp : turbo_wmma_warp<turbo_wmma_wide_shape<DK, DV, type_K, type_V, n_cols>::own_K,
                                              DV / TURBO_DECODE_WARPS,
                                              type_K,
                                              type_V,
                                              n_cols> {
    using shape  = turbo_wmma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using base   = turbo_wmma_warp<shape::own_K, shape::own_V, type_K, type_V, n_cols>;
    using keys   = typename base::keys;
    using values = typename base::values;
    using mask   = typename base::mask;

    static constexpr int nc = base::nc;

    // Of scores of this lane: [warp][four of 2 * nc][lane]
    static __device__ __forceinline__ int place(const int w, const int i) {
        return w * shape::unit_words + (i * TURBO_WARP + threadIdx.x) * 4;
    }

    // This warp's part of the scores of a tile of K. Q, Q_d: of its channels.
    __device__ __forceinline__ void multiply_own(const typename keys::tile & tile,
                                                 const uint32_t *            Q,
                                                 const float *               Q_d) {
        base::clear_scores();
        base::template multiply_keys<0>(tile, Q, Q_d);
    }

    // Adds those of the rest of the channels.
    __device__ __forceinline__ void multiply_rest(const typename shape::rest_tile & tile,
                                                  const uint32_t *                  Q,
                                                  const float *                     Q_d) {
        turbo_wmma_warp<64, shape::own_V, type_K, type_V, n_cols> rest;
#    pragma unroll
        for (int i = 0; i < 2 * nc; ++i) {
            rest.s[i / nc][i % nc] = base::s[i / nc][i % nc];
        }
        rest.template multiply_keys<0>(tile, Q, Q_d);
#    pragma unroll
        for (int i = 0; i < 2 * nc; ++i) {
            base::s[i / nc][i % nc] = rest.s[i / nc][i % nc];
        }
    }

    __device__ __forceinline__ void write_scores(float * scores) const {
#    pragma unroll
        for (int i = 0; i < nc / 2; ++i) {
            __align__(16) float x[4];
#    pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[j] = base::s[4 * i / nc][4 * i % nc + j];
            }
            turbo_copy<sizeof(x)>(scores + place(threadIdx.y, i), x);
        }
    }

    // The scores of a tile, minus ref, from what all warps have written. Other arguments as of turbo_wmma_warp::add_base.
    template <bool full>
    __device__ __forceinline__ void read_scores(const turbo_attn_args &    a,
                                                const turbo_wmma_columns & cols,
                                                const mask &               m,
                                                const int                  key0,
                                                const float *              scores) {
#    pragma unroll
        for (int i = 0; i < nc / 2; ++i) {
            __align__(16) float sum[4];
            turbo_copy<sizeof(sum)>(sum, scores + place(0, i));
#    pragma unroll
            for (int w = 1; w < TURBO_DECODE_WARPS; ++w) {
                __align__(16) float x[4];
                turbo_copy<sizeof(x)>(x, scores + place(w, i));
#    pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sum[j] += x[j];
                }
            }
#    pragma unroll
            for (int j = 0; j < 4; ++j) {
                base::s[4 * i / nc][4 * i % nc + j] = sum[j];
            }
        }
        if (a.softcap != 0.0f) {
            base::cap_scores(a.softcap);
        }
        base::template add_base<full>(a, cols, m, key0);
    }
};

// As turbo_wmma_tiles, by all warps of a block.
template <bool full, int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ void turbo_wmma_wide_tiles(
    turbo_wmma_wide_warp<DK, DV, type_K, type_V, n_cols> & warp,
    const turbo_attn_args &                                a,
    const turbo_wmma_columns &                             cols,
    const turbo_wide_unit &                                unit,
    int                                                    it,
    const int                                              step,
    const int                                              n_tiles) {
    using shape = turbo_wmma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using own   = typename shape::own;
    using mask  = turbo_wmma_mask;

    constexpr int work_words = own::work_words + shape::more_words;

    turbo_wmma_stream<type_K, shape::own_K, full> stream_K(a, unit.K, a.nbk1, unit.rows);
    turbo_wmma_stream<type_V, shape::own_V, full> stream_V(a, unit.V, a.nbv1, unit.rows + work_words);
    turbo_wmma_stream<type_K, 64, false>          stream_rest(a, unit.K_rest, a.nbk1, unit.rest);

    uint32_t * prob = unit.rows + work_words + own::V_words;

    const auto put_K = [&](const int key0) {
        stream_K.put(key0);
        if (shape::parts::has_rest(unit.number, key0 / TURBO_TILE)) {
            stream_rest.put(key0);
        }
    };

    const auto load_mask = [&](const int i) {
        return warp.template load_mask<full>(a, cols, min(i, n_tiles - 1) * TURBO_TILE);
    };
    // From tile i on, with its mask: the same in all warps.
    const auto to_visible = [&](int i, mask & m) {
        while (i < n_tiles && !turbo_warp_any(m.visible)) {
            i += step;
            m = load_mask(i);
        }
        return i;
    };

    if (it >= n_tiles) {
        return;
    }
    mask m = load_mask(it);
    it     = to_visible(it, m);
    if (it >= n_tiles) {
        return;
    }
    turbo_syncwarp();
    stream_K.start(it * TURBO_TILE);
    put_K(it * TURBO_TILE);
    stream_V.start(it * TURBO_TILE);
    while (it < n_tiles) {
        const int key0 = it * TURBO_TILE;

        const mask next = load_mask(it + step);
        turbo_syncwarp();
        warp.multiply_own(stream_K.at(key0), unit.Q, unit.Q_d);
        if (shape::parts::has_rest(unit.number, it)) {
            warp.multiply_rest(stream_rest.at(key0), unit.Q_rest, unit.Q_d_rest);
        }
        turbo_syncwarp();
        warp.write_scores(unit.scores);
        stream_V.put(key0);
        __syncthreads();
        warp.template read_scores<full>(a, cols, m, key0, unit.scores);

        m                   = next;
        it                  = to_visible(it + step, m);
        // behind the last tile it is loaded again in vain
        const int next_key0 = it < n_tiles ? it * TURBO_TILE : key0;
        stream_K.start(next_key0);

        const bool any = warp.softmax(prob);
        __syncthreads();
        if (any) {
            warp.add_values(stream_V.at(key0), prob, unit.rows);
        }
        turbo_syncwarp();
        put_K(next_key0);
        stream_V.start(next_key0);
    }
}

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
    const turbo_wmma_columns columns = { cols, mask, slope, unit.Q, unit.Q_d };

    turbo_wmma_wide_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init(refs[unit.number]);

    // whole tiles first, then the last, if it is not whole
    const int step    = gridDim.y;
    const int n_full  = shape::parts::aligned && a.aligned ? a.n_kv / TURBO_TILE : 0;
    const int n_tiles = (a.n_kv + TURBO_TILE - 1) / TURBO_TILE;

    const int it = blockIdx.y;
    if constexpr (shape::parts::aligned) {
        turbo_wmma_wide_tiles<true>(warp, a, columns, unit, it, step, n_full);
    }
    if (n_full < n_tiles) {
        const int it_rest = it >= n_full ? it : it + (n_full - it + step - 1) / step * step;
        turbo_wmma_wide_tiles<false>(warp, a, columns, unit, it_rest, step, n_tiles);
    }

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
