#pragma once

// Attention of few queries over a long packed cache.
//
// A block works on up to n_cols columns (query heads of one KV head, times queries) and on a range of keys, split over its warps in tiles of
// 32 keys; so each packed value is unpacked once for all columns. Within a warp, for a tile:
//     scores    a lane is a key: int8 codebook values times the int8 query (dp4a), the query broadcast from shared memory
//     softmax   online, over the lanes; the maximum moves only when it is exceeded by 2^MAX_SLACK
//     values    V is unpacked to f16 in shared memory, then a lane is 8 channels of some of the keys: half2 products of a tile are
//               summed in f16, tiles in f32
// Warps meet at the end only. Each split of the keys over blocks is a part, and so are those of a second segment of keys, which another
// instance of the kernel makes; turbo_attn_merge_parts merges them.

#include "decode-warp.cuh"

// The way of K and V into the shared memory of a warp. What comes next is loaded into registers while a part is worked on: the next piece
// of K and then V during the scores, the next tile's K and the next part of V during the values.
// full: all tiles are whole, and aligned for vectors; else rows are copied when needed.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols, bool full> struct turbo_decode_stream {
    using shape    = turbo_decode_shape<DK, DV, type_K, type_V, n_cols>;
    using loader_K = typename shape::loader_K;
    using loader_V = typename shape::loader_V;

    const turbo_attn_args & a;

    const char * K;
    const char * V;
    uint32_t *   raw;
    half2 *      tile;

    __align__(16) uint32_t regs_K[loader_K::n_regs];
    __align__(16) uint32_t regs_V[loader_V::n_regs];

    __device__ __forceinline__ turbo_decode_stream(const turbo_attn_args & a,
                                                   const char *            K,
                                                   const char *            V,
                                                   uint32_t *              raw,
                                                   half2 *                 tile) :
        a(a),
        K(K),
        V(V),
        raw(raw),
        tile(tile) {}

    const __device__ __forceinline__ char * at_K(const int key, const int ip) const {
        return K + (int64_t) key * a.nbk1 + ip * loader_K::bytes;
    }

    const __device__ __forceinline__ char * at_V(const int key0, const int is) const {
        return V + (int64_t) (key0 + is * shape::sub_keys) * a.nbv1;
    }

    __device__ __forceinline__ void prefetch_K(const int key0, const int ip) {
        if constexpr (full && shape::prefetch_K) {
            loader_K::load(regs_K, at_K(key0, ip), a.nbk1);
        }
    }

    __device__ __forceinline__ void prefetch_V(const int key0, const int is) {
        if constexpr (full && shape::prefetch_V) {
            loader_V::load(regs_V, at_V(key0, is), a.nbv1);
        }
    }

    template <typename loader, bool prefetched>
    static __device__ __forceinline__ void take(uint32_t * raw,
                                                const uint32_t (&regs)[loader::n_regs],
                                                const char * src,
                                                const int    stride,
                                                const int    n_valid) {
        turbo_syncwarp();
        if constexpr (full && prefetched) {
            loader::store(raw, regs);
        } else if constexpr (full && loader::width > 2) {
            loader::template copy<uint32_t, 4>(raw, src, stride, n_valid);
        } else {
            loader::template copy<uint16_t, full ? 4 : 1>(raw, src, stride, n_valid);
        }
        turbo_syncwarp();
    }

    __device__ __forceinline__ void take_K(const int key0, const int ip) {
        take<loader_K, shape::prefetch_K>(raw, regs_K, at_K(key0, ip), a.nbk1, a.n_kv - key0);
        if (ip + 1 < shape::n_pieces) {
            prefetch_K(key0, ip + 1);
        } else {
            prefetch_V(key0, 0);
        }
    }

    __device__ __forceinline__ void take_V(const int key0, const int is) {
        if constexpr (!shape::packed_V) {
            copy_f16<DV, shape::sub_keys>(at_V(key0, is), a.nbv1, a.n_kv - key0 - is * shape::sub_keys);
        } else if (is % shape::load_subs == 0) {
            take<loader_V, shape::prefetch_V>(raw, regs_V, at_V(key0, is), a.nbv1,
                                              a.n_kv - key0 - is * shape::sub_keys);
            if (is + shape::load_subs < shape::n_subs) {
                prefetch_V(key0, is + shape::load_subs);
            }
        } else {
            turbo_syncwarp();
        }
    }

    __device__ __forceinline__ void take_K_f16(const int key0, const int ip) {
        copy_f16<shape::f16_piece, TURBO_TILE>(K + (int64_t) key0 * a.nbk1 + ip * shape::f16_piece * (int) sizeof(half),
                                               a.nbk1, a.n_kv - key0);
        if (ip == 0) {
            prefetch_V(key0, 0);
        }
    }

    // n_rows rows of n values, to chunks of 8 values. Where nothing is loaded ahead, there are registers for more loads at once.
    template <int n, int n_rows>
    __device__ __forceinline__ void copy_f16(const char * src, const int64_t stride, const int n_valid) {
        [[maybe_unused]] constexpr int unroll = !full ? 1 : shape::packed_K || shape::packed_V ? 4 : 8;
        turbo_syncwarp();
#pragma unroll unroll
        for (int i0 = 0; i0 < n_rows * n / 8; i0 += TURBO_WARP) {
            const int i     = i0 + threadIdx.x;
            const int row   = i / (n / 8);
            const int chunk = i % (n / 8);

            const char * x = src + min(row, n_valid - 1) * stride + chunk * 16;
            half2 *      y = tile + (chunk * (n_rows + 1) + row) * 4;
            if constexpr (full) {
                ggml_cuda_memcpy_1<16>(y, x);
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    ((half *) y)[j] = ((const half *) x)[j];
                }
            }
        }
        turbo_syncwarp();
    }
};

// Quantizes the queries of a block to int8 with a scale per 32 values, in the order of K's unpacked words; or to f16 for K in f16.
template <int DK, ggml_type type_K, int n_cols>
static __device__ __forceinline__ void turbo_decode_load_queries(const turbo_attn_args & a,
                                                                 const int               col0,
                                                                 const int               kv_head,
                                                                 const int               seq,
                                                                 uint32_t *              Q,
                                                                 float *                 Q_d) {
    // groups of 8 lanes, each with 32 values of a column; all of them stay to the end, for the shuffles
    const int tid = threadIdx.y * TURBO_WARP + threadIdx.x;
    for (int i0 = 0; i0 < n_cols * DK / 32; i0 += TURBO_DECODE_WARPS * TURBO_WARP / 8) {
        const int  i    = i0 + tid / 8;
        const bool used = i < n_cols * DK / 32;

        const int c = i % n_cols;
        const int b = i / n_cols;
        const int q = (col0 + c) / a.gqa_ratio;
        const int h = kv_head * a.gqa_ratio + (col0 + c) % a.gqa_ratio;

        const float * src = (const float *) (a.Q + seq * a.nbq3 + (int64_t) h * a.nbq2 + (int64_t) q * a.nbq1) + b * 32;

        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int k = type_K == GGML_TYPE_F16 ? 4 * (tid % 8) + j : turbo_group_order<type_K>(tid % 8, j);
            x[j]        = used && q < a.n_q ? a.scale * src[k] : 0.0f;
        }

        if constexpr (type_K == GGML_TYPE_F16) {
            if (used) {
                half2 * dst = (half2 *) Q + (c * DK + b * 32 + 4 * (tid % 8)) / 2;
                dst[0]      = make_half2(x[0], x[1]);
                dst[1]      = make_half2(x[2], x[3]);
            }
            continue;
        }

        float          d;
        const uint32_t word = turbo_quantize_query<8>(x, d);
        if (used) {
            Q[i * 8 + tid % 8] = word;
        }
        if (used && tid % 8 == 0) {
            Q_d[i] = d;
        }
    }
}

// The arguments that the end of a kernel needs, read again: else they stay in scalar registers all along. a: its first argument
static __device__ __forceinline__ turbo_attn_args turbo_args_again(const turbo_attn_args & a) {
#ifdef __HIP_DEVICE_COMPILE__
    GGML_UNUSED(a);
    typedef const __attribute__((address_space(4))) turbo_attn_args * pointer;  // constant memory
    pointer again = (pointer) __builtin_amdgcn_kernarg_segment_ptr();
    asm volatile("" : "+s"(again));
    turbo_attn_args b;
    b.dst     = again->dst;
    b.meta    = again->meta;
    b.sinks   = again->sinks;
    b.n_head  = again->n_head;
    b.n_parts = again->n_parts;
    b.part0   = again->part0;
    return b;
#else
    return a;
#endif  // __HIP_DEVICE_COMPILE__
}

// Merges the warps of a block (shared memory of each: [n_cols][DV] sums) and writes the result, or its part of it.
template <int DV, int n_cols, int warp_words>
static __device__ __forceinline__ void turbo_decode_write(const turbo_attn_args &     a,
                                                          const turbo_decode_column * cols,
                                                          const float *               warps,
                                                          const float2 (*meta)[n_cols]) {
    const int tid = threadIdx.y * TURBO_WARP + threadIdx.x;
    for (int i = tid; i < n_cols * DV; i += TURBO_DECODE_WARPS * TURBO_WARP) {
        const int c   = i / DV;
        const int row = cols[c].row;
        if (row < 0) {
            break;
        }

        float max = meta[0][c].x;
#pragma unroll
        for (int w = 1; w < TURBO_DECODE_WARPS; ++w) {
            max = fmaxf(max, meta[w][c].x);
        }
        float sum = 0.0f;
        float val = 0.0f;
        if (a.sinks && blockIdx.y == 0) {
            const float sink = a.sinks[row % a.n_head] * TURBO_LOG2E - TURBO_MAX_SLACK;
            max              = fmaxf(max, sink);
            sum              = exp2f(sink - max);
        }
#pragma unroll
        for (int w = 0; w < TURBO_DECODE_WARPS; ++w) {
            const float factor = exp2f(meta[w][c].x - max);
            sum += factor * meta[w][c].y;
            val += factor * warps[w * warp_words + i];
        }

        if (a.n_parts == 1) {
            a.dst[(int64_t) row * DV + i % DV] = sum != 0.0f ? val / sum : 0.0f;
        } else {
            const int64_t part        = (int64_t) row * a.n_parts + a.part0 + blockIdx.y;
            a.dst[part * DV + i % DV] = val;
            if (i % DV == 0) {
                a.meta[part] = make_float2(max, sum);
            }
        }
    }
}

// Of the tiles it, it + step, .. < n_tiles those with a key that is seen.
template <bool full, int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ void turbo_decode_tiles(turbo_decode_warp<DK, DV, type_K, type_V, n_cols> & warp,
                                                          const turbo_attn_args &                             a,
                                                          const char *                                        K,
                                                          const char *                                        V,
                                                          const turbo_decode_column *                         cols,
                                                          const uint32_t *                                    Q,
                                                          const float *                                       Q_d,
                                                          uint32_t *                                          raw,
                                                          int                                                 it,
                                                          const int                                           step,
                                                          const int                                           n_tiles) {
    using shape = turbo_decode_shape<DK, DV, type_K, type_V, n_cols>;

    half2 * tile = (half2 *) (raw + shape::raw_words);
    half *  prob = (half *) (raw + shape::raw_words + shape::f16_words);

    // Tiles of which no query sees a key are passed over before anything of them is loaded.
    const auto visible_from = [&](int i) {
        while (i < n_tiles && warp.is_masked(a, cols, i * TURBO_TILE + threadIdx.x)) {
            i += step;
        }
        return i;
    };

    turbo_decode_stream<DK, DV, type_K, type_V, n_cols, full> stream(a, K, V, raw, tile);
    it = visible_from(it);
    if (it < n_tiles) {
        stream.prefetch_K(it * TURBO_TILE, 0);
    }
    while (it < n_tiles) {
        const int key0 = it * TURBO_TILE;

        warp.begin_tile();
        if constexpr (shape::packed_K) {
#pragma unroll 1
            for (int ip = 0; ip < shape::n_pieces; ++ip) {
                stream.take_K(key0, ip);
                warp.dot_packed(raw, (const int4 *) Q, Q_d, ip);
            }
        } else {
#pragma unroll 1
            for (int ip = 0; ip < DK / shape::f16_piece; ++ip) {
                stream.take_K_f16(key0, ip);
                warp.dot_f16(tile, (const half2 *) Q, ip);
            }
        }

        // masks first: AMD's loads come back in order, and those of K are to be waited for at the end
        warp.mask_scores(a, cols, key0 + threadIdx.x);
        it = visible_from(it + step);
        // the last tile is loaded again in vain
        stream.prefetch_K(it < n_tiles ? it * TURBO_TILE : key0, 0);

        if (!warp.softmax(prob)) {
            continue;
        }

#pragma unroll 1
        for (int is = 0; is < shape::n_subs; ++is) {
            stream.take_V(key0, is);
            if constexpr (shape::packed_V) {
                warp.unpack_values(raw + is % shape::load_subs * shape::sub_words, tile);
                turbo_syncwarp();
            }
            warp.add_values(tile, prob + is * shape::sub_keys * n_cols);
        }
        warp.end_tile();
    }
}

// Grid: columns / n_cols, splits of the keys, KV heads x sequences.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols>
__launch_bounds__(TURBO_DECODE_WARPS * TURBO_WARP, (turbo_decode_blocks<DK, n_cols>())) static __global__ void
turbo_attn_decode_kernel(const turbo_attn_args a) {
    using shape = turbo_decode_shape<DK, DV, type_K, type_V, n_cols>;
    __align__(16) __shared__ uint32_t shared[TURBO_DECODE_WARPS * shape::warp_words];
    __align__(16) __shared__ uint32_t Q[shape::q_words];
    __align__(16) __shared__ float    Q_d[n_cols * DK / 32];
    __shared__ turbo_decode_column    cols[n_cols];
    __shared__ float2                 meta[TURBO_DECODE_WARPS][n_cols];

    ggml_cuda_pdl_sync();
    const int col0    = blockIdx.x * n_cols;
    const int n_kv_h  = a.n_head / a.gqa_ratio;
    const int kv_head = blockIdx.z % n_kv_h;
    const int seq     = blockIdx.z / n_kv_h;

    if (threadIdx.y == 0 && threadIdx.x < n_cols) {
        const int  c      = threadIdx.x;
        const int  q      = (col0 + c) / a.gqa_ratio;
        const int  h      = kv_head * a.gqa_ratio + (col0 + c) % a.gqa_ratio;
        const auto offset = (seq % a.n_mask_seq) * a.nbm3 + (int64_t) min(q, a.n_q - 1) * a.nbm1;
        cols[c]           = { a.mask ? (const half *) (a.mask + offset) : nullptr,
                    get_alibi_slope(a.max_bias, h, a.n_head_log2, a.m0, a.m1),
                    q < a.n_q ? (seq * a.n_q + q) * a.n_head + h : -1 };
    }
    turbo_decode_load_queries<DK, type_K, n_cols>(a, col0, kv_head, seq, Q, Q_d);
    __syncthreads();

    const char * K = a.K + seq * a.nbk3 + (int64_t) kv_head * a.nbk2;
    const char * V = a.V + seq * a.nbv3 + (int64_t) kv_head * a.nbv2;

    uint32_t * raw = shared + threadIdx.y * shape::warp_words;

    turbo_decode_warp<DK, DV, type_K, type_V, n_cols> warp;
    warp.init();

    // whole tiles first, then the last, if it is not whole
    const int step    = gridDim.y * TURBO_DECODE_WARPS;
    const int n_full  = a.aligned ? a.n_kv / TURBO_TILE : 0;
    const int n_tiles = (a.n_kv + TURBO_TILE - 1) / TURBO_TILE;

    const int it = turbo_uniform(blockIdx.y * TURBO_DECODE_WARPS + threadIdx.y);
    turbo_decode_tiles<true>(warp, a, K, V, cols, Q, Q_d, raw, it, step, n_full);
    if (n_full < n_tiles) {
        const int it_rest = it >= n_full ? it : it + (n_full - it + step - 1) / step * step;
        turbo_decode_tiles<false>(warp, a, K, V, cols, Q, Q_d, raw, it_rest, step, n_tiles);
    }

    warp.finish((float *) raw, meta[threadIdx.y]);
    __syncthreads();
    turbo_decode_write<DV, n_cols, shape::warp_words>(turbo_args_again(a), cols, (const float *) shared, meta);
}

// One block for each row of the result [DV, n_head, n_q, n_seq], a thread for each channel: merges the n_parts partial results.
template <int DV>
static __global__ void turbo_attn_merge_parts(const float *  parts,
                                              const float2 * meta,
                                              float *        dst,
                                              const int      n_parts) {
    ggml_cuda_pdl_sync();
    const int64_t row = blockIdx.x;

    parts += row * n_parts * DV + threadIdx.x;
    meta += row * n_parts;

    float max = meta[0].x;
    for (int i = 1; i < n_parts; ++i) {
        max = fmaxf(max, meta[i].x);
    }
    float sum = 0.0f;
    float val = 0.0f;
    for (int i = 0; i < n_parts; ++i) {
        const float factor = exp2f(meta[i].x - max);
        sum += factor * meta[i].y;
        val += factor * parts[i * DV];
    }
    dst[row * DV + threadIdx.x] = sum != 0.0f ? val / sum : 0.0f;
}
