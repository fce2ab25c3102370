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
#include "wmma-stream.cuh"

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

// The tile of a wave, whose rows are in shared memory; f16 stays where it is.
template <ggml_type type, int D, bool full>
static __device__ __forceinline__ turbo_wmma_tile<type, D>
turbo_mfma_tile_of(const turbo_wmma_stream<type, D, full> & stream, const uint32_t * rows, const int key0) {
    if constexpr (type == GGML_TYPE_F16) {
        GGML_UNUSED(rows);
        return stream.at(key0);
    } else {
        GGML_UNUSED_VARS(stream, key0);
        return { rows };
    }
}

// Of the tiles it, it + step, .. < n_tiles those with a key that is seen. rows: shared memory of the wave.
template <bool full, int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ void turbo_mfma_tiles(turbo_mfma_wave<DK, DV, type_K, type_V, n_cols> & wave,
                                                        const turbo_attn_args &                           a,
                                                        const turbo_mfma_column &                         column,
                                                        const uint32_t *                                  Q,
                                                        const float *                                     Q_d,
                                                        const char *                                      K,
                                                        const char *                                      V,
                                                        uint32_t *                                        rows,
                                                        int                                               it,
                                                        const int                                         step,
                                                        const int                                         n_tiles) {
    using shape = turbo_mfma_shape<DK, DV, type_K, type_V, n_cols>;
    using mask  = turbo_mfma_mask;

    const int half_keys = turbo_mfma_half() * TURBO_TILE;

    turbo_wmma_stream<type_K, DK, full> stream_K(a, K, a.nbk1, rows + half_keys * shape::keys::tile::words);
    turbo_wmma_stream<type_V, DV, full> stream_V(a, V, a.nbv1, rows + half_keys * shape::values::tile::words);

    const auto load_mask = [&](const int i) {
        return wave.template load_mask<full>(column, min(i, n_tiles - 1) * TURBO_MFMA_TILE, a.n_kv);
    };
    // From tile i on, with its mask. Tiles of which no query sees a key are passed over before anything of them is loaded.
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
    stream_K.put(it * TURBO_MFMA_TILE + half_keys);
    stream_V.start(it * TURBO_MFMA_TILE + half_keys);
    while (it < n_tiles) {
        const int key0 = it * TURBO_MFMA_TILE;

        const mask next   = load_mask(it + step);
        const bool hidden = __any_sync(0xffffffff, m.hidden);
        turbo_mfma_syncwave();
        wave.score(turbo_mfma_tile_of(stream_K, rows, key0), Q, Q_d, a.softcap, column.slope, m, hidden);
        turbo_mfma_syncwave();
        stream_V.put(key0 + half_keys);

        m                   = next;
        it                  = to_visible(it + step, m);
        // behind the last tile it is loaded again in vain
        const int next_key0 = it < n_tiles ? it * TURBO_MFMA_TILE : key0;
        stream_K.start(next_key0 + half_keys);

        const bool any = wave.softmax();
        turbo_mfma_syncwave();
        if (any) {
            wave.add_values(turbo_mfma_tile_of(stream_V, rows, key0));
        }
        turbo_mfma_syncwave();
        stream_K.put(next_key0 + half_keys);
        stream_V.start(next_key0 + half_keys);
    }
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

    // whole tiles first, then the last, if it is not whole
    const int step    = gridDim.y * TURBO_MFMA_WAVES;
    const int n_full  = a.aligned ? a.n_kv / TURBO_MFMA_TILE : 0;
    const int n_tiles = (a.n_kv + TURBO_MFMA_TILE - 1) / TURBO_MFMA_TILE;

    const int  it   = blockIdx.y * TURBO_MFMA_WAVES + w;
    uint32_t * rows = shared + w * shape::wave_words;
    turbo_mfma_tiles<true>(wave, a, column, Q, Q_d, K, V, rows, it, step, n_full);
    if (n_full < n_tiles) {
        const int it_rest = it >= n_full ? it : it + (n_full - it + step - 1) / step * step;
        turbo_mfma_tiles<false>(wave, a, column, Q, Q_d, K, V, rows, it_rest, step, n_tiles);
    }

    turbo_columns_finish<DV>(wave, a, cols, (float *) shared, top, meta);
}

#endif  // TURBO_MFMA
