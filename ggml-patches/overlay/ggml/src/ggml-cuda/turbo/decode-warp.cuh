#pragma once

// What a warp of the decode kernel does with a tile of keys (decode.cuh tells how they come together): scores, softmax, values.

#include "decode-rows.cuh"

static constexpr int TURBO_DECODE_WARPS = 4;   // of a block
static constexpr int TURBO_TILE         = 32;  // keys of a tile

// The maximum moves when a score exceeds it by more than this, in units of log2. Probabilities are relative to 2^(maximum + slack): at most
// 1, so that 32 products with |V| < 2047 fit into f16.
static constexpr float TURBO_MAX_SLACK = 3.0f;

// The first maximum, and the score of a masked key, whose probability is zero even then: no infinities, which fast math may not know.
static constexpr float TURBO_MAX_INIT = -1e20f;
static constexpr float TURBO_MASKED   = -1e30f;

// -inf in a mask: the key is not seen, whatever its score is.
static constexpr unsigned short TURBO_MASK_HIDDEN = 0xfc00;

// Registers for what is loaded ahead: of K while values are added, of V while scores are computed.
static constexpr int TURBO_MAX_REGS_K = 20;
static constexpr int TURBO_MAX_REGS_V = 28;

static constexpr float TURBO_LOG2E = 1.4426950408889634f;

// Shapes that follow from the template arguments of the kernel:
//
//     DK, DV            head sizes of K and V in values
//     type_K, type_V    types of their rows: a turbo type, q8_0 or f16
//     n_cols            columns of a block, which are query heads of one KV head, times queries: 2, 4 or 8
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_decode_shape {
    static constexpr bool packed_K = type_K != GGML_TYPE_F16;
    static constexpr bool packed_V = type_V != GGML_TYPE_F16;

    using span_K = turbo_spans<packed_K ? type_K : GGML_TYPE_Q8_0, DK>;
    using shares = turbo_shares<packed_V ? type_V : GGML_TYPE_Q8_0, DV>;
    using span_V = typename shares::spans;

    template <int n_spans> using loader_K_of = turbo_tile_loader<span_K, TURBO_TILE, n_spans, true, TURBO_MAX_REGS_K>;
    template <int n_rows> using loader_V_of  = turbo_tile_loader<span_V, n_rows, span_V::n, false, TURBO_MAX_REGS_V>;

    // K comes in pieces of rows, of two spans where that many can be loaded ahead
    static constexpr int piece_spans = span_K::n % 2 == 0 && loader_K_of<2>::prefetch ? 2 : 1;
    static constexpr int n_pieces    = span_K::n / piece_spans;
    static constexpr int f16_piece   = DK % 64 == 0 ? 64 : 32;  // values

    // V comes in rows, of which a subtile is unpacked at a time: one share by each lane
    static constexpr int sub_keys  = TURBO_WARP / shares::n;
    static constexpr int sub_words = sub_keys * span_V::n * span_V::words;
    static constexpr int n_subs    = TURBO_TILE / sub_keys;
    static constexpr int load_subs = n_subs == 2 && loader_V_of<TURBO_TILE>::prefetch ? 2 : 1;  // loaded together

    using loader_K = loader_K_of<piece_spans>;
    using loader_V = loader_V_of<sub_keys * load_subs>;

    static constexpr bool prefetch_K = packed_K && loader_K::prefetch;
    static constexpr bool prefetch_V = packed_V && loader_V::prefetch;

    // unpacked values: chunks of 8 channels, each with its keys one after the other and one place to spare against bank conflicts
    static constexpr int chunks       = DV / 8;
    static constexpr int chunk_stride = sub_keys + 1;
    static constexpr int chunk_lanes  = chunks > 16 ? 32 : chunks > 8 ? 16 : 8;  // lanes that share the channels
    static constexpr int lane_chunks  = (chunks + chunk_lanes - 1) / chunk_lanes;
    static constexpr int key_groups   = TURBO_WARP / chunk_lanes;

    // 4-byte words of shared memory
    static constexpr int max(const int a, const int b) { return a > b ? a : b; }

    static constexpr int raw_words =
        max(packed_K ? TURBO_TILE * piece_spans * span_K::words : 0, packed_V ? load_subs * sub_words : 0);
    static constexpr int f16_words =
        max(chunks * chunk_stride * 4, packed_K ? 0 : f16_piece / 8 * (TURBO_TILE + 1) * 4);
    static constexpr int prob_words = TURBO_TILE * n_cols / 2;
    // rounded up to 16 bytes
    static constexpr int warp_words = (max(raw_words + f16_words + prob_words, n_cols * DV) + 3) / 4 * 4;
    static constexpr int q_words    = packed_K ? n_cols * DK / 4 : n_cols * DK / 2;

    static_assert(shares::n * sub_keys == TURBO_WARP && chunks % 4 == 0, "V head size");
};

// What is the same for all keys of a column. In shared memory, since scalar registers are scarce.
struct turbo_decode_column {
    const half * mask;   // row of its query, or null
    float        slope;  // ALiBi
    int          row;    // of the result; -1: no column
};

// bytes between registers and shared memory, in 16-byte steps where there are as many.
template <int bytes> static __device__ __forceinline__ void turbo_copy(void * dst, const void * src) {
    constexpr int step = bytes < 16 ? bytes : 16;
#pragma unroll
    for (int i = 0; i < bytes; i += step) {
        ggml_cuda_memcpy_1<step>((char *) dst + i, (const char *) src + i);
    }
}

template <typename T> static __device__ __forceinline__ T turbo_warp_sum(T x) {
#pragma unroll
    for (int mask = TURBO_WARP / 2; mask > 0; mask >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, mask, TURBO_WARP);
    }
    return x;
}

static __device__ __forceinline__ float turbo_warp_max(float x) {
#pragma unroll
    for (int mask = TURBO_WARP / 2; mask > 0; mask >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, mask, TURBO_WARP));
    }
    return x;
}

// Votes of a whole wave would count the other warp in a wave of 64, which may be done already.
static __device__ __forceinline__ bool turbo_warp_any(const bool x) {
    if constexpr (ggml_cuda_get_physical_warp_size() == TURBO_WARP) {
        return __any_sync(0xffffffff, x);
    } else {
        return turbo_warp_max(x ? 1.0f : 0.0f) > 0.0f;
    }
}

// Four of a query's values as int8, in units of d, which n_lanes neighbouring lanes share: their largest magnitude becomes 127.
template <int n_lanes> static __device__ __forceinline__ uint32_t turbo_quantize_query(const float (&x)[4], float & d) {
    // as integers, among which NaN is the largest: it becomes the scale, and all scores
    uint32_t amax = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        amax = max(amax, __float_as_uint(x[j]) & 0x7fffffff);
    }
#pragma unroll
    for (int mask = n_lanes / 2; mask > 0; mask >>= 1) {
        amax = max(amax, __shfl_xor_sync(0xffffffff, amax, mask, TURBO_WARP));
    }
    d = __uint_as_float(amax) / 127.0f;

    const float id   = d > 0.0f ? 1.0f / d : 0.0f;
    uint32_t    word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        word |= ((uint32_t) (int) rintf(x[j] * id) & 0xff) << 8 * j;
    }
    return word;
}

// Four int8 as half2 pairs (0, 1) and (2, 3), exactly: 1024 + 128 + x has the bits of x + 128 at its end.
static __device__ __forceinline__ void turbo_int8_to_half2(const int32_t w, half2 & lo, half2 & hi) {
    const uint32_t u = (uint32_t) w ^ 0x80808080;
    const uint32_t a = turbo_permute(u, 0x64646464, TURBO_SELECTOR_BITS == 4 ? 0x4140 : 0x04010400);
    const uint32_t b = turbo_permute(u, 0x64646464, TURBO_SELECTOR_BITS == 4 ? 0x4342 : 0x04030402);

    const half2 bias = make_half2(-1152.0f, -1152.0f);

    half2 h[2];
    memcpy(&h[0], &a, sizeof(a));
    memcpy(&h[1], &b, sizeof(b));
    lo = h[0] + bias;
    hi = h[1] + bias;
}

// Second launch bound. CUDA: least blocks on a multiprocessor, which leaves 255 or 168 registers. HIP: least waves on a SIMD.
template <int DK, int n_cols> static constexpr int turbo_decode_blocks() {
#ifdef GGML_USE_HIP
    return 1;
#else
    return n_cols > 4 || DK > 128 ? 2 : 3;
#endif  // GGML_USE_HIP
}

// The state of one warp. All arrays are in registers. Template arguments as in turbo_decode_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_decode_warp {
    using shape = turbo_decode_shape<DK, DV, type_K, type_V, n_cols>;

    static constexpr int n_acc = 8 * shape::lane_chunks;  // channels of a lane

    float score[n_cols];                                  // of this lane's key
    float max[n_cols];                                    // same in all lanes
    float sum[n_cols];                                    // of this lane's keys
    float acc[n_cols][n_acc];                             // of this lane's channels and keys

    // of a tile
    float factor[n_cols];               // by which the sums so far shrink, since the maximum grew
    half2 tile_acc[n_cols][n_acc / 2];  // what it adds to acc

    __device__ __forceinline__ void init() {
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            max[c] = TURBO_MAX_INIT;
            sum[c] = 0.0f;
#pragma unroll
            for (int i = 0; i < n_acc; ++i) {
                acc[c][i] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void begin_tile() {
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            score[c]  = 0.0f;
            factor[c] = 1.0f;
#pragma unroll
            for (int i = 0; i < n_acc / 2; ++i) {
                tile_acc[c][i] = make_half2(0.0f, 0.0f);
            }
        }
    }

    // Not under a condition: two versions of acc would be alive.
    __device__ __forceinline__ void end_tile() {
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
#pragma unroll
            for (int i = 0; i < n_acc / 2; ++i) {
                acc[c][2 * i]     = fmaf(acc[c][2 * i], factor[c], __low2float(tile_acc[c][i]));
                acc[c][2 * i + 1] = fmaf(acc[c][2 * i + 1], factor[c], __high2float(tile_acc[c][i]));
            }
            turbo_sched_fence();
        }
    }

    // Adds the products of piece ip of the row of this lane's key, and the int8 query.
    __device__ __forceinline__ void dot_packed(const uint32_t * raw, const int4 * Q, const float * Q_d, const int ip) {
        using spans = typename shape::span_K;
#pragma unroll 1
        for (int is = 0; is < shape::piece_spans; ++is) {
#pragma unroll
            for (int ig = 0; ig < spans::groups; ++ig) {
                int32_t          w[8];
                const uint32_t * span = raw + (is * TURBO_TILE + threadIdx.x) * spans::words;
                const float d = __half2float(turbo_unpack_group<type_K, spans::lone>(span, ig / spans::block_groups,
                                                                                     ig % spans::block_groups, w));
                const int   b = (ip * shape::piece_spans + is) * spans::groups + ig;
                __align__(16) float Q_db[n_cols];
                turbo_copy<n_cols * sizeof(float)>(Q_db, Q_d + b * n_cols);
#pragma unroll
                for (int c = 0; c < n_cols; ++c) {
                    const int4 q0  = Q[(b * n_cols + c) * 2];
                    const int4 q1  = Q[(b * n_cols + c) * 2 + 1];
                    int        dot = ggml_cuda_dp4a(w[0], q0.x, 0);
                    dot            = ggml_cuda_dp4a(w[1], q0.y, dot);
                    dot            = ggml_cuda_dp4a(w[2], q0.z, dot);
                    dot            = ggml_cuda_dp4a(w[3], q0.w, dot);
                    dot            = ggml_cuda_dp4a(w[4], q1.x, dot);
                    dot            = ggml_cuda_dp4a(w[5], q1.y, dot);
                    dot            = ggml_cuda_dp4a(w[6], q1.z, dot);
                    dot            = ggml_cuda_dp4a(w[7], q1.w, dot);
                    score[c] += d * Q_db[c] * (float) dot;
                    turbo_sched_fence();
                }
            }
        }
    }

    // The same for an f16 row, whose piece lies in chunks of 8 values, and the f16 query.
    __device__ __forceinline__ void dot_f16(const half2 * tile, const half2 * Q, const int ip) {
        constexpr int piece = shape::f16_piece;
#pragma unroll
        for (int i = 0; i < piece / 8; ++i) {
            __align__(16) half2 k[4];
            ggml_cuda_memcpy_1<16>(k, tile + (i * (TURBO_TILE + 1) + threadIdx.x) * 4);
#pragma unroll
            for (int c = 0; c < n_cols; ++c) {
                __align__(16) half2 q[4];
                ggml_cuda_memcpy_1<16>(q, Q + c * DK / 2 + (ip * piece + i * 8) / 2);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    ggml_cuda_mad(score[c], k[j], q[j]);
                }
                turbo_sched_fence();
            }
        }
    }

    // Whether no query may see any key of a tile. key: of this lane.
    static __device__ __forceinline__ bool is_masked(const turbo_attn_args &     a,
                                                     const turbo_decode_column * cols,
                                                     const int                   key) {
        const half * row     = nullptr;
        bool         visible = cols[0].mask == nullptr;
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            if (cols[c].mask != row && key < a.n_kv) {
                row     = cols[c].mask;
                visible = visible || __half_as_ushort(row[key]) != TURBO_MASK_HIDDEN;
            }
        }
        return !turbo_warp_any(visible);
    }

    // Soft cap, mask, and the step to units of log2. key: of this lane.
    __device__ __forceinline__ void mask_scores(const turbo_attn_args &     a,
                                                const turbo_decode_column * cols,
                                                const int                   key) {
        if (a.softcap != 0.0f) {
#pragma unroll
            for (int c = 0; c < n_cols; ++c) {
                score[c] = a.softcap * tanhf(score[c]);
            }
        }

        const half * row    = nullptr;
        float        bias   = 0.0f;
        bool         hidden = key >= a.n_kv;
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            const turbo_decode_column col = cols[c];
            if (col.mask != row) {
                row          = col.mask;
                const half m = key < a.n_kv ? row[key] : __ushort_as_half(TURBO_MASK_HIDDEN);
                hidden       = __half_as_ushort(m) == TURBO_MASK_HIDDEN;
                bias         = __half2float(m);
            }
            const float s = (score[c] + col.slope * bias) * TURBO_LOG2E;
            score[c] = hidden || s < TURBO_MASKED ? TURBO_MASKED : s;  // not fmaxf: it would make a masked key of NaN
        }
    }

    // Turns scores into probabilities in shared memory, [key][column]. False: all of them are zero.
    __device__ __forceinline__ bool softmax(half * prob) {
        bool exceeded = false;
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            exceeded = exceeded || score[c] > max[c] + TURBO_MAX_SLACK;
        }
        if (turbo_warp_any(exceeded)) {
            rescale();
        }

        __align__(16) half p[n_cols];
        bool               nonzero = false;
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            const float e = exp2f(score[c] - (max[c] + TURBO_MAX_SLACK));
            p[c]          = __float2half(e);
            sum[c] += e;
            nonzero = nonzero || __half2float(p[c]) != 0.0f;
        }
        ggml_cuda_memcpy_1<n_cols * sizeof(half)>(prob + threadIdx.x * n_cols, p);

        return turbo_warp_any(nonzero);
    }

    __device__ __forceinline__ void rescale() {
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            const float max_new = fmaxf(max[c], turbo_warp_max(score[c]));
            factor[c]           = exp2f(max[c] - max_new);
            max[c]              = max_new;
            sum[c] *= factor[c];
            turbo_sched_fence();
        }
    }

    // Unpacks one share of a subtile of V into shared memory.
    static __device__ __forceinline__ void unpack_values(const uint32_t * raw, half2 * tile) {
        using spans  = typename shape::span_V;
        using shares = typename shape::shares;

        const int        key   = threadIdx.x % shape::sub_keys;
        const int        share = threadIdx.x / shape::sub_keys;
        const uint32_t * span  = raw + (key * spans::n + share / shares::of_span) * spans::words;
#pragma unroll
        for (int ig = 0; ig < shares::groups; ++ig) {
            int32_t     w[8];
            const int   b  = share % shares::of_span * shares::blocks + ig / spans::block_groups;
            const half  d  = turbo_unpack_group<type_V, spans::lone>(span, b, ig % spans::block_groups, w);
            const half2 d2 = __half2half2(d);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                __align__(16) half2 v[4];
                turbo_int8_to_half2(w[2 * i], v[0], v[1]);
                turbo_int8_to_half2(w[2 * i + 1], v[2], v[3]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    v[j] = v[j] * d2;
                }
                const int chunk = (share * shares::groups + ig) * 4 + i;
                ggml_cuda_memcpy_1<16>(tile + (chunk * shape::chunk_stride + key) * 4, v);
                turbo_sched_fence();
            }
        }
    }

    // Adds probability times value of a subtile. prob: of its first key.
    __device__ __forceinline__ void add_values(const half2 * tile, const half * prob) {
        [[maybe_unused]] constexpr int keys_unroll = n_cols > 4 ? 1 : 2;  // more of them need more registers

        const int lane  = threadIdx.x % shape::chunk_lanes;
        const int group = threadIdx.x / shape::chunk_lanes;
#pragma unroll
        for (int ic = 0; ic < shape::lane_chunks; ++ic) {
            const int chunk = ic * shape::chunk_lanes + lane;
            if (shape::chunks % shape::chunk_lanes != 0 && chunk >= shape::chunks) {
                break;
            }
#pragma unroll keys_unroll
            for (int key = group; key < shape::sub_keys; key += shape::key_groups) {
                __align__(16) half2 v[4];
                __align__(16) half  p[n_cols];
                ggml_cuda_memcpy_1<16>(v, tile + (chunk * shape::chunk_stride + key) * 4);
                ggml_cuda_memcpy_1<n_cols * sizeof(half)>(p, prob + key * n_cols);
#pragma unroll
                for (int c = 0; c < n_cols; ++c) {
                    const half2 p2 = __half2half2(p[c]);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        ggml_cuda_mad(tile_acc[c][ic * 4 + j], v[j], p2);
                    }
                }
            }
        }
    }

    // Sums up the lanes and leaves [n_cols][DV] sums, maximum and sum of each column in shared memory.
    __device__ __forceinline__ void finish(float * sums, float2 * meta) {
        turbo_syncwarp();
        const int lane = threadIdx.x % shape::chunk_lanes;
#pragma unroll
        for (int c = 0; c < n_cols; ++c) {
            const float total = turbo_warp_sum(sum[c]);
            if (threadIdx.x == 0) {
                meta[c] = make_float2(max[c], total);
            }
#pragma unroll
            for (int i = 0; i < n_acc; ++i) {
                float x = acc[c][i];
#pragma unroll
                for (int mask = shape::chunk_lanes; mask < TURBO_WARP; mask *= 2) {
                    x += __shfl_xor_sync(0xffffffff, x, mask, TURBO_WARP);
                }
                const int chunk = i / 8 * shape::chunk_lanes + lane;
                if (threadIdx.x < shape::chunk_lanes && chunk < shape::chunks) {
                    sums[c * DV + channel(chunk, i % 8)] = x;
                }
            }
            turbo_sched_fence();
        }
    }

    // Channel of value i of a chunk.
    static __device__ __forceinline__ int channel(const int chunk, const int i) {
        if constexpr (shape::packed_V) {
            return chunk / 4 * 32 + turbo_group_order<type_V>(chunk % 4 * 2 + i / 4, i % 4);
        } else {
            return chunk * 8 + i;
        }
    }
};
