#pragma once

// Merging the parts that decode attention leaves with a short segment of exact keys in f16, which is attended here: such a segment is not
// worth a launch of its own, and a merge has threads to spare.
//
// A block has one row of the result, a thread for each channel. So what a row is does not depend on how many there are.

#include "decode-warp.cuh"

static constexpr int TURBO_MERGE_MAX_KEYS = 128;  // of the segment

// The score of a key in units of log2; TURBO_MASKED: it is not seen. mask: of the row's query, or null
static __device__ __forceinline__ float turbo_exact_score(const turbo_attn_args & a,
                                                          const half *            mask,
                                                          const float             slope,
                                                          const int               key,
                                                          float                   score) {
    if (a.softcap != 0.0f) {
        score = a.softcap * tanhf(score);
    }
    bool hidden = false;
    if (mask) {
        hidden = __half_as_ushort(mask[key]) == TURBO_MASK_HIDDEN;
        score += slope * __half2float(mask[key]);
    }
    score *= TURBO_LOG2E;
    return hidden || score < TURBO_MASKED ? TURBO_MASKED : score;  // NaN stays NaN
}

// Scores of all keys. Q: the row's query, scaled. Eight lanes share a key; all lanes stay to the end, for the shuffles.
template <int DK, int DV>
static __device__ __forceinline__ void turbo_exact_scores(const turbo_attn_args & a,
                                                          const char *            K,
                                                          const half *            mask,
                                                          const float             slope,
                                                          const float *           Q,
                                                          float *                 score) {
    const int lane = threadIdx.x % 8;
    for (int key0 = 0; key0 < a.n_kv; key0 += DV / 8) {
        const int    key = key0 + threadIdx.x / 8;
        const char * k   = K + (int64_t) min(key, a.n_kv - 1) * a.nbk1;

        float sum = 0.0f;
#pragma unroll
        for (int i0 = 0; i0 < DK / 8; i0 += 8) {
            const int i = i0 + lane;
            if (DK / 8 % 8 == 0 || i < DK / 8) {
                __align__(16) half2 k8[4];
                __align__(16) float q8[8];
                ggml_cuda_memcpy_1<16>(k8, k + i * 16);
                turbo_copy<32>(q8, Q + i * 8);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 k2 = __half22float2(k8[j]);
                    sum             = fmaf(k2.x, q8[2 * j], sum);
                    sum             = fmaf(k2.y, q8[2 * j + 1], sum);
                }
            }
        }
#pragma unroll
        for (int shift = 4; shift > 0; shift >>= 1) {
            sum += __shfl_xor_sync(0xffffffff, sum, shift, 8);
        }
        if (lane == 0 && key < a.n_kv) {
            score[key] = turbo_exact_score(a, mask, slope, key, sum);
        }
    }
}

// Turns scores into probabilities relative to the largest; negative ones of keys that are not seen. Every warp does it for itself: returns
// maximum and sum, as those of a part. prob: written by the first warp
static __device__ __forceinline__ float2 turbo_exact_softmax(const float * score, const int n_keys, float * prob) {
    constexpr int n    = TURBO_MERGE_MAX_KEYS / TURBO_WARP;
    const int     lane = threadIdx.x % TURBO_WARP;

    float s[n];
    float max = TURBO_MAX_INIT;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const int key = i * TURBO_WARP + lane;
        s[i]          = key < n_keys ? score[key] : TURBO_MASKED;
        max           = fmaxf(max, s[i]);
    }
    max = turbo_warp_max(max);

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const bool  hidden = s[i] <= TURBO_MASKED;
        const float p      = exp2f(s[i] - max);
        sum += hidden ? 0.0f : p;
        if (threadIdx.x < TURBO_WARP) {
            prob[i * TURBO_WARP + lane] = hidden ? -1.0f : p;
        }
    }
    return make_float2(max - TURBO_MAX_SLACK, turbo_warp_sum(sum));
}

// Adds up probability times value: a thread has 8 channels of every eighth key. sums: [8][DV]
template <int DV>
static __device__ __forceinline__ void turbo_exact_values(const turbo_attn_args & a,
                                                          const char *            V,
                                                          const float *           prob,
                                                          float *                 sums) {
    const int chunk = threadIdx.x % (DV / 8);
    const int group = threadIdx.x / (DV / 8);

    __align__(16) float sum[8] = {};
#pragma unroll 4
    for (int key = group; key < a.n_kv; key += 8) {
        __align__(16) half2 v[4];
        ggml_cuda_memcpy_1<16>(v, V + (int64_t) key * a.nbv1 + chunk * 16);
        const float p      = prob[key];
        const bool  hidden = p < 0.0f;  // whatever its cell holds
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 v2 = __half22float2(v[j]);
            sum[2 * j]      = hidden ? sum[2 * j] : fmaf(p, v2.x, sum[2 * j]);
            sum[2 * j + 1]  = hidden ? sum[2 * j + 1] : fmaf(p, v2.y, sum[2 * j + 1]);
        }
    }
    turbo_copy<32>(sums + group * DV + chunk * 8, sum);
}

// a: of the segment of exact keys; dst and meta as of the first segment, which left part0 of n_parts parts. One block for each row.
template <int DK, int DV>
__launch_bounds__(DV) static __global__ void turbo_attn_merge_exact(const turbo_attn_args a, float * dst) {
    __align__(16) __shared__ float Q[DK];
    __align__(16) __shared__ float sums[8 * DV];
    __shared__ float               score[TURBO_MERGE_MAX_KEYS];
    __shared__ float               prob[TURBO_MERGE_MAX_KEYS];

    ggml_cuda_pdl_sync();
    const int64_t row     = blockIdx.x;
    const int     h       = row % a.n_head;
    const int     q       = row / a.n_head % a.n_q;
    const int     seq     = row / a.n_head / a.n_q;
    const int     kv_head = h / a.gqa_ratio;

    const float * query = (const float *) (a.Q + seq * a.nbq3 + (int64_t) h * a.nbq2 + (int64_t) q * a.nbq1);
    for (int i = threadIdx.x; i < DK; i += DV) {
        Q[i] = a.scale * query[i];
    }
    __syncthreads();

    const half * mask = nullptr;
    if (a.mask) {
        mask = (const half *) (a.mask + (seq % a.n_mask_seq) * a.nbm3 + (int64_t) q * a.nbm1);
    }
    turbo_exact_scores<DK, DV>(a, a.K + seq * a.nbk3 + kv_head * a.nbk2, mask,
                               get_alibi_slope(a.max_bias, h, a.n_head_log2, a.m0, a.m1), Q, score);
    __syncthreads();
    const float2 exact = turbo_exact_softmax(score, a.n_kv, prob);
    __syncthreads();
    turbo_exact_values<DV>(a, a.V + seq * a.nbv3 + kv_head * a.nbv2, prob, sums);
    __syncthreads();

    const float *  parts = a.dst + row * a.n_parts * DV + threadIdx.x;
    const float2 * meta  = a.meta + row * a.n_parts;

    float max = exact.x;
    for (int i = 0; i < a.part0; ++i) {
        max = fmaxf(max, meta[i].x);
    }
    float sum = 0.0f;
    float val = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        val += sums[i * DV + threadIdx.x];
    }
    const float factor_exact = exp2f(exact.x - max);
    sum                      = factor_exact * exact.y;
    val *= factor_exact;
    for (int i = 0; i < a.part0; ++i) {
        const float factor = exp2f(meta[i].x - max);
        sum += factor * meta[i].y;
        val += factor * parts[i * DV];
    }
    dst[row * DV + threadIdx.x] = sum != 0.0f ? val / sum : 0.0f;
}
