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

// The tiles of a side, one after the other: rows on their way to shared memory, if they do not stay where they are.
template <typename tile> struct turbo_mma_stream {
    static constexpr bool staged = tile::words > 0;

    const char * src;  // of the tile that was staged last: this lane's part, or its rows in f16
    uint32_t *   dst;  // of all tiles
    int64_t      hop;  // bytes from one to the next

    // x: rows; key0: of the first tile; step: keys from one to the next
    __device__ __forceinline__ turbo_mma_stream(const char * x,
                                                const int    stride,
                                                const int    key0,
                                                const int    step,
                                                uint32_t *   dst) :
        dst(dst),
        hop((int64_t) step * stride) {
        src = x + (int64_t) (key0 - step) * stride;
        if constexpr (staged) {
            src += tile::lane_bytes(stride);
        }
    }

    // key0: of the next tile. n_whole: keys of tiles that may be copied as a whole
    __device__ __forceinline__ void stage(const turbo_attn_args & a,
                                          const int               stride,
                                          const int               key0,
                                          const int               n_whole) {
        src += hop;
        if constexpr (staged) {
            if (tile::width > 2 && key0 < n_whole) {
                tile::load(dst + tile::lane_words(), src, stride);
            } else if (key0 < a.n_kv) {
                // lane 0 begins where the rows do; no other pointer is carried along for a tile at the end
                const auto rows = __shfl_sync(0xffffffff, (unsigned long long) src, 0, TURBO_WARP);
                tile::copy(dst, (const char *) rows, stride, a.n_kv - key0);
            }
        }
        turbo_async_commit();
    }

    // The tile that was staged last.
    __device__ __forceinline__ tile current(const turbo_attn_args & a, const int stride, const int key0) const {
        if constexpr (staged) {
            return { dst };
        } else {
            return { src, stride, a.n_kv - key0 };
        }
    }
};

// Keys whose mask is one for all columns of a block, since they are of one query (0: there is no mask); -1: they are of several.
static __device__ __forceinline__ int turbo_mma_count_masked(const turbo_attn_args &     a,
                                                             const turbo_decode_column * cols,
                                                             const int                   n_cols) {
    return cols[0].mask != cols[n_cols - 1].mask ? -1 : a.mask ? a.n_kv : 0;
}

// Grid: columns / n_cols, splits of the keys, KV heads x sequences. Empty where the GPU has no such instructions.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
__launch_bounds__(TURBO_DECODE_WARPS * TURBO_WARP, (turbo_mma_blocks<DV, type_K, type_V, n_cols>())) static
    __global__ void
    turbo_attn_decode_mma_kernel(const turbo_attn_args a) {
    ggml_cuda_pdl_sync();
#    ifdef TURBO_MMA_DEVICE
    using shape  = turbo_mma_shape<DK, DV, type_K, type_V, n_cols>;
    using tile_K = typename shape::keys::tile;
    using tile_V = typename shape::values::tile;

    __align__(16) __shared__ uint32_t shared[shape::words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __align__(16) __shared__ float    Q_d[n_cols * shape::keys::n_groups];
    __align__(16) __shared__ float    slopes[n_cols];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];
    __shared__ float                  top[n_cols];

    const int col0    = blockIdx.x * n_cols;
    const int n_kv_h  = a.n_head / a.gqa_ratio;
    const int kv_head = blockIdx.z % n_kv_h;
    const int seq     = blockIdx.z / n_kv_h;

    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        const int c = threadIdx.x;
        cols[c]     = turbo_column_of(a, col0 + c, kv_head, seq);
        slopes[c]   = cols[c].slope * TURBO_LOG2E;
    }
    turbo_columns_load_queries<typename shape::keys, type_K, n_cols>(a, col0, kv_head, seq, Q, Q_d);
    __syncthreads();

    const char * K = a.K + seq * a.nbk3 + (int64_t) kv_head * a.nbk2;
    const char * V = a.V + seq * a.nbv3 + (int64_t) kv_head * a.nbv2;

    const int n_masked = turbo_mma_count_masked(a, cols, n_cols);

    turbo_mma_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init();

    // every group of copies is committed, empty ones too, so that one group may be left under way at each wait
    const int step    = gridDim.y * TURBO_DECODE_WARPS * TURBO_TILE;
    const int n_whole = a.aligned ? a.n_kv / TURBO_TILE * TURBO_TILE : 0;
    int       key0    = (blockIdx.y * TURBO_DECODE_WARPS + threadIdx.y) * TURBO_TILE;
    uint32_t  seen    = 0;  // not 0: a query sees a key of this lane

    turbo_mma_stream<tile_K> K_rows(K, a.nbk1, key0, step, shared + threadIdx.y * shape::warp_words);
    turbo_mma_stream<tile_V> V_rows(V, a.nbv1, key0, step, shared + threadIdx.y * shape::warp_words + shape::K_words);
    if (key0 < a.n_kv) {
        K_rows.stage(a, a.nbk1, key0, n_whole);
        V_rows.stage(a, a.nbv1, key0, n_whole);
        seen = warp.load_mask(a, cols, n_masked, key0);
    }
    while (key0 < a.n_kv) {
        const int next = key0 + step;

        turbo_async_wait<1>();
        turbo_syncwarp();
        const bool some = turbo_warp_any(seen);
        if (some) {
            warp.multiply_keys(K_rows.current(a, a.nbk1, key0), Q, Q_d, slopes, a.softcap, n_masked >= 0);
        }
        turbo_syncwarp();
        K_rows.stage(a, a.nbk1, next, n_whole);

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
        turbo_syncwarp();
        V_rows.stage(a, a.nbv1, next, n_whole);

        key0 = next;
    }
    turbo_async_wait<0>();

    turbo_columns_finish<DV>(warp, a, cols, (float *) shared, top, meta);
#    else
    GGML_UNUSED(a);
#    endif  // TURBO_MMA_DEVICE
}

#endif  // TURBO_MMA
