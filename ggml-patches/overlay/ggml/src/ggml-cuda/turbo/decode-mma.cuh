#pragma once

// Attention of few queries over a long packed cache, by matrix instructions: what decode.cuh does, with the same arguments, parts and merge.
//
// A block works on up to n_cols columns and on a range of keys, split over its warps in tiles of 32 keys. Within a warp, for a tile:
//     scores    keys x columns: int8 levels times the int8 query, summed in integers over a block of K
//     softmax   online, on the fragments of scores; the maximum of a column moves only when that column exceeds it by 2^MAX_SLACK
//     values    channels x columns: V in f16 times probabilities in f16, summed in f32
// Packed rows of the next K are on their way during softmax and values, and of the next V during scores. No step mixes columns, and which
// warp has a key depends on the grid's y only: so a column's result is the same whatever other columns there are.

#include "decode-columns.cuh"
#include "decode-mma-warp.cuh"

#ifdef TURBO_MMA

// Least blocks on a multiprocessor, which leaves 128, 168 or 255 registers.
template <int DV, int n_cols> static constexpr int turbo_mma_blocks() {
    return DV > 128 ? 2 : n_cols > 8 ? 3 : 4;
}

// Rows key0 .. of a side on their way to shared memory, if they do not stay where they are.
template <typename tile>
static __device__ __forceinline__ void turbo_mma_stage(const turbo_attn_args & a,
                                                       uint32_t *              dst,
                                                       const char *            x,
                                                       const int               stride,
                                                       const int               key0) {
    if constexpr (tile::words > 0) {
        const char * src = x + (int64_t) key0 * stride;
        if (tile::width > 2 && a.aligned && key0 + TURBO_TILE <= a.n_kv) {
            tile::load(dst, src, stride);
        } else {
            tile::copy(dst, src, stride, a.n_kv - key0);
        }
    }
}

template <typename tile>
static __device__ __forceinline__ tile turbo_mma_tile_at(const turbo_attn_args & a,
                                                         const uint32_t *        staged,
                                                         const char *            x,
                                                         const int               stride,
                                                         const int               key0) {
    if constexpr (tile::words > 0) {
        return { staged };
    } else {
        return { x + (int64_t) key0 * stride, stride, a.n_kv - key0, a.aligned };
    }
}

// Grid: columns / n_cols, splits of the keys, KV heads x sequences. Empty where the GPU has no such instructions.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
__launch_bounds__(TURBO_DECODE_WARPS * TURBO_WARP, (turbo_mma_blocks<DV, n_cols>())) static __global__ void
turbo_attn_decode_mma_kernel(const turbo_attn_args a) {
#    ifdef TURBO_MMA_DEVICE
    using shape  = turbo_mma_shape<DK, DV, type_K, type_V, n_cols>;
    using tile_K = typename shape::keys::tile;
    using tile_V = typename shape::values::tile;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __align__(16) __shared__ float    Q_d[n_cols * shape::keys::n_groups];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];

    const int col0    = blockIdx.x * n_cols;
    const int n_kv_h  = a.n_head / a.gqa_ratio;
    const int kv_head = blockIdx.z % n_kv_h;
    const int seq     = blockIdx.z / n_kv_h;

    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        cols[threadIdx.x] = turbo_mma_column(a, col0 + threadIdx.x, kv_head, seq);
    }
    turbo_mma_load_queries<typename shape::keys, type_K, n_cols>(a, col0, kv_head, seq, Q, Q_d);
    __syncthreads();

    const char * K = a.K + seq * a.nbk3 + (int64_t) kv_head * a.nbk2;
    const char * V = a.V + seq * a.nbv3 + (int64_t) kv_head * a.nbv2;

    uint32_t * K_rows = shared + threadIdx.y * shape::warp_words;
    uint32_t * V_rows = K_rows + shape::K_words;

    const bool one_query = cols[0].mask == cols[n_cols - 1].mask;

    turbo_mma_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init(cols);

    // every group of copies is committed, empty ones too, so that one group may be left under way at each wait
    const int step = gridDim.y * TURBO_DECODE_WARPS * TURBO_TILE;
    int       key0 = (blockIdx.y * TURBO_DECODE_WARPS + threadIdx.y) * TURBO_TILE;
    bool      some = false;  // a query sees a key of the tile
    if (key0 < a.n_kv) {
        turbo_mma_stage<tile_K>(a, K_rows, K, a.nbk1, key0);
        turbo_async_commit();
        turbo_mma_stage<tile_V>(a, V_rows, V, a.nbv1, key0);
        turbo_async_commit();
        some = turbo_warp_any(warp.load_mask(a, cols, one_query, key0));
    }
    for (; key0 < a.n_kv; key0 += step) {
        const int next = key0 + step;

        turbo_async_wait<1>();
        turbo_syncwarp();
        if (some) {
            warp.multiply_keys(turbo_mma_tile_at<tile_K>(a, K_rows, K, a.nbk1, key0), Q, Q_d, a.softcap, one_query);
        }
        turbo_syncwarp();
        if (next < a.n_kv) {
            turbo_mma_stage<tile_K>(a, K_rows, K, a.nbk1, next);
        }
        turbo_async_commit();

        const bool any     = some && warp.softmax();
        bool       visible = false;
        if (next < a.n_kv) {
            visible = warp.load_mask(a, cols, one_query, next);
        }

        turbo_async_wait<1>();
        turbo_syncwarp();
        if (any) {
            warp.add_values(turbo_mma_tile_at<tile_V>(a, V_rows, V, a.nbv1, key0));
        }
        turbo_syncwarp();
        if (next < a.n_kv) {
            turbo_mma_stage<tile_V>(a, V_rows, V, a.nbv1, next);
        }
        turbo_async_commit();
        some = turbo_warp_any(visible);
    }
    turbo_async_wait<0>();

    warp.write_meta(meta[threadIdx.y]);
    __syncthreads();
    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        top[threadIdx.x] = turbo_mma_top(a, cols[threadIdx.x], threadIdx.x, meta);
    }
    __syncthreads();
#        pragma unroll 1
    for (int w = 0; w < TURBO_DECODE_WARPS; ++w) {
        if (w == (int) threadIdx.y) {
            warp.add_sums((float *) shared, top, w == 0);
        }
        __syncthreads();
    }
    turbo_mma_write<DV, n_cols>(a, cols, (const float *) shared, top, meta);
#    else
    GGML_UNUSED(a);
#    endif  // TURBO_MMA_DEVICE
}

#endif  // TURBO_MMA
