#pragma once

// Attention of few queries over a long packed cache with wide heads, by the matrix instructions of AMD's CDNA3: what decode-mfma.cuh does, with
// the same arguments, parts and merge. As in decode-mma-wide.cuh, the waves of a block have each tile of 64 keys together: each multiplies its
// own channels of K, adds up the scores of all, and has its own channels of V.

#include "decode-mfma.cuh"
#include "decode-wide.cuh"

#ifdef TURBO_MFMA

// Template arguments as in turbo_mfma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_mfma_wide_shape {
    using parts = turbo_wide_parts<DK, TURBO_MFMA_WAVES>;

    static constexpr int own_K = parts::own;  // channels of a wave
    static constexpr int own_V = DV / TURBO_MFMA_WAVES;

    using own       = turbo_mfma_shape<own_K, own_V, type_K, type_V, n_cols>;
    using keys      = turbo_mfma_keys<type_K, DK>;
    using rest_tile = turbo_wmma_tile<type_K, 64>;

    // 4-byte words of shared memory. Scores lie where rows of K were, and those of V will be
    static constexpr int unit_words = own::max(own::wave_words, TURBO_MFMA_TILE * 16);
    static constexpr int rest_words = parts::rest > 0 ? TURBO_MFMA_TILE * rest_tile::words : 0;
    static constexpr int scores_at  = 0;
    static constexpr int words      = own::max(parts::n * unit_words + rest_words, n_cols * own_V);
    static constexpr int q_words    = own::q_words / own_K * DK;
};

// The state of one wave. Template arguments as in turbo_mfma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
struct turbo_mfma_wide_wave : turbo_mfma_wave<turbo_mfma_wide_shape<DK, DV, type_K, type_V, n_cols>::own_K,
                                              DV / TURBO_MFMA_WAVES,
                                              type_K,
                                              type_V,
                                              n_cols> {
    using shape  = turbo_mfma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using base   = turbo_mfma_wave<shape::own_K, shape::own_V, type_K, type_V, n_cols>;
    using keys   = typename base::keys;
    using values = typename base::values;
    using mask   = typename base::mask;

    static __device__ __forceinline__ int wave() { return turbo_mfma_uniform(threadIdx.y / 2); }

    // Of scores of this lane: [wave][t][lane].
    static __device__ __forceinline__ int place(const int w, const int t) {
        return w * shape::unit_words + (t * TURBO_MFMA_LANES + turbo_mfma_half() * TURBO_WARP + threadIdx.x) * 4;
    }

    // This wave's part of the scores of a tile of K. Q, Q_d: of its channels.
    __device__ __forceinline__ void multiply_own(const typename keys::tile & tile,
                                                 const uint32_t *            Q,
                                                 const float *               Q_d) {
#    pragma unroll
        for (int i = 0; i < 16; ++i) {
            base::s[i / 4][i % 4] = 0.0f;
        }
        base::template multiply_keys<0>(tile, Q, Q_d);
    }

    // Adds those of the rest of the channels.
    __device__ __forceinline__ void multiply_rest(const typename shape::rest_tile & tile,
                                                  const uint32_t *                  Q,
                                                  const float *                     Q_d) {
        turbo_mfma_wave<64, shape::own_V, type_K, type_V, n_cols> rest;
#    pragma unroll
        for (int i = 0; i < 16; ++i) {
            rest.s[i / 4][i % 4] = base::s[i / 4][i % 4];
        }
        rest.template multiply_keys<0>(tile, Q, Q_d);
#    pragma unroll
        for (int i = 0; i < 16; ++i) {
            base::s[i / 4][i % 4] = rest.s[i / 4][i % 4];
        }
    }

    __device__ __forceinline__ void write_scores(float * scores) const {
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
            __align__(16) float x[4];
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                x[r] = base::s[t][r];
            }
            turbo_copy<sizeof(x)>(scores + place(wave(), t), x);
        }
    }

    // The scores of a tile, minus ref, from what all waves have written. Other arguments as of turbo_mfma_wave::score.
    __device__ __forceinline__ void read_scores(const float * scores,
                                                const float   softcap,
                                                const float   slope,
                                                const mask &  m) {
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
            __align__(16) float sum[4];
            turbo_copy<sizeof(sum)>(sum, scores + place(0, t));
#    pragma unroll
            for (int w = 1; w < TURBO_MFMA_WAVES; ++w) {
                __align__(16) float x[4];
                turbo_copy<sizeof(x)>(x, scores + place(w, t));
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    sum[r] += x[r];
                }
            }
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                // tanh without a branch
                const float          x    = softcap == 0.0f ?
                                                sum[r] :
                                                softcap * TURBO_LOG2E * (1.0f - 2.0f / (turbo_wmma_exp2(2.0f * sum[r]) + 1.0f));
                const unsigned short bits = base::bias_of(m, t, r);

                const float score = x + fmaf(slope, __half2float(__ushort_as_half(bits)), -base::ref);
                base::s[t][r]     = bits == TURBO_MASK_HIDDEN ? TURBO_MASKED : score;
            }
        }
    }
};

// As turbo_mfma_tiles, by all waves of a block.
template <bool full, int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ void turbo_mfma_wide_tiles(
    turbo_mfma_wide_wave<DK, DV, type_K, type_V, n_cols> & wave,
    const turbo_attn_args &                                a,
    const turbo_mfma_column &                              column,
    const turbo_wide_unit &                                unit,
    int                                                    it,
    const int                                              step,
    const int                                              n_tiles) {
    using shape = turbo_mfma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using own   = typename shape::own;
    using mask  = turbo_mfma_mask;

    const int half_keys = turbo_mfma_half() * TURBO_TILE;

    turbo_wmma_stream<type_K, shape::own_K, full> stream_K(a, unit.K, a.nbk1,
                                                           unit.rows + half_keys * own::keys::tile::words);
    turbo_wmma_stream<type_V, shape::own_V, full> stream_V(a, unit.V, a.nbv1,
                                                           unit.rows + half_keys * own::values::tile::words);
    turbo_wmma_stream<type_K, 64, false>          stream_rest(a, unit.K_rest, a.nbk1,
                                                              unit.rest + half_keys * shape::rest_tile::words);

    // of a tile
    const auto put_K = [&](const int key0) {
        stream_K.put(key0 + half_keys);
        if (shape::parts::has_rest(unit.number, key0 / TURBO_MFMA_TILE)) {
            stream_rest.put(key0 + half_keys);
        }
    };

    const auto load_mask = [&](const int i) {
        return wave.template load_mask<full>(column, min(i, n_tiles - 1) * TURBO_MFMA_TILE, a.n_kv);
    };
    // From tile i on, with its mask: the same in all waves.
    const auto to_visible = [&](int i, mask & m) {
        while (i < n_tiles && !__any_sync(0xffffffff, m.visible)) {
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
    turbo_mfma_syncwave();
    stream_K.start(it * TURBO_MFMA_TILE + half_keys);
    put_K(it * TURBO_MFMA_TILE);
    stream_V.start(it * TURBO_MFMA_TILE + half_keys);
    while (it < n_tiles) {
        const int key0 = it * TURBO_MFMA_TILE;

        const mask next = load_mask(it + step);
        turbo_mfma_syncwave();
        wave.multiply_own(turbo_mfma_tile_of(stream_K, unit.rows, key0), unit.Q, unit.Q_d);
        if (shape::parts::has_rest(unit.number, it)) {
            wave.multiply_rest(turbo_mfma_tile_of(stream_rest, unit.rest, key0), unit.Q_rest, unit.Q_d_rest);
        }
        turbo_mfma_syncwave();
        wave.write_scores(unit.scores);
        __syncthreads();
        wave.read_scores(unit.scores, a.softcap, column.slope, m);
        __syncthreads();
        stream_V.put(key0 + half_keys);

        m                   = next;
        it                  = to_visible(it + step, m);
        // behind the last tile it is loaded again in vain
        const int next_key0 = it < n_tiles ? it * TURBO_MFMA_TILE : key0;
        stream_K.start(next_key0 + half_keys);

        const bool any = wave.softmax();
        turbo_mfma_syncwave();
        if (any) {
            wave.add_values(turbo_mfma_tile_of(stream_V, unit.rows, key0));
        }
        turbo_mfma_syncwave();
        put_K(next_key0);
        stream_V.start(next_key0 + half_keys);
    }
}

// What a block does. Grid: columns / n_cols, splits of the keys, KV heads x sequences.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ void turbo_mfma_wide_attend(const turbo_attn_args & a) {
    using shape = turbo_mfma_wide_shape<DK, DV, type_K, type_V, n_cols>;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __shared__ float                  Q_d[n_cols * shape::keys::n_groups];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];

    const turbo_wide_block block(a, n_cols);
    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        cols[threadIdx.x] = turbo_column_of(a, block.col0 + threadIdx.x, block.kv_head, block.seq);
    }
    turbo_columns_load_queries<typename shape::keys, type_K, n_cols>(a, block.col0, block.kv_head, block.seq, Q, Q_d);
    __syncthreads();

    turbo_mfma_wide_wave<DK, DV, type_K, type_V, n_cols> wave;

    const turbo_wide_unit unit =
        turbo_wide_unit_of<shape, type_K, type_V, n_cols>(a, block, wave.wave(), shared, Q, Q_d);

    const turbo_decode_column col    = turbo_column_of(a, block.col0 + wave.column(), block.kv_head, block.seq);
    const turbo_mfma_column   column = { a.mask ? col.mask : (const half *) unit.K, a.mask ? 0xffffffff : 0,
                                       col.slope * TURBO_LOG2E };

    // whole tiles first, then the last, if it is not whole
    const int step    = gridDim.y;
    const int n_full  = shape::parts::aligned && a.aligned ? a.n_kv / TURBO_MFMA_TILE : 0;
    const int n_tiles = (a.n_kv + TURBO_MFMA_TILE - 1) / TURBO_MFMA_TILE;

    const int it = blockIdx.y;
    if constexpr (shape::parts::aligned) {
        turbo_mfma_wide_tiles<true>(wave, a, column, unit, it, step, n_full);
    }
    if (n_full < n_tiles) {
        const int it_rest = it >= n_full ? it : it + (n_full - it + step - 1) / step * step;
        turbo_mfma_wide_tiles<false>(wave, a, column, unit, it_rest, step, n_tiles);
    }

    turbo_wide_finish<DV, shape::parts::n>(wave, unit.number, a, cols, (float *) shared, top, meta);
}

#endif  // TURBO_MFMA
