#pragma once

// What decode kernels with matrix instructions share, whosever they are: the columns of a block, their queries, and what it writes.

#include "again.cuh"
#include "decode-warp.cuh"

// Column col of a KV head: query heads of its group, times queries.
static __device__ __forceinline__ turbo_decode_column turbo_column_of(const turbo_attn_args & a,
                                                                      const int               col,
                                                                      const int               kv_head,
                                                                      const int               seq) {
    const int q = col / a.gqa_ratio;
    const int h = kv_head * a.gqa_ratio + col % a.gqa_ratio;
    return { (const half *) (a.mask + (seq % a.n_mask_seq) * a.nbm3 + (int64_t) min(q, a.n_q - 1) * a.nbm1),
             get_alibi_slope(a.max_bias, h, a.n_head_log2, a.m0, a.m1),
             q < a.n_q ? (seq * a.n_q + q) * a.n_head + h : -1 };
}

// Quantizes the queries of a block to int8 with a scale for each group of K, or to f16 for K in f16: the columns' operand, in the order that
// keys (turbo_mma_keys, turbo_wmma_keys) tells. Scores will be in units of log2.
template <typename keys, ggml_type type_K, int n_cols>
static __device__ __forceinline__ void turbo_columns_load_queries(const turbo_attn_args & a,
                                                                  const int               col0,
                                                                  const int               kv_head,
                                                                  const int               seq,
                                                                  uint32_t *              Q,
                                                                  float *                 Q_d) {
    // lanes of a group have 4 values each; all of them stay to the end, for the shuffles
    constexpr int lanes = keys::group / 4;

    const int tid = threadIdx.y * TURBO_WARP + threadIdx.x;
    for (int i0 = 0; i0 < n_cols * keys::n_groups; i0 += TURBO_DECODE_WARPS * TURBO_WARP / lanes) {
        const int  i    = i0 + tid / lanes;
        const bool used = i < n_cols * keys::n_groups;

        const int c    = i % n_cols;
        const int b    = i / n_cols;
        const int q    = (col0 + c) / a.gqa_ratio;
        const int h    = kv_head * a.gqa_ratio + (col0 + c) % a.gqa_ratio;
        const int l    = tid % 8;
        const int part = tid % lanes / 8;  // of the group

        const float * src = (const float *) (a.Q + seq * a.nbq3 + (int64_t) h * a.nbq2 + (int64_t) q * a.nbq1) +
                            b * keys::group + part * 32;

        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int k = type_K == GGML_TYPE_F16 ? 4 * l + j : turbo_group_order<type_K>(l, j);
            x[j]        = used && q < a.n_q ? a.scale * TURBO_LOG2E * src[k] : 0.0f;
        }

        uint32_t * dst = Q + keys::template query_word<n_cols>(b, c, part, l);
        if constexpr (type_K == GGML_TYPE_F16) {
            if (used) {
                ((half2 *) dst)[0] = make_half2(x[0], x[1]);
                ((half2 *) dst)[1] = make_half2(x[2], x[3]);
            }
        } else {
            float          d;
            const uint32_t word = turbo_quantize_query<lanes>(x, d);
            if (used) {
                *dst = word;
            }
            if (used && tid % lanes == 0) {
                Q_d[keys::template scale_of<n_cols>(b, c)] = d * keys::scale_unit;
            }
        }
    }
}

// The largest maximum of column c of all warps, and of the sink.
template <int n_cols>
static __device__ __forceinline__ float turbo_columns_top(const turbo_attn_args &     a,
                                                          const turbo_decode_column & col,
                                                          const int                   c,
                                                          const float2 (&meta)[TURBO_DECODE_WARPS][n_cols]) {
    float top = meta[0][c].x;
#pragma unroll
    for (int w = 1; w < TURBO_DECODE_WARPS; ++w) {
        top = fmaxf(top, meta[w][c].x);
    }
    if (a.sinks && turbo_split_again() == 0 && col.row >= 0) {
        top = fmaxf(top, a.sinks[col.row % a.n_head] * TURBO_LOG2E - TURBO_MAX_SLACK);
    }
    return top;
}

// Merges the warps of a block, and writes its columns of the result or its parts of them. total: [n_cols][DV] sums in shared memory, which
// may be that of the warps' rows; top and meta: shared memory, for the maximum of each column, and for the maximum and sum that each warp has.
template <int DV, int n_cols, typename warp_t>
static __device__ __forceinline__ void turbo_columns_finish(warp_t &                    warp,
                                                            const turbo_attn_args &     a,
                                                            const turbo_decode_column * cols,
                                                            float *                     total,
                                                            float *                     top,
                                                            float2 (&meta)[TURBO_DECODE_WARPS][n_cols]) {
    warp.write_meta(meta[threadIdx.y]);
    __syncthreads();
    const int c0 = turbo_lane_again();
    if (threadIdx.y == 0 && c0 < n_cols) {
        top[c0] = turbo_columns_top(a, cols[c0], c0, meta);
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < TURBO_DECODE_WARPS; ++w) {
        if (w == (int) threadIdx.y) {
            warp.add_sums(total, top, w == 0);
        }
        __syncthreads();
    }

    const int split = turbo_split_again();
    const int tid   = threadIdx.y * TURBO_WARP + turbo_lane_again();
    for (int i = tid; i < n_cols * DV; i += TURBO_DECODE_WARPS * TURBO_WARP) {
        const int c   = i / DV;
        const int row = cols[c].row;
        if (row < 0) {
            break;
        }
        float sum = 0.0f;
        if (a.sinks && split == 0) {
            sum = exp2f(a.sinks[row % a.n_head] * TURBO_LOG2E - TURBO_MAX_SLACK - top[c]);
        }
#pragma unroll
        for (int w = 0; w < TURBO_DECODE_WARPS; ++w) {
            sum = fmaf(exp2f(meta[w][c].x - top[c]), meta[w][c].y, sum);
        }
        if (a.n_parts == 1) {
            a.dst[(int64_t) row * DV + i % DV] = sum == 0.0f ? 0.0f : total[i] / sum;  // NaN stays NaN
        } else {
            const int64_t part        = (int64_t) row * a.n_parts + a.part0 + split;
            a.dst[part * DV + i % DV] = total[i];
            if (i % DV == 0) {
                a.meta[part] = make_float2(top[c], sum);
            }
        }
    }
}
