#pragma once

// What a warp of the decode kernel with AMD's matrix instructions does with a tile of keys (decode-wmma.cuh tells how they come together):
// scores, softmax, values.

#include "decode.cuh"
#include "wmma-stream.cuh"

#ifdef TURBO_WMMA

// Shapes that follow from the template arguments of the kernel:
//
//     DK, DV            head sizes of K and V in values
//     type_K, type_V    types of their rows: a turbo type or f16
//     n_cols            columns of a block: 8 or 16
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_wmma_shape {
    using keys   = turbo_wmma_keys<type_K, DK>;
    using values = turbo_wmma_values<type_V, DV>;

    static constexpr int  nc      = n_cols / 2;  // columns of a lane
    static constexpr int  tile    = TURBO_TILE;  // keys
    static constexpr bool aligned = true;  // rows suit the vectors of turbo_wmma_stream, unless the arguments say no

    template <bool full> using stream_K = turbo_wmma_stream<type_K, DK, full>;
    template <bool full> using stream_V = turbo_wmma_stream<type_V, DV, full>;

    // probabilities: a row of 16 registers for each column, whose distance avoids bank conflicts
    static constexpr int p_stride = 20;

    // 4-byte words of shared memory; rows of K are done when V is unpacked
    static constexpr int max(const int a, const int b) { return a > b ? a : b; }

    static constexpr int K_words     = TURBO_TILE * keys::tile::words;
    static constexpr int work_words  = (max(K_words, values::tile_words) + 3) / 4 * 4;
    static constexpr int V_words     = (TURBO_TILE * values::tile::words + 3) / 4 * 4;
    static constexpr int p_words     = n_cols * p_stride;
    static constexpr int V_at        = work_words;  // of a warp: rows of V
    static constexpr int prob_at     = V_at + V_words;
    static constexpr int warp_words  = prob_at + p_words;
    static constexpr int total_words = n_cols * DV;
    static constexpr int words       = max(TURBO_DECODE_WARPS * warp_words, total_words);
    static constexpr int q_words     = n_cols * DK / (type_K == GGML_TYPE_F16 ? 2 : 4);
};

// What the mask adds to keys line and line + 16 of a tile, before its slope.
struct turbo_wmma_mask {
    uint32_t bias;     // two f16, for all columns if they are of the same query
    bool     visible;  // a query sees one of the keys
};

// What a block has for all of its warps.
struct turbo_wmma_columns {
    const turbo_decode_column * cols;
    const half *                mask;   // row of their query, if all are of the same
    const float *               slope;  // of the mask, in units of log2: [half][nc]
};

// The state of one warp. All arrays are in registers. A lane has columns 2*i + half, i < nc, of keys line and line + 16, or of channels.
// Template arguments as in turbo_wmma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_wmma_warp {
    using shape  = turbo_wmma_shape<DK, DV, type_K, type_V, n_cols>;
    using keys   = typename shape::keys;
    using values = typename shape::values;

    static constexpr int nc = shape::nc;

    // Nearly all registers are needed: fences keep the compiler from moving loads up too far.
    static constexpr bool tight = DV > 128;

    using mask    = turbo_wmma_mask;
    using columns = turbo_wmma_columns;

    float *  refs;         // in shared memory, [half][nc]: maximum plus TURBO_MAX_SLACK; 0: no key was seen
    float    sum[nc];      // of this lane's keys
    uint32_t unseen;       // bit i: no key was seen
    bool     some_unseen;  // in any lane
    float    acc[values::n_chunks][values::n][8];

    float s[2][nc];  // of a tile: scores minus ref

    static __device__ __forceinline__ void sync() { turbo_syncwarp(); }

    // Which column has the line of operand A that this lane holds. Lines beyond the last column repeat others.
    static __device__ __forceinline__ int line_column() { return turbo_wmma_row(turbo_wmma_line()) % n_cols; }

    static __device__ __forceinline__ int column(const int i) { return 2 * i + turbo_wmma_half(); }

    __device__ __forceinline__ void init(float * shared) {
        refs        = shared + turbo_wmma_half() * nc;
        unseen      = (1u << nc) - 1;
        some_unseen = true;
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            refs[i] = 0.0f;
            sum[i]  = 0.0f;
        }
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int f = 0; f < values::n; ++f) {
#    pragma unroll
                for (int i = 0; i < 8; ++i) {
                    acc[ic][f][i] = 0.0f;
                }
            }
        }
    }

    // full: all keys of the tile are there.
    template <bool full>
    static __device__ __forceinline__ uint32_t mask_of(const turbo_attn_args & a, const half * row, const int key0) {
        const int key = key0 + turbo_wmma_line();
        uint32_t  m[2];
#    pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int  k     = key + 16 * t;
            const bool there = full || k < a.n_kv;
            m[t]             = a.mask ? ((const uint16_t *) row)[there ? k : 0] : 0;
            m[t]             = there ? m[t] : TURBO_MASK_HIDDEN;
        }
        return m[0] | m[1] << 16;
    }

    static __device__ __forceinline__ bool is_visible(const uint32_t m) {
        return m != (TURBO_MASK_HIDDEN | (uint32_t) TURBO_MASK_HIDDEN << 16);
    }

    template <bool full>
    static __device__ __forceinline__ mask load_mask(const turbo_attn_args &    a,
                                                     const turbo_wmma_columns & cols,
                                                     const int                  key0) {
        mask m;
        if (!a.mask || cols.mask) {
            m.bias    = mask_of<full>(a, cols.mask, key0);
            m.visible = is_visible(m.bias);
        } else {
            m.bias    = 0;
            m.visible = false;
#    pragma unroll
            for (int i = 0; i < nc; ++i) {
                m.visible = m.visible || is_visible(mask_of<full>(a, row_of(a, cols, i), key0));
            }
        }
        return m;
    }

    // By its distance: the compiler would not know what memory a pointer from shared memory is of.
    static const __device__ __forceinline__ half * row_of(const turbo_attn_args &    a,
                                                          const turbo_wmma_columns & cols,
                                                          const int                  i) {
        return (const half *) (a.mask + ((const char *) cols.cols[column(i)].mask - a.mask));
    }

    // Scores of a tile, minus ref.
    template <bool full>
    __device__ __forceinline__ void score(const typename keys::tile & tile,
                                          const turbo_attn_args &     a,
                                          const turbo_wmma_columns &  cols,
                                          const uint32_t *            Q,
                                          const float *               Q_d,
                                          const mask &                m,
                                          const int                   key0) {
        clear_scores();
        multiply_keys<0>(tile, Q, Q_d);
        if (a.softcap != 0.0f) {
            cap_scores(a.softcap);
        }
        add_base<full>(a, cols, m, key0);
    }

    // Adds mask minus ref to the scores of a tile. A score of a key that is not seen may be NaN before.
    template <bool full>
    __device__ __forceinline__ void add_base(const turbo_attn_args &    a,
                                             const turbo_wmma_columns & cols,
                                             const mask &               m,
                                             const int                  key0) {
        __align__(16) float slope[nc];
        __align__(16) float ref[nc];
        turbo_copy<sizeof(slope)>(slope, cols.slope + turbo_wmma_half() * nc);
        turbo_copy<sizeof(ref)>(ref, refs);
        const bool one_query = !a.mask || cols.mask;
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            const uint32_t bias = one_query ? m.bias : mask_of<full>(a, row_of(a, cols, i), key0);
#    pragma unroll
            for (int t = 0; t < 2; ++t) {
                const unsigned short bits = (unsigned short) (bias >> 16 * t);
                const float          x    = s[t][i] + fmaf(slope[i], __half2float(__ushort_as_half(bits)), -ref[i]);
                s[t][i]                   = bits == TURBO_MASK_HIDDEN ? TURBO_MASKED : x;
            }
        }
    }

    __device__ __forceinline__ void clear_scores() {
#    pragma unroll
        for (int t = 0; t < 2; ++t) {
#    pragma unroll
            for (int i = 0; i < nc; ++i) {
                s[t][i] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void cap_scores(const float softcap) {
#    pragma unroll
        for (int t = 0; t < 2; ++t) {
#    pragma unroll
            for (int i = 0; i < nc; ++i) {
                // tanh without a branch
                s[t][i] = softcap * TURBO_LOG2E * (1.0f - 2.0f / (turbo_wmma_exp2(2.0f * s[t][i]) + 1.0f));
            }
        }
    }

    // Operand A of the instructions of group b.
    static __device__ __forceinline__ void load_query(const uint32_t * Q,
                                                      const int        b,
                                                      uint32_t (&x)[keys::n][keys::n_regs]) {
        constexpr int n_words = keys::n * keys::n_own;

        // unknown, so that what is added goes into the instruction: LLVM would keep an address for each group
        const int half = TURBO_WMMA_COPIES == 2 ? 0 : turbo_wmma_half();
        const int at   = turbo_wmma_opaque((line_column() * 2 + half) * n_words);
#    pragma unroll
        for (int j = 0; j < TURBO_WMMA_COPIES; ++j) {
            __align__(16) uint32_t own[n_words];
            turbo_copy<4 * n_words>(own, Q + at + (b * n_cols * 2 + j) * n_words);
#    pragma unroll
            for (int i = 0; i < n_words; ++i) {
                x[i / keys::n_own][j * keys::n_own + i % keys::n_own] = own[i];
            }
        }
    }

    // Adds the products of a tile of K and the queries, from group b on.
    template <int b>
    __device__ __forceinline__ void multiply_keys(const typename keys::tile & tile,
                                                  const uint32_t *            Q,
                                                  const float *               Q_d) {
        if constexpr (b < keys::n_groups) {
            uint32_t q[keys::n][keys::n_regs];
            load_query(Q, b, q);

            __align__(16) float q_d[nc] = {};
            if constexpr (keys::packed) {
                turbo_copy<sizeof(q_d)>(q_d, Q_d + (b * 2 + turbo_wmma_half()) * nc);
            }
#    pragma unroll
            for (int t = 0; t < 2; ++t) {
                uint32_t x[keys::n][keys::n_regs];
                float    d = 0.0f;
                keys::template load<b>(tile, turbo_wmma_line() + 16 * t, x, d);
                if constexpr (keys::packed) {
                    int32_t dot[8] = {};
#    pragma unroll
                    for (int j = 0; j < keys::n; ++j) {
                        turbo_wmma_s8(dot, q[j], x[j]);
                    }
#    pragma unroll
                    for (int i = 0; i < nc; ++i) {
                        s[t][i] = fmaf(d * q_d[i], (float) dot[i], s[t][i]);
                    }
                } else {
                    float dot[8];
#    pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        dot[i] = i < nc ? s[t][i] : 0.0f;
                    }
#    pragma unroll
                    for (int j = 0; j < keys::n; ++j) {
                        turbo_wmma_f16(dot, q[j], x[j]);
                    }
#    pragma unroll
                    for (int i = 0; i < nc; ++i) {
                        s[t][i] = dot[i];
                    }
                }
                if constexpr (tight) {
                    turbo_sched_fence();
                }
            }
            turbo_sched_fence();
            multiply_keys<b + 1>(tile, Q, Q_d);
        }
    }

    // Half of a probability of 2 or more.
    static __device__ __forceinline__ bool is_large(const uint32_t half2_bits) { return half2_bits & 0x40004000; }

    // Turns scores into probabilities in shared memory, [column][line]: of keys line and line + 16. False: all of them are zero. The vote
    // only asks whether any column is to be looked at: rescale decides for each column by itself.
    __device__ __forceinline__ bool softmax(uint32_t * prob) {
        float    e[2][nc];
        uint32_t p[nc];
        uint32_t bits = exponentials(e, p);
        if (turbo_warp_any(some_unseen || is_large(bits))) {
            rescale();
            bits = exponentials(e, p);
        }
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            sum[i] += e[0][i] + e[1][i];
            prob[column(i) * shape::p_stride + turbo_wmma_line()] = p[i];
        }
        return turbo_warp_any(bits != 0);
    }

    // Returns the bits of all of p.
    __device__ __forceinline__ uint32_t exponentials(float (&e)[2][nc], uint32_t (&p)[nc]) const {
        uint32_t all = 0;
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            e[0][i] = turbo_wmma_exp2(s[0][i]);
            e[1][i] = turbo_wmma_exp2(s[1][i]);
            p[i]    = turbo_wmma_pack(e[0][i], e[1][i]);
            all |= p[i];
        }
        return all;
    }

    // Moves ref of columns with a large probability, or without a key so far, to their maximum.
    __device__ __forceinline__ void rescale() {
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            float top = fmaxf(s[0][i], s[1][i]);
#    pragma unroll
            for (int lanes = 8; lanes > 0; lanes >>= 1) {
                top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lanes, TURBO_WARP));
            }
            const uint32_t bit   = 1u << i;
            const bool     first = (unseen & bit) != 0;
            const bool     moves = first ? top > TURBO_MASKED : is_large(turbo_wmma_pack(turbo_wmma_exp2(top), 0.0f));

            const float ref     = refs[i];
            const float ref_new = moves ? ref + top + TURBO_MAX_SLACK : ref;
            const float step    = ref - ref_new;
            const float factor  = first ? 1.0f : turbo_wmma_exp2(step);

            turbo_syncwarp();
            refs[i] = ref_new;
            sum[i] *= factor;
            unseen = moves ? unseen & ~bit : unseen;
            s[0][i] += step;
            s[1][i] += step;
#    pragma unroll
            for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
                for (int f = 0; f < values::n; ++f) {
                    acc[ic][f][i] *= factor;
                }
            }
        }
        some_unseen = turbo_warp_any(unseen != 0);
    }

    // Adds probability times value of a tile of V. prob: what softmax has left; work: room for unpacked values.
    __device__ __forceinline__ void add_values(const typename values::tile & tile,
                                               const uint32_t *              prob,
                                               uint32_t *                    work) {
        constexpr int n_regs = TURBO_WMMA_F16;

        prob += line_column() * shape::p_stride + (TURBO_WMMA_COPIES == 2 ? 0 : 4 * turbo_wmma_half());
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int s = 0; s < 2; ++s) {
                if constexpr (values::packed) {
                    if (s < values::n_passes) {
                        turbo_syncwarp();
                        values::unpack(tile, s, ic, work);
                        turbo_syncwarp();
                    }
                }
                __align__(16) uint32_t p[n_regs];
                turbo_copy<sizeof(p)>(p, prob + 8 * s);
#    pragma unroll
                for (int f = 0; f < values::n; f += 4) {
                    __align__(16) uint32_t v[4][n_regs];
                    values::load(tile, work, 8 * s, ic, f, v);
#    pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        turbo_wmma_f16(acc[ic][f + i], p, v[i]);
                    }
                    turbo_sched_fence();
                }
            }
        }
    }

    __device__ __forceinline__ float maximum(const int i) const {
        return unseen >> i & 1 ? TURBO_MAX_INIT : refs[i] - TURBO_MAX_SLACK;
    }

    // Maximum and sum of each column, to meta.
    __device__ __forceinline__ void write_meta(float2 * meta) {
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            float total = sum[i];
#    pragma unroll
            for (int lanes = 8; lanes > 0; lanes >>= 1) {
                total += __shfl_xor_sync(0xffffffff, total, lanes, TURBO_WARP);
            }
            if (turbo_wmma_line() == 0) {
                meta[column(i)] = make_float2(maximum(i), total);
            }
        }
    }

    // Adds this warp's sums, relative to the maxima in top, to [n_cols][DV] sums in shared memory; the first one sets them.
    __device__ __forceinline__ void add_sums(float * total, const float * top, const bool first) const {
#    pragma unroll
        for (int i = 0; i < nc; ++i) {
            const float factor = turbo_wmma_exp2(maximum(i) - top[column(i)]);
#    pragma unroll
            for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
                for (int f = 0; f < values::n; ++f) {
                    float * x = total + column(i) * DV + ic * values::chunk + values::channel(f, turbo_wmma_line());
                    *x        = fmaf(factor, acc[ic][f][i], first ? 0.0f : *x);
                }
            }
        }
    }
};

#endif  // TURBO_WMMA
