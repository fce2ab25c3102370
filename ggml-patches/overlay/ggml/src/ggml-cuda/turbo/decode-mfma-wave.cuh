#pragma once

// What a wave of the decode kernel with CDNA3's matrix instructions does with a tile of keys (decode-mfma.cuh tells how they come together):
// scores, softmax, values.

#include "decode.cuh"
#include "mfma-rows.cuh"
#include "wmma-stream.cuh"

#ifdef TURBO_MFMA

// Products of integers begin with these bits: the last bits of such a float are the integer.
static constexpr int32_t TURBO_MFMA_MAGIC_BITS = 0x4b400000;
static constexpr float   TURBO_MFMA_MAGIC      = 12582912.0f;

static constexpr int TURBO_MFMA_WAVES = TURBO_DECODE_WARPS / 2;  // of a block

// The way of one side into the shared memory of a wave, by turbo_wmma_stream: each half of the wave brings 32 rows.
template <ggml_type type, int D, bool full> struct turbo_mfma_stream {
    using tile = turbo_wmma_tile<type, D>;

    turbo_wmma_stream<type, D, full> half;
    const uint32_t *                 rows;

    __device__ __forceinline__ turbo_mfma_stream(const turbo_attn_args & a,
                                                 const char *            x,
                                                 const int               stride,
                                                 uint32_t *              rows) :
        half(a, x, stride, rows + first_key() * tile::words),
        rows(rows) {}

    // Of this half.
    static __device__ __forceinline__ int first_key() { return turbo_mfma_half() * TURBO_TILE; }

    __device__ __forceinline__ void start(const int key0) { half.start(key0 + first_key()); }

    __device__ __forceinline__ void put(const int key0) { half.put(key0 + first_key()); }

    __device__ __forceinline__ tile at(const int key0) const {
        if constexpr (type == GGML_TYPE_F16) {
            return half.at(key0);  // where they are in the cache
        } else {
            return { rows };
        }
    }
};

// Shapes that follow from the template arguments of the kernel:
//
//     DK, DV            head sizes of K and V in values
//     type_K, type_V    types of their rows: a turbo type, q8_0 or f16
//     n_cols            columns of a block: 8 or 16
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_mfma_shape {
    using keys   = turbo_mfma_keys<type_K, DK>;
    using values = turbo_mfma_values<type_V, DV>;

    static constexpr int  tile    = TURBO_MFMA_TILE;  // keys
    static constexpr bool aligned = true;             // as in turbo_wmma_shape

    template <bool full> using stream_K = turbo_mfma_stream<type_K, DK, full>;
    template <bool full> using stream_V = turbo_mfma_stream<type_V, DV, full>;

    static constexpr int max(const int a, const int b) { return a > b ? a : b; }

    // 4-byte words of shared memory; rows of K are done when V comes, and the other way round
    static constexpr int V_at        = 0;
    static constexpr int prob_at     = 0;  // they are in registers
    static constexpr int row_words   = max(keys::tile::words, values::tile::words);
    static constexpr int wave_words  = TURBO_MFMA_TILE * row_words;
    static constexpr int total_words = n_cols * DV;
    static constexpr int words       = max(TURBO_MFMA_WAVES * wave_words, total_words);
    static constexpr int q_words     = n_cols * DK / (type_K == GGML_TYPE_F16 ? 2 : 4);
};

// What the mask adds to the keys of a lane, before its slope.
struct turbo_mfma_mask {
    uint32_t bias[4][2];  // keys 16*t + 4*part + r: f16, two in a register
    bool     visible;     // the lane's column sees one of them
    bool     hidden;      // and not all of them
};

// What a lane has of its column.
struct turbo_mfma_column {
    const half * mask;       // row of its query; without a mask, other memory of this length
    uint32_t     mask_bits;  // which of its bits count: all or none
    float        slope;      // in units of log2
};

// The state of one wave. All arrays are in registers. A lane has column line; of keys, and of channels, those of its part. Template arguments as
// in turbo_mfma_shape.
template <int DK, int DV, ggml_type type_K, ggml_type type_V, int n_cols> struct turbo_mfma_wave {
    using shape  = turbo_mfma_shape<DK, DV, type_K, type_V, n_cols>;
    using keys   = typename shape::keys;
    using values = typename shape::values;

    using mask    = turbo_mfma_mask;
    using columns = turbo_mfma_column;

    float ref    = 0.0f;  // maximum plus TURBO_MAX_SLACK; 0: no key was seen. The same in all lanes of a column, as is
    bool  unseen = true;  // no key was seen
    float sum    = 0.0f;  // of this lane's keys
    float acc[values::n_chunks][values::n][4];  // channels of lines 4*part + r

    float    s[4][4];                           // of a tile: scores minus ref, of keys 16*t + 4*part + r
    uint32_t p[4][2];                           // probabilities, operand B

    static __device__ __forceinline__ void sync() { turbo_mfma_syncwave(); }

    // Lanes beyond the last column repeat others.
    static __device__ __forceinline__ int column() { return turbo_wmma_line() % n_cols; }

    __device__ __forceinline__ turbo_mfma_wave() {
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int f = 0; f < values::n; ++f) {
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    acc[ic][f][r] = 0.0f;
                }
            }
        }
    }

    // full: all keys of the tile are there.
    template <bool full>
    static __device__ __forceinline__ mask load_mask(const turbo_attn_args &   a,
                                                     const turbo_mfma_column & c,
                                                     const int                 key0) {
        const int    key = key0 + 4 * turbo_mfma_part();
        const half * row = c.mask + (full ? key : 0);
        mask         m;
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
            if constexpr (full) {
                turbo_mfma_read_halves(row + 16 * t, m.bias[t]);
                m.bias[t][0] &= c.mask_bits;
                m.bias[t][1] &= c.mask_bits;
            } else {
#    pragma unroll
                for (int i = 0; i < 2; ++i) {
                    uint32_t x[2];
#    pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int k = key + 16 * t + 2 * i + j;
                        x[j]        = ((const uint16_t *) row)[min(k, a.n_kv - 1)];
                        x[j]        = k < a.n_kv ? x[j] & c.mask_bits : TURBO_MASK_HIDDEN;
                    }
                    m.bias[t][i] = x[0] | x[1] << 16;
                }
            }
        }

        uint32_t most = 0, least = 0xffffffff;
#    pragma unroll
        for (int i = 0; i < 8; ++i) {
            most  = turbo_mfma_max_u16(most, m.bias[i / 2][i % 2]);
            least = turbo_mfma_min_u16(least, m.bias[i / 2][i % 2]);
        }
        // no other number has as large bits as -inf
        m.visible = min(least & 0xffff, least >> 16) < TURBO_MASK_HIDDEN;
        m.hidden  = max(most & 0xffff, most >> 16) >= TURBO_MASK_HIDDEN;
        return m;
    }

    // Adds the products of a tile of K and the queries, from group b on.
    template <int b>
    __device__ __forceinline__ void multiply_keys(const typename keys::tile & tile,
                                                  const uint32_t *            Q,
                                                  const float *               Q_d) {
        if constexpr (b < keys::n_groups) {
            __align__(16) uint32_t q[keys::n][2];
            turbo_copy<sizeof(q)>(q, Q + ((b * n_cols + column()) * 4 + turbo_mfma_part()) * (keys::n * 2));

            const float q_d = keys::packed ? Q_d[b * n_cols + column()] : 1.0f;
#    pragma unroll
            for (int t = 0; t < 4; ++t) {
                uint32_t x[keys::n][2];
                keys::template load<b>(tile, 16 * t + turbo_wmma_line(), x);
                if constexpr (keys::packed) {
                    int32_t dot[4] = { TURBO_MFMA_MAGIC_BITS, TURBO_MFMA_MAGIC_BITS, TURBO_MFMA_MAGIC_BITS,
                                       TURBO_MFMA_MAGIC_BITS };
#    pragma unroll
                    for (int j = 0; j < keys::n; ++j) {
                        turbo_mfma_s8(dot, x[j], q[j]);
                    }
#    pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const half d = keys::template scale<b>(tile, 16 * t + 4 * turbo_mfma_part() + r);
                        s[t][r] = fmaf(__half2float(d), (__int_as_float(dot[r]) - TURBO_MFMA_MAGIC) * q_d, s[t][r]);
                    }
                } else {
#    pragma unroll
                    for (int j = 0; j < keys::n; ++j) {
                        turbo_mfma_f16(s[t], x[j], q[j]);
                    }
                }
                turbo_mfma_here(s[t]);
                turbo_sched_fence();
            }
            multiply_keys<b + 1>(tile, Q, Q_d);
        }
    }

    // Scores of a tile, minus ref. A score of a key that is not seen may be NaN before its mask.
    template <bool full>
    __device__ __forceinline__ void score(const typename keys::tile & tile,
                                          const turbo_attn_args &     a,
                                          const turbo_mfma_column &   c,
                                          const uint32_t *            Q,
                                          const float *               Q_d,
                                          const mask &                m,
                                          const int) {
        const bool hidden = __any_sync(0xffffffff, m.hidden);
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                s[t][r] = 0.0f;
            }
        }
        multiply_keys<0>(tile, Q, Q_d);
        if (a.softcap != 0.0f) {
#    pragma unroll
            for (int t = 0; t < 4; ++t) {
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    // tanh without a branch
                    s[t][r] = a.softcap * TURBO_LOG2E * (1.0f - 2.0f / (turbo_wmma_exp2(2.0f * s[t][r]) + 1.0f));
                }
            }
        }
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                s[t][r] += fmaf(c.slope, __half2float(__ushort_as_half(bias_of(m, t, r))), -ref);
            }
        }
        if (hidden) {
#    pragma unroll
            for (int t = 0; t < 4; ++t) {
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    s[t][r] = bias_of(m, t, r) == TURBO_MASK_HIDDEN ? TURBO_MASKED : s[t][r];
                }
            }
        }
    }

    static __device__ __forceinline__ unsigned short bias_of(const mask & m, const int t, const int r) {
        return (unsigned short) (m.bias[t][r / 2] >> 16 * (r % 2));
    }

    // Half of a probability of 2 or more.
    static __device__ __forceinline__ bool is_large(const uint32_t half2_bits) { return half2_bits & 0x40004000; }

    // Turns scores into probabilities. False: all of them are zero. The vote only asks whether any column is to be looked at: rescale decides
    // for each column by itself. They stay in registers, so softmax and add_values need no shared memory.
    __device__ __forceinline__ bool softmax(uint32_t *) {
        float    total;
        uint32_t bits = exponentials(total);
        if (__any_sync(0xffffffff, unseen || is_large(bits))) {
            rescale();
            bits = exponentials(total);
        }
        sum += total;
        return __any_sync(0xffffffff, bits != 0);
    }

    // Returns the bits of all of p.
    __device__ __forceinline__ uint32_t exponentials(float & total) {
        uint32_t all = 0;
        total        = 0.0f;
#    pragma unroll
        for (int t = 0; t < 4; ++t) {
            float e[4];
#    pragma unroll
            for (int r = 0; r < 4; ++r) {
                e[r] = turbo_wmma_exp2(s[t][r]);
            }
            p[t][0] = turbo_wmma_pack(e[0], e[1]);
            p[t][1] = turbo_wmma_pack(e[2], e[3]);
            total += (e[0] + e[1]) + (e[2] + e[3]);
            all |= p[t][0] | p[t][1];
        }
        return all;
    }

    // Moves ref of a column with a large probability, or without a key so far, to its maximum.
    __device__ __forceinline__ void rescale() {
        float top = s[0][0];
#    pragma unroll
        for (int i = 1; i < 16; ++i) {
            top = fmaxf(top, s[i / 4][i % 4]);
        }
        top = turbo_mfma_column_max(top);

        const bool  moves   = unseen ? top > TURBO_MASKED : is_large(turbo_wmma_pack(turbo_wmma_exp2(top), 0.0f));
        const float ref_new = moves ? ref + top + TURBO_MAX_SLACK : ref;
        const float step    = ref - ref_new;
        const float factor  = unseen ? 1.0f : turbo_wmma_exp2(step);

        ref    = ref_new;
        unseen = unseen && !moves;
        sum *= factor;
#    pragma unroll
        for (int i = 0; i < 16; ++i) {
            s[i / 4][i % 4] += step;
        }
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int f = 0; f < values::n; ++f) {
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    acc[ic][f][r] *= factor;
                }
            }
        }
    }

    // Adds probability times value of a tile of V.
    __device__ __forceinline__ void add_values(const typename values::tile & tile, const uint32_t *, uint32_t *) {
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int t = 0; t < 4; ++t) {
                uint32_t v[values::n][2];
                values::load(tile, 16 * t, ic, v);
#    pragma unroll
                for (int f = 0; f < values::n; ++f) {
                    turbo_mfma_f16(acc[ic][f], v[f], p[t]);
                }
                turbo_sched_fence();
            }
        }
    }

    __device__ __forceinline__ float maximum() const { return unseen ? TURBO_MAX_INIT : ref - TURBO_MAX_SLACK; }

    // Maximum and sum of each column, to meta by one half of the wave; the other half has none.
    __device__ __forceinline__ void write_meta(float2 * meta) const {
        const float total = turbo_mfma_column_sum(sum);
        if (threadIdx.x < n_cols) {
            meta[column()] = turbo_mfma_half() == 0 ? make_float2(maximum(), total) : make_float2(TURBO_MAX_INIT, 0.0f);
        }
    }

    // Adds the sums of a half of this wave, relative to the maxima in top, to [n_cols][DV] sums in shared memory; those of the first wave set
    // them.
    __device__ __forceinline__ void add_sums(float * total, const float * top, const bool) const {
        if (turbo_wmma_line() >= n_cols) {
            return;
        }
        const bool  first  = threadIdx.y < 2;
        const float factor = turbo_wmma_exp2(maximum() - top[column()]);
#    pragma unroll
        for (int ic = 0; ic < values::n_chunks; ++ic) {
#    pragma unroll
            for (int f = 0; f < values::n; ++f) {
#    pragma unroll
                for (int r = 0; r < 4; ++r) {
                    float * x =
                        total + column() * DV + ic * values::chunk + values::channel(f, 4 * turbo_mfma_part() + r);
                    *x = fmaf(factor, acc[ic][f][r], first ? 0.0f : *x);
                }
            }
        }
    }
};

#endif  // TURBO_MFMA
