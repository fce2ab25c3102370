#pragma once

// What a warp of the decode kernel with matrix instructions does with a tile of keys (decode-mma.cuh tells how they come together): scores,
// softmax, values.

#include "decode.cuh"
#include "mma-rows.cuh"

#ifdef TURBO_MMA

// Added to products of integers before they become a float: such a float's last bits are the integer.
static constexpr int32_t TURBO_MMA_MAGIC_BITS = 0x4b400000;
static constexpr float   TURBO_MMA_MAGIC      = 12582912.0f;

static constexpr uint32_t TURBO_MMA_HIDDEN = 0x80000000;

// Whether a side needs more registers than others: f16 is read where it is multiplied, and turbo2t and turbo4t have words of high bits.
template <ggml_type type> static constexpr bool turbo_mma_is_large() {
    if constexpr (type == GGML_TYPE_F16) {
        return true;
    } else {
        return turbo_mma_n_levels<type> > 32 || (turbo_is_trellis<type> && turbo_mma_n_levels<type> < 32);
    }
}

// Least blocks on a multiprocessor, which leaves 128, 168 or 255 registers.
template <int DV, ggml_type type_K, ggml_type type_V, int n_cols> static constexpr int turbo_mma_blocks() {
    constexpr bool large_K = turbo_mma_is_large<type_K>();
    constexpr bool large_V = turbo_mma_is_large<type_V>();
    return DV > 128                                                        ? 2 :
           n_cols > 8                                                      ? (large_K || large_V ? 2 : 3) :
           type_V == GGML_TYPE_F16 || (type_K == GGML_TYPE_F16 && large_V) ? 3 :
                                                                             4;
}

// Shapes that follow from the template arguments of the kernel:
//
//     DK, DV            head sizes of K and V in values
//     type_K, type_V    types of their rows: a turbo type or f16
//     n_cols            columns of a block: a multiple of 8
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_mma_shape {
    using keys   = turbo_mma_keys<type_K, DK>;
    using values = turbo_mma_values<type_V, DV>;

    static constexpr int nt = n_cols / 8;  // tiles of columns

    // 4-byte words of shared memory
    static constexpr int K_words     = (TURBO_TILE * keys::tile::words + 3) / 4 * 4;
    static constexpr int V_words     = (TURBO_TILE * values::tile::words + 3) / 4 * 4;
    static constexpr int warp_words  = K_words + V_words;
    static constexpr int total_words = n_cols * DV;
    static constexpr int words =
        TURBO_DECODE_WARPS * warp_words > total_words ? TURBO_DECODE_WARPS * warp_words : total_words;
    static constexpr int q_words = n_cols * DK / (type_K == GGML_TYPE_F16 ? 2 : 4);
};

// The state of one warp. All arrays are in registers. A lane has columns 8*n + 2*part + c of the tiles n of columns, c < 2; of keys
// 16*i + 8*r + turbo_mma_key(row), i, r < 2, or of channels. Template arguments as in turbo_mma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_mma_warp {
    using shape  = turbo_mma_shape<DK, DV, type_K, type_V, n_cols>;
    using keys   = typename shape::keys;
    using values = typename shape::values;

    static constexpr int nt = shape::nt;

    // Whether loads of a group of K stay behind what comes before: else the compiler moves up more of them than there are registers for.
    static constexpr bool keeps_groups_apart = type_K == GGML_TYPE_F16 || (turbo_is_trellis<type_K> && n_cols > 8);

    float ref[nt][2];  // maximum plus TURBO_MAX_SLACK; 0: no key was seen. The same in all lanes of a column
    float sum[nt][2];  // of this lane's keys
    uint32_t
        unseen;  // bit 2*n + c: no key was seen; TURBO_MMA_HIDDEN: of this tile a query does not see a key of this lane
    float acc[values::n_chunks][values::n_tiles][nt][4];

    // of a tile
    uint32_t bias[nt][2][2];  // the mask: keys i, r; both columns in f16, or the low half for all of them
    float    s[nt][2][4];     // scores minus ref: keys i; r and c as 2*r + c
    uint32_t p[nt][2][2];     // probabilities, operand B

    __device__ __forceinline__ void init() {
        unseen = (1u << 2 * nt) - 1;
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
#    pragma unroll
            for (int c = 0; c < 2; ++c) {
                ref[n][c] = 0.0f;
                sum[n][c] = 0.0f;
            }
#    pragma unroll
            for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
                for (int i = 0; i < values::n_tiles; ++i) {
#    pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        acc[ic][i][n][j] = 0.0f;
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ uint32_t mask_of(const turbo_attn_args & a, const half * mask, const int key) {
        return key < a.n_kv ? __half_as_ushort(mask[key]) : TURBO_MASK_HIDDEN;
    }

    // The mask of a tile; not 0: a query sees a key of this lane. n_masked: see turbo_mma_count_masked.
    __device__ __forceinline__ uint32_t load_mask(const turbo_attn_args &     a,
                                                  const turbo_decode_column * cols,
                                                  const int                   n_masked,
                                                  const int                   key0) {
        const bool one_query = n_masked >= 0;
        const int  key       = key0 + turbo_mma_key(turbo_mma_row());
        uint32_t   seen      = 0;  // bits that a hidden key does not have, or lacks

        bool hidden = false;
        if (key0 + TURBO_TILE <= n_masked) {
            const half * mask = cols[0].mask + key;
#    pragma unroll
            for (int i = 0; i < 4; ++i) {
                bias[0][i / 2][i % 2] = __half_as_ushort(mask[8 * i]);
                seen |= bias[0][i / 2][i % 2] ^ TURBO_MASK_HIDDEN;
                hidden = hidden || bias[0][i / 2][i % 2] == TURBO_MASK_HIDDEN;
            }
            unseen = hidden ? unseen | TURBO_MMA_HIDDEN : unseen & ~TURBO_MMA_HIDDEN;
            return seen;
        }
#    pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (one_query || !a.mask) {
                const uint32_t none   = key + 8 * i < a.n_kv ? 0 : TURBO_MASK_HIDDEN;
                bias[0][i / 2][i % 2] = a.mask ? mask_of(a, cols[0].mask, key + 8 * i) : none;
                seen |= bias[0][i / 2][i % 2] ^ TURBO_MASK_HIDDEN;
                hidden = hidden || bias[0][i / 2][i % 2] == TURBO_MASK_HIDDEN;
            } else {
#    pragma unroll
                for (int n = 0; n < nt; ++n) {
                    const int c = 8 * n + 2 * turbo_mma_part();
                    bias[n][i / 2][i % 2] =
                        mask_of(a, cols[c].mask, key + 8 * i) | mask_of(a, cols[c + 1].mask, key + 8 * i) << 16;
                    seen |= bias[n][i / 2][i % 2] ^ (TURBO_MASK_HIDDEN | TURBO_MASK_HIDDEN << 16);
                    hidden = hidden || bias[n][i / 2][i % 2] >> 16 == TURBO_MASK_HIDDEN ||
                             (bias[n][i / 2][i % 2] & 0xffff) == TURBO_MASK_HIDDEN;
                }
            }
        }
        unseen = hidden ? unseen | TURBO_MMA_HIDDEN : unseen & ~TURBO_MMA_HIDDEN;
        return seen;
    }

    // What the mask adds to a score. i: key; one_query: all columns are of one. A constant: an array with an index that is none lies in memory.
    template <bool one_query>
    __device__ __forceinline__ uint32_t mask_bits(const int n, const int i, const int c) const {
        const uint32_t m = bias[one_query ? 0 : n][i / 2][i % 2];
        return one_query || c == 0 ? m & 0xffff : m >> 16;
    }

    // Adds mask minus reference to scores, or sets them to it. slopes: of the mask, in units of log2
    template <bool sets, bool one_query> __device__ __forceinline__ void add_bias(const float * slopes) {
        // K in f16 leaves no register that could keep where the slopes are
        const int part = type_K == GGML_TYPE_F16 ? turbo_lane_again() % 4 : turbo_mma_part();
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
            const float2 slope = ((const float2 *) slopes)[4 * n + part];
#    pragma unroll
            for (int i = 0; i < 8; ++i) {
                const half  m = __ushort_as_half((unsigned short) mask_bits<one_query>(n, i / 2, i % 2));
                const float x = fmaf(i % 2 == 0 ? slope.x : slope.y, __half2float(m), -ref[n][i % 2]);

                s[n][i / 4][i % 4] = sets ? x : s[n][i / 4][i % 4] + x;
            }
        }
    }

    template <bool sets> __device__ __forceinline__ void add_bias(const float * slopes, const bool one_query) {
        if (one_query) {
            add_bias<sets, true>(slopes);
        } else {
            add_bias<sets, false>(slopes);
        }
    }

    // Scores of keys that are not seen, which may be NaN.
    template <bool one_query> __device__ __forceinline__ void hide() {
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
#    pragma unroll
            for (int i = 0; i < 8; ++i) {
                const bool is_hidden = mask_bits<one_query>(n, i / 2, i % 2) == TURBO_MASK_HIDDEN;
                s[n][i / 4][i % 4]   = is_hidden ? TURBO_MASKED : s[n][i / 4][i % 4];
            }
        }
    }

    __device__ __forceinline__ void clear_scores() {
        float zero = 0.0f;
#    ifdef __CUDA_ARCH__
        asm volatile("" : "+f"(zero));  // else the compiler sets registers to it on other ways, too
#    endif
#    pragma unroll
        for (int i = 0; i < 8 * nt; ++i) {
            s[i / 8][i / 4 % 2][i % 4] = zero;
        }
    }

    // Sets the scores of a tile of K. Q, Q_d: as turbo_columns_load_queries leaves them.
    __device__ __forceinline__ void multiply_keys(const typename keys::tile & t,
                                                  const uint32_t *            Q,
                                                  const float *               Q_d,
                                                  const float *               slopes,
                                                  const float                 softcap,
                                                  const bool                  one_query) {
        if (softcap == 0.0f) {
            add_bias<true>(slopes, one_query);
        } else {
            clear_scores();
        }
        multiply_groups<0>(t, Q, Q_d);
        if (softcap != 0.0f) {
#    pragma unroll
            for (int n = 0; n < nt; ++n) {
#    pragma unroll
                for (int i = 0; i < 8; ++i) {
                    s[n][i / 4][i % 4] = softcap * TURBO_LOG2E * tanhf(s[n][i / 4][i % 4] * (1.0f / TURBO_LOG2E));
                }
            }
            add_bias<false>(slopes, one_query);
        }
        if (turbo_warp_any(unseen & TURBO_MMA_HIDDEN)) {
            if (one_query) {
                hide<true>();
            } else {
                hide<false>();
            }
        }
    }

    template <int b>
    __device__ __forceinline__ void multiply_groups(const typename keys::tile & t,
                                                    const uint32_t *            Q,
                                                    const float *               Q_d) {
        constexpr int n_at_once = keys::n_at_once;
        if constexpr (b < keys::n_groups) {
            uint32_t q[keys::n][nt][2];
            float2   q_d[nt];
#    pragma unroll
            for (int n = 0; n < nt; ++n) {
#    pragma unroll
                for (int m = 0; m < keys::n; m += n_at_once) {
                    __align__(16) uint32_t words[2 * n_at_once];
                    ggml_cuda_memcpy_1<sizeof(words)>(
                        words,
                        Q + (((b * keys::n + m) / n_at_once * nt + n) * TURBO_WARP + threadIdx.x) * 2 * n_at_once);
#    pragma unroll
                    for (int j = 0; j < 2 * n_at_once; ++j) {
                        q[m + j / 2][n][j % 2] = words[j];
                    }
                }
                if constexpr (type_K != GGML_TYPE_F16) {
                    q_d[n] = ((const float2 *) Q_d)[b * n_cols / 2 + n * 4 + turbo_mma_part()];
                }
            }
#    pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t a[keys::n][4];
                float    d[keys::n_blocks][2];
                keys::template load<b>(t, 16 * i, a, d);
#    pragma unroll
                for (int n = 0; n < nt; ++n) {
                    if constexpr (type_K == GGML_TYPE_F16) {
#    pragma unroll
                        for (int m = 0; m < keys::n; ++m) {
                            turbo_mma_f16(s[n][i], a[m], q[m][n]);
                        }
                    } else {
                        float x[keys::n_blocks][4];
#    pragma unroll
                        for (int m = 0; m < keys::n_blocks; ++m) {
                            multiply_block(a, q, n, m, x[m]);
                        }
#    pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            // the magic number times a scale has few bits, so this is the product of both to the bit
                            float y = fmaf(d[0][j / 2], x[0][j], -TURBO_MMA_MAGIC * d[0][j / 2]);
#    pragma unroll
                            for (int m = 1; m < keys::n_blocks; ++m) {
                                y = fmaf(d[m][j / 2], x[m][j] - TURBO_MMA_MAGIC, y);
                            }
                            s[n][i][j] = fmaf(j % 2 == 0 ? q_d[n].x : q_d[n].y, y, s[n][i][j]);
                        }
                    }
                }
            }
            if constexpr (keeps_groups_apart) {
                turbo_syncwarp();
            }
            multiply_groups<b + 1>(t, Q, Q_d);
        }
    }

    // Products of block m of a group with the tile n of columns, plus the magic number.
    static __device__ __forceinline__ void multiply_block(const uint32_t (&a)[keys::n][4],
                                                          const uint32_t (&q)[keys::n][nt][2],
                                                          const int n,
                                                          const int m,
                                                          float (&x)[4]) {
        constexpr int n_of = keys::n / keys::n_blocks;

        int32_t dot[n_of + 1][4];
#    pragma unroll
        for (int j = 0; j < 4; ++j) {
            dot[0][j] = TURBO_MMA_MAGIC_BITS;
        }
#    pragma unroll
        for (int i = 0; i < n_of; ++i) {
            turbo_mma_s8(dot[i + 1], a[m + i], q[m + i][n], dot[i]);
        }
#    pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[j] = __int_as_float(dot[n_of][j]);
        }
    }

    // Half of a probability of 2 or more.
    static __device__ __forceinline__ bool is_large(const uint32_t half2_bits) { return half2_bits & 0x40004000; }

    // Turns scores into probabilities; false: all of them are zero. The vote only asks whether any column is to be looked at: rescale
    // decides for each column by itself.
    __device__ __forceinline__ bool softmax() {
        float    e[nt][2][4];
        uint32_t bits = exponentials(e);
        if (turbo_warp_any((unseen & ~TURBO_MMA_HIDDEN) != 0 || is_large(bits))) {
            rescale();
            bits = exponentials(e);
        }
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
#    pragma unroll
            for (int i = 0; i < 2; ++i) {
                sum[n][0] += e[n][i][0] + e[n][i][2];
                sum[n][1] += e[n][i][1] + e[n][i][3];
                p[n][i][0] = turbo_mma_transpose(p[n][i][0]);
                p[n][i][1] = turbo_mma_transpose(p[n][i][1]);
            }
        }
        return turbo_warp_any(bits != 0);
    }

    // e, and p not yet transposed; returns the bits of all of p.
    __device__ __forceinline__ uint32_t exponentials(float (&e)[nt][2][4]) {
        uint32_t all = 0;
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
#    pragma unroll
            for (int i = 0; i < 2; ++i) {
#    pragma unroll
                for (int j = 0; j < 4; ++j) {
                    e[n][i][j] = exp2f(s[n][i][j]);
                }
#    pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const half2 pair = __floats2half2_rn(e[n][i][2 * r], e[n][i][2 * r + 1]);
                    memcpy(&p[n][i][r], &pair, sizeof(pair));
                    all |= p[n][i][r];
                }
            }
        }
        return all;
    }

    // Moves ref of columns with a large probability, or without a key so far, to their maximum.
    __device__ __forceinline__ void rescale() {
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
            float factor[2];
#    pragma unroll
            for (int c = 0; c < 2; ++c) {
                float top = fmaxf(fmaxf(s[n][0][c], s[n][0][c + 2]), fmaxf(s[n][1][c], s[n][1][c + 2]));
#    pragma unroll
                for (int mask = 16; mask >= 4; mask >>= 1) {
                    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, mask, TURBO_WARP));
                }
                const uint32_t bit   = 1u << (2 * n + c);
                const bool     first = (unseen & bit) != 0;
                const bool moves = first ? top > TURBO_MASKED : is_large(__half_as_ushort(__float2half(exp2f(top))));

                const float ref_new = moves ? ref[n][c] + top + TURBO_MAX_SLACK : ref[n][c];
                const float step    = ref[n][c] - ref_new;

                factor[c] = first ? 1.0f : exp2f(step);
                ref[n][c] = ref_new;
                sum[n][c] *= factor[c];
                unseen = moves ? unseen & ~bit : unseen;
#    pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[n][i / 2][i % 2 * 2 + c] += step;
                }
            }
#    pragma unroll
            for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
                for (int i = 0; i < values::n_tiles; ++i) {
#    pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        acc[ic][i][n][j] *= factor[j % 2];
                    }
                }
            }
        }
    }

    // Adds probability times value of a tile of V.
    __device__ __forceinline__ void add_values(const typename values::tile & t) {
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int i = 0; i < 2; ++i) {
                auto fragments = values::fragments::read(t, 16 * i, ic);
#    pragma unroll
                for (int j = 0; j < values::n_tiles; j += 2) {
                    uint32_t a[2][4];
                    fragments.get(j / 2, a);
#    pragma unroll
                    for (int k = 0; k < 2; ++k) {
#    pragma unroll
                        for (int n = 0; n < nt; ++n) {
                            turbo_mma_f16(acc[ic][j + k][n], a[k], p[n][i]);
                        }
                    }
                }
            }
        }
    }

    __device__ __forceinline__ float maximum(const int n, const int c) const {
        return unseen >> (2 * n + c) & 1 ? TURBO_MAX_INIT : ref[n][c] - TURBO_MAX_SLACK;
    }

    // Maximum and sum of each column, to meta.
    __device__ __forceinline__ void write_meta(float2 * meta) {
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
#    pragma unroll
            for (int c = 0; c < 2; ++c) {
                float total = sum[n][c];
#    pragma unroll
                for (int mask = 16; mask >= 4; mask >>= 1) {
                    total += __shfl_xor_sync(0xffffffff, total, mask, TURBO_WARP);
                }
                if (turbo_mma_row() == 0) {
                    meta[8 * n + 2 * turbo_mma_part() + c] = make_float2(maximum(n, c), total);
                }
            }
        }
    }

    // Adds this warp's sums, relative to the maxima in top, to [n_cols][DV] sums in shared memory; the first one sets them.
    __device__ __forceinline__ void add_sums(float * total, const float * top, const bool first) const {
#    pragma unroll
        for (int n = 0; n < nt; ++n) {
#    pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int   col    = 8 * n + 2 * turbo_mma_part() + c;
                const float factor = exp2f(maximum(n, c) - top[col]);
#    pragma unroll
                for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
                    for (int i = 0; i < values::n_tiles; ++i) {
#    pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            float * x = total + col * DV + ic * values::chunk + values::channel(i, turbo_mma_row(), r);
                            *x        = fmaf(factor, acc[ic][i][n][2 * r + c], first ? 0.0f : *x);
                        }
                    }
                }
            }
        }
    }
};

#endif  // TURBO_MMA
