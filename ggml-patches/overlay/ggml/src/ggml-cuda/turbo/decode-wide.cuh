#pragma once

// Wide heads in decode by matrix instructions, whosever they are: those whose channels the warps of a block divide among themselves
// (decode-mma-wide.cuh, decode-wmma-wide.cuh, decode-mfma-wide.cuh). Which ops have such kernels, and what these share.

#include "decode-columns.cuh"
#include "decode-pairs.cuh"

// Heads that are wide for RDNA3 only.
static constexpr bool turbo_is_wide_on_rdna3(const int DK, const int DV) {
#ifdef TURBO_WMMA
    return DK == 256 && DV == 256;
#else
    return GGML_UNUSED(DK), GGML_UNUSED(DV), false;
#endif  // TURBO_WMMA
}

// Whether there is a kernel for wide heads. Two sides of q8_0 would need more than 48 KiB of shared memory; 576/512 has one cache for both sides.
static constexpr bool turbo_is_decode_wide(const ggml_type type_k, const ggml_type type_v, const int DK, const int DV) {
    const bool q8_0    = type_k == GGML_TYPE_Q8_0 && type_v == GGML_TYPE_Q8_0;
    const bool is_wide = DV == 512 && (DK == 512 || (DK == 576 && type_k == type_v));
    return turbo_has_decode_mma(type_k, type_v) && !q8_0 && (is_wide || turbo_is_wide_on_rdna3(DK, DV));
}

// Those of a pair and a head size for which that is true. Instances: turbo-attn-decode-wide-*.cu
template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_wide_pair(int DK, int DV, int n_columns);

// Bytes of n values of a row.
template <ggml_type type> static constexpr int turbo_wide_count_bytes(const int n) {
    if constexpr (type == GGML_TYPE_F16) {
        return n * (int) sizeof(half);
    } else {
        return n / turbo_block_values(type) * turbo_block_bytes<type>;
    }
}

template <ggml_type type, int n> static constexpr int turbo_wide_bytes = turbo_wide_count_bytes<type>(n);

// How the units of a block, n warps or waves, divide the channels of K. Each has as many, and they take turns with the rest: 64 channels, or none.
template <int DK, int n_units> struct turbo_wide_parts {
    static constexpr int n    = n_units;
    static constexpr int own  = DK / (64 * n) * 64;
    static constexpr int rest = DK - n * own;
    static_assert(rest == 0 || rest == 64, "head size of K");

    // Whether parts of rows suit the vectors that whole rows suit.
    static constexpr bool aligned = rest == 0;

    // Whether it is the turn of a unit. That depends on the keys only, so sums of scores have one order.
    static __device__ __forceinline__ bool has_rest(const int unit, const int tile) {
        return rest > 0 && tile % n == unit;
    }
};

// What a block works on.
struct turbo_wide_block {
    int col0, kv_head, seq;

    __device__ __forceinline__ turbo_wide_block(const turbo_attn_args & a, const int n_cols) {
        const int n_kv_h = a.n_head / a.gqa_ratio;

        col0    = blockIdx.x * n_cols;
        kv_head = blockIdx.z % n_kv_h;
        seq     = blockIdx.z / n_kv_h;
    }
};

// What a unit of it has: its channels of K and V, and those of K that units take turns with.
struct turbo_wide_unit {
    int              number;
    const char *     K;  // rows
    const char *     K_rest;
    const char *     V;
    const uint32_t * Q;  // as turbo_columns_load_queries leaves it
    const uint32_t * Q_rest;
    const float *    Q_d;
    const float *    Q_d_rest;
    uint32_t *       rows;    // shared memory for its rows
    uint32_t *       rest;    // of the block: for rows of the rest
    float *          scores;  // of the block: what each unit has of them
};

// shape: of the kernel; shared: shape::words
template <typename shape, ggml_type type_K, ggml_type type_V, int n_cols>
static __device__ __forceinline__ turbo_wide_unit turbo_wide_unit_of(const turbo_attn_args &  a,
                                                                     const turbo_wide_block & block,
                                                                     const int                number,
                                                                     uint32_t *               shared,
                                                                     const uint32_t *         Q,
                                                                     const float *            Q_d) {
    constexpr int n       = shape::parts::n;
    constexpr int K_bytes = turbo_wide_bytes<type_K, shape::own_K>;
    constexpr int V_bytes = turbo_wide_bytes<type_V, shape::own_V>;
    constexpr int q_words = shape::own::q_words;
    constexpr int scales  = shape::own::keys::n_groups * n_cols;

    const char * K = a.K + block.seq * a.nbk3 + (int64_t) block.kv_head * a.nbk2;
    const char * V = a.V + block.seq * a.nbv3 + (int64_t) block.kv_head * a.nbv2;

    turbo_wide_unit unit;
    unit.number   = number;
    unit.K        = K + number * K_bytes;
    unit.K_rest   = K + n * K_bytes;
    unit.V        = V + number * V_bytes;
    unit.Q        = Q + number * q_words;
    unit.Q_rest   = Q + n * q_words;
    unit.Q_d      = Q_d + number * scales;
    unit.Q_d_rest = Q_d + n * scales;
    unit.rows     = shared + number * shape::unit_words;
    unit.rest     = shared + n * shape::unit_words;
    unit.scores   = (float *) (shared + shape::scores_at);
    return unit;
}

// Writes the columns of a block: of the result, or its parts of them. Maxima and sums are those of any unit, channels those of each in turn.
// total: shared memory for [n_cols][DV / n] sums; top and meta: as of turbo_columns_finish
template <int DV, int n, int n_cols, typename unit_t>
static __device__ __forceinline__ void turbo_wide_finish(unit_t &                    unit,
                                                         const int                   number,
                                                         const turbo_attn_args &     a,
                                                         const turbo_decode_column * cols,
                                                         float *                     total,
                                                         float *                     top,
                                                         float2 (&meta)[TURBO_DECODE_WARPS][n_cols]) {
    constexpr int own = DV / n;

    unit.write_meta(meta[threadIdx.y]);
    __syncthreads();
    const int c0 = turbo_lane_again();
    if (threadIdx.y == 0 && c0 < n_cols) {
        top[c0] = turbo_columns_top(a, cols[c0], c0, meta);
    }

    const int split = turbo_split_again();
    const int tid   = threadIdx.y * TURBO_WARP + turbo_lane_again();
#pragma unroll 1
    for (int u = 0; u < n; ++u) {
        for (int i = tid; i < n_cols * own; i += TURBO_DECODE_WARPS * TURBO_WARP) {
            total[i] = 0.0f;
        }
        __syncthreads();
        if (number == u) {
            unit.add_sums(total, top, false);
        }
        __syncthreads();
        for (int i = tid; i < n_cols * own; i += TURBO_DECODE_WARPS * TURBO_WARP) {
            const int c   = i / own;
            const int row = cols[c].row;
            if (row < 0) {
                break;
            }
            const int channel = u * own + i % own;

            float sum = 0.0f;
            if (a.sinks && split == 0) {
                sum = exp2f(a.sinks[row % a.n_head] * TURBO_LOG2E - TURBO_MAX_SLACK - top[c]);
            }
            sum = fmaf(exp2f(meta[0][c].x - top[c]), meta[0][c].y, sum);
            if (a.n_parts == 1) {
                a.dst[(int64_t) row * DV + channel] = sum == 0.0f ? 0.0f : total[i] / sum;  // NaN stays NaN
            } else {
                const int64_t part         = (int64_t) row * a.n_parts + a.part0 + split;
                a.dst[part * DV + channel] = total[i];
                if (channel == 0) {
                    a.meta[part] = make_float2(top[c], sum);
                }
            }
        }
        __syncthreads();
    }
}
