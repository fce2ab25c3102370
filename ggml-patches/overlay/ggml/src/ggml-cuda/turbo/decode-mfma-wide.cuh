#pragma once

// Attention of few queries over a long packed cache with wide heads, by the matrix instructions of AMD's CDNA3: what decode-mfma.cuh does, with
// the same arguments, parts and merge. As in decode-mma-wide.cuh, the waves of a block have each tile of 64 keys together: each multiplies its
// own channels of K, adds up the scores of all, and has its own channels of V.

#include "decode-mfma.cuh"
#include "decode-wide-scores.cuh"
#include "decode-wide-tiles.cuh"
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

    static constexpr int  tile    = TURBO_MFMA_TILE;  // keys
    static constexpr bool aligned = parts::aligned;

    template <bool full> using stream_K = turbo_mfma_stream<type_K, own_K, full>;
    template <bool full> using stream_V = turbo_mfma_stream<type_V, own_V, full>;
    using stream_rest                   = turbo_mfma_stream<type_K, 64, false>;

    // 4-byte words of shared memory. Scores lie where rows of K were, and those of V will be
    static constexpr int unit_words = own::max(own::wave_words, TURBO_MFMA_TILE * 16);
    static constexpr int V_at       = own::V_at;  // of a unit: rows of V
    static constexpr int prob_at    = own::prob_at;
    static constexpr int rest_words = parts::rest > 0 ? TURBO_MFMA_TILE * rest_tile::words : 0;
    static constexpr int scores_at  = 0;
    static constexpr int words      = own::max(parts::n * unit_words + rest_words, n_cols * own_V);
    static constexpr int q_words    = own::q_words / own_K * DK;

    using scores = turbo_wide_scores<parts::n, TURBO_MFMA_LANES, unit_words>;
};

// The state of one wave. Template arguments as in turbo_mfma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
struct turbo_mfma_wide_wave : turbo_mfma_wave<turbo_mfma_wide_shape<DK, DV, type_K, type_V, n_cols>::own_K,
                                              DV / TURBO_MFMA_WAVES,
                                              type_K,
                                              type_V,
                                              n_cols> {
    using shape = turbo_mfma_wide_shape<DK, DV, type_K, type_V, n_cols>;
    using base  = turbo_mfma_wave<shape::own_K, shape::own_V, type_K, type_V, n_cols>;
    using rest  = turbo_mfma_wave<64, shape::own_V, type_K, type_V, n_cols>;
    using mask  = typename base::mask;

    static __device__ __forceinline__ int wave() { return turbo_mfma_uniform(threadIdx.y / 2); }

    static __device__ __forceinline__ int lane() { return turbo_mfma_half() * TURBO_WARP + threadIdx.x; }

    // The scores of a tile, minus ref, from what all waves have written.
    template <bool full>
    __device__ __forceinline__ void read_scores(const turbo_attn_args &   a,
                                                const turbo_mfma_column & column,
                                                const mask &              m,
                                                const int                 key0,
                                                const float *             scores) {
        GGML_UNUSED(key0);
        shape::scores::read(base::s, scores, lane());
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                float x = base::s[t][r];
                if (a.softcap != 0.0f) {
                    // tanh without a branch
                    x = a.softcap * TURBO_LOG2E * (1.0f - 2.0f / (turbo_wmma_exp2(2.0f * x) + 1.0f));
                }
                const unsigned short bits = base::bias_of(m, t, r);
                x += fmaf(column.slope, __half2float(__ushort_as_half(bits)), -base::ref);
                base::s[t][r] = bits == TURBO_MASK_HIDDEN ? TURBO_MASKED : x;
            }
        }
    }
};

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

    turbo_all_tiles<turbo_wide_steps>(wave, a, column, unit, blockIdx.y, gridDim.y);
    turbo_wide_finish<DV, shape::parts::n>(wave, unit.number, a, cols, (float *) shared, top, meta);
}

#endif  // TURBO_MFMA
