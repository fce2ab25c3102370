#pragma once

// Attention of few queries over a long packed cache, by the matrix instructions of AMD's CDNA3: what decode.cuh does, with the same arguments,
// parts and merge.
//
// A block is two waves of 64 lanes, and works on up to n_cols columns and on a range of keys, split over its waves in tiles of 64 keys. Within a
// wave, for a tile:
//     scores    keys x columns: int8 levels times the int8 query, summed in integers over a block of K
//     softmax   online, on the fragments of scores: a lane has one column
//     values    channels x columns: V in f16 times probabilities in f16, which are where they were made, summed in f32
// Rows of the next K are on their way in registers during softmax and values, and of V during scores; both halves of a wave bring 32 rows each. No
// step mixes columns, and which wave has a key depends on the grid's y only: so a column's result is the same whatever other columns there are.

#include "decode-columns.cuh"
#include "decode-mfma-wave.cuh"
#include "decode-tiles.cuh"

#ifdef TURBO_MFMA

// Whether a side needs more registers than others: blocks of many levels or values, or rows that are read where they are multiplied.
template <ggml_type type> static constexpr bool turbo_mfma_is_large() {
    if constexpr (type == GGML_TYPE_F16) {
        return true;
    } else {
        return turbo_block_bytes<type> > 16;
    }
}

// Least waves on a SIMD, which leaves 168, 256 or 512 registers. Other GPUs: no limit.
template <int DV, ggml_type type_K, ggml_type type_V> static constexpr int turbo_mfma_min_waves() {
#    ifdef TURBO_MFMA_DEVICE
    return 3 - (DV > 128) - (turbo_mfma_is_large<type_K>() || turbo_mfma_is_large<type_V>());
#    else
    return 1;
#    endif  // TURBO_MFMA_DEVICE
}

// What a block does. Grid: columns / n_cols, splits of the keys, KV heads x sequences.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ void turbo_mfma_attend(const turbo_attn_args & a) {
    using shape = turbo_mfma_shape<DK, DV, type_K, type_V, n_cols>;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __shared__ float                  Q_d[n_cols * shape::keys::n_groups];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];

    const int col0    = blockIdx.x * n_cols;
    const int n_kv_h  = a.n_head / a.gqa_ratio;
    const int kv_head = blockIdx.z % n_kv_h;
    const int seq     = blockIdx.z / n_kv_h;

    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        cols[threadIdx.x] = turbo_column_of(a, col0 + threadIdx.x, kv_head, seq);
    }
    turbo_columns_load_queries<typename shape::keys, type_K, n_cols>(a, col0, kv_head, seq, Q, Q_d);
    __syncthreads();

    turbo_mfma_wave<DK, DV, type_K, type_V, n_cols> wave;

    const char * K = a.K + seq * a.nbk3 + (int64_t) kv_head * a.nbk2;
    const char * V = a.V + seq * a.nbv3 + (int64_t) kv_head * a.nbv2;
    const int    w = turbo_mfma_uniform(threadIdx.y / 2);

    const turbo_decode_column own    = turbo_column_of(a, col0 + wave.column(), kv_head, seq);
    const turbo_mfma_column   column = { a.mask ? own.mask : (const half *) K, a.mask ? 0xffffffff : 0,
                                       own.slope * TURBO_LOG2E };

    const turbo_unit unit = { K, V, Q, Q_d, shared + w * shape::wave_words };

    turbo_all_tiles<turbo_steps>(wave, a, column, unit, blockIdx.y * TURBO_MFMA_WAVES + w,
                                 gridDim.y * TURBO_MFMA_WAVES);
    turbo_columns_finish<DV>(wave, a, cols, (float *) shared, top, meta);
}

#endif  // TURBO_MFMA
