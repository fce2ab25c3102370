#pragma once

// simd.h in portable C++: arrays of eight. Included by it.

#include <cmath>

namespace {

constexpr const char * SIMD_NAME = "generic";

constexpr int LANES      = 8;
constexpr int GEMM_ROWS  = 4;
constexpr int GEMM_VECS  = 2;
constexpr int LEVEL_BIAS = 0;

constexpr bool HAS_DOT_PAIRS = TURBO_TEST_PAIRS;

struct vf {
    float x[LANES];
};

struct vi {
    int32_t x[LANES];
};

template <class V, class F> inline V make(F f) {
    V v;
    for (int i = 0; i < LANES; ++i) {
        v.x[i] = f(i);
    }
    return v;
}

//
// floats
//

inline vf splat(float x) {
    return make<vf>([=](int) { return x; });
}

inline vf load(const float * p) {
    return make<vf>([=](int i) { return p[i]; });
}

inline void store(float * p, vf v) {
    memcpy(p, v.x, sizeof(v.x));
}

inline vf load_half(const ggml_half * p) {
    return make<vf>([=](int i) { return GGML_CPU_FP16_TO_FP32(p[i]); });
}

inline vf add(vf a, vf b) {
    return make<vf>([&](int i) { return a.x[i] + b.x[i]; });
}

inline vf sub(vf a, vf b) {
    return make<vf>([&](int i) { return a.x[i] - b.x[i]; });
}

inline vf mul(vf a, vf b) {
    return make<vf>([&](int i) { return a.x[i] * b.x[i]; });
}

inline vf div(vf a, vf b) {
    return make<vf>([&](int i) { return a.x[i] / b.x[i]; });
}

inline vf fma(vf a, vf b, vf c) {
    return make<vf>([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}

inline vf max(vf a, vf b) {
    return make<vf>([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}

inline vf select_gt(vf a, vf b, vf x, vf y) {
    return make<vf>([&](int i) { return a.x[i] > b.x[i] ? x.x[i] : y.x[i]; });
}

inline vf min(vf a, vf b) {
    return make<vf>([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}

// Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even; good for |x| < 2^22.
inline vf round(vf a) {
    return make<vf>([&](int i) {
        volatile float shifted = a.x[i] + 12582912.0f;
        return shifted - 12582912.0f;
    });
}

inline vf pow2_scale(vf v, vf n) {
    return make<vf>([&](int i) {
        const uint32_t bits = (uint32_t) ((n.x[i] == n.x[i] ? (int32_t) n.x[i] : 0) + 127) << 23;
        float          p;
        memcpy(&p, &bits, sizeof(p));
        return v.x[i] * p;
    });
}

template <int D> inline vf butterfly(vf x) {
    return make<vf>([&](int i) { return i & D ? x.x[i ^ D] - x.x[i] : x.x[i] + x.x[i ^ D]; });
}

inline float max_lane(vf a) {
    float m = a.x[0];
    for (int i = 1; i < LANES; ++i) {
        m = a.x[i] > m ? a.x[i] : m;
    }
    return m;
}

inline float sum_lanes(vf a) {
    float s = 0.0f;
    for (int i = 0; i < LANES; ++i) {
        s += a.x[i];
    }
    return s;
}

inline void store_sums(float * p, const vf * x) {
    for (int i = 0; i < 4; ++i) {
        p[i] = sum_lanes(x[i]);
    }
}

//
// integers; what is done to bytes is done to the bytes of the dwords in memory, so that either byte order will do
//

template <class F> inline vi make_bytes(F f) {
    int8_t b[4 * LANES];
    for (int i = 0; i < 4 * LANES; ++i) {
        b[i] = f(i);
    }
    vi v;
    memcpy(v.x, b, sizeof(b));
    return v;
}

inline vi splat_i32(int32_t x) {
    return make<vi>([=](int) { return x; });
}

inline vi load_i32(const int32_t * p) {
    return make<vi>([=](int i) { return p[i]; });
}

inline void store_i32(int32_t * p, vi v) {
    memcpy(p, v.x, sizeof(v.x));
}

inline vi splat_i8(int8_t x) {
    return make_bytes([=](int) { return x; });
}

inline vf to_float(vi v) {
    return make<vf>([&](int i) { return (float) v.x[i]; });
}

inline vf as_float(vi v) {
    vf f;
    memcpy(f.x, v.x, sizeof(f.x));
    return f;
}

inline vi as_int(vf f) {
    vi v;
    memcpy(v.x, f.x, sizeof(v.x));
    return v;
}

inline vi max_i32(vi a, vi b) {
    return make<vi>([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}

inline vi add_i32(vi a, vi b) {
    return make<vi>([&](int i) { return (int32_t) ((uint32_t) a.x[i] + (uint32_t) b.x[i]); });
}

inline vi sub_i32(vi a, vi b) {
    return make<vi>([&](int i) { return (int32_t) ((uint32_t) a.x[i] - (uint32_t) b.x[i]); });
}

inline vi min_u32(vi a, vi b) {
    return make<vi>([&](int i) { return (uint32_t) a.x[i] < (uint32_t) b.x[i] ? a.x[i] : b.x[i]; });
}

inline vi load_u16(const uint16_t * p) {
    return make<vi>([=](int i) { return p[i]; });
}

inline vi bias_levels(vi x) {
    return x;
}

inline vi dot(vi acc, vi k, vi q) {
    int8_t a[4 * LANES], b[4 * LANES];
    memcpy(a, k.x, sizeof(a));
    memcpy(b, q.x, sizeof(b));
    for (int i = 0; i < 4 * LANES; ++i) {
        acc.x[i / 4] += a[i] * b[i];
    }
    return acc;
}

inline vi dot_pairs(vi acc, vi a, vi b) {
    int16_t x[2 * LANES], y[2 * LANES];
    memcpy(x, a.x, sizeof(x));
    memcpy(y, b.x, sizeof(y));
    for (int i = 0; i < 2 * LANES; ++i) {
        acc.x[i / 2] += x[i] * y[i];
    }
    return acc;
}

inline void store_i16(int16_t * p, vf v) {
    const vf r = round(v);
    int16_t  x[LANES];
    for (int i = 0; i < LANES; ++i) {
        x[i] = (int16_t) r.x[i];
    }
    memcpy(p, x, sizeof(x));  // may be where floats are
}

inline vi to_pairs(vf even, vf odd) {
    int16_t x[LANES], y[LANES], pairs[2 * LANES];
    store_i16(x, even);
    store_i16(y, odd);
    for (int i = 0; i < LANES; ++i) {
        pairs[2 * i]     = x[i];
        pairs[2 * i + 1] = y[i];
    }
    vi v;
    memcpy(v.x, pairs, sizeof(v.x));
    return v;
}

struct vtable {
    int8_t x[16];
};

inline vtable lookup_table(const int8_t * p) {
    vtable t;
    memcpy(t.x, p, sizeof(t.x));
    return t;
}

inline vi lookup(const vtable & table, vi index) {
    uint8_t b[4 * LANES];
    memcpy(b, index.x, sizeof(b));
    return make_bytes([&](int i) { return table.x[b[i]]; });
}

//
// words: 2 * LANES int16, lane i has words 2i and 2i + 1
//

template <class F> inline vi make_words(F f) {
    int16_t words[2 * LANES];
    for (int i = 0; i < 2 * LANES; ++i) {
        words[i] = (int16_t) f(i);
    }
    vi v;
    memcpy(v.x, words, sizeof(words));
    return v;
}

struct words16 {
    uint16_t x[2 * LANES];

    explicit words16(vi v) { memcpy(x, v.x, sizeof(x)); }

    int operator[](int i) const { return x[i]; }
};

inline vi load_words16(const int16_t * p) {
    return make_words([=](int i) { return p[i]; });
}

inline void store_words16(int16_t * p, vi x) {
    memcpy(p, x.x, sizeof(x.x));
}

inline vi splat_i16(int16_t x) {
    return make_words([=](int) { return x; });
}

inline vi swap_words(vi x) {
    const words16 w(x);
    return make_words([&](int i) { return w[i ^ 1]; });
}

inline vi add_i16(vi a, vi b) {
    const words16 x(a), y(b);
    return make_words([&](int i) { return x[i] + y[i]; });
}

inline vi sub_i16(vi a, vi b) {
    const words16 x(a), y(b);
    return make_words([&](int i) { return x[i] - y[i]; });
}

inline vi sub_u16(vi a, vi b) {
    const words16 x(a), y(b);
    return make_words([&](int i) { return x[i] > y[i] ? x[i] - y[i] : 0; });
}

inline vi min_u16(vi a, vi b) {
    const words16 x(a), y(b);
    return make_words([&](int i) { return x[i] < y[i] ? x[i] : y[i]; });
}

inline vi abs_i16(vi a) {
    const words16 x(a);
    return make_words([&](int i) { return (int16_t) x[i] < 0 ? -x[i] : x[i]; });
}

template <int N> inline vi shift_left_i16(vi a) {
    const words16 x(a);
    return make_words([&](int i) { return (unsigned) x[i] << N; });
}

inline vi select_eq_i16(vi a, vi b, vi x, vi y) {
    const words16 i(a), j(b), yes(x), no(y);
    return make_words([&](int n) { return i[n] == j[n] ? yes[n] : no[n]; });
}

inline vi count_gt_i16(vi n, vi a, vi b) {
    const words16 counts(n), x(a), y(b);
    return make_words([&](int i) { return counts[i] + ((int16_t) x[i] > (int16_t) y[i]); });
}

inline vi lookup_words(const int16_t * table, vi index) {
    const words16 i(index);
    return make_words([&](int n) { return table[i[n] >> 1 & 7]; });
}

inline vi spread_bits(uint32_t bits, vi x) {
    const words16 w(x);
    return make_words([&](int i) { return bits >> i & 1 ? w[i] : 0; });
}

inline uint32_t gather_bits(vi x, int bit) {
    const words16 w(x);
    uint32_t      bits = 0;
    for (int i = 0; i < 2 * LANES; ++i) {
        bits |= (uint32_t) (w[i] >> bit & 1) << i;
    }
    return bits;
}

template <int N> using wide_table = level_table;

template <int N> inline level_table make_wide_table(const level_table & levels) {
    return levels;
}

template <int N> inline vi lookup_wide(const level_table & table, vi index) {
    uint8_t b[4 * LANES];
    memcpy(b, index.x, sizeof(b));
    return make_bytes([&](int i) { return table.x[b[i]]; });
}

inline vi bit_and(vi a, vi b) {
    return make<vi>([&](int i) { return a.x[i] & b.x[i]; });
}

inline vi bit_or(vi a, vi b) {
    return make<vi>([&](int i) { return a.x[i] | b.x[i]; });
}

inline vi bit_xor(vi a, vi b) {
    return make<vi>([&](int i) { return a.x[i] ^ b.x[i]; });
}

inline vi bit_select(vi m, vi a, vi b) {
    return make<vi>([&](int i) { return (a.x[i] & m.x[i]) | (b.x[i] & ~m.x[i]); });
}

template <int N> inline vi shift_right(vi v) {
    return make<vi>(
        [&](int i) { return (int32_t) (N >= 0 ? (uint32_t) v.x[i] >> (N & 31) : (uint32_t) v.x[i] << (-N & 31)); });
}

template <int N, class F> inline void gather_words(vi * w, F row) {
    for (int i = 0; i < LANES; ++i) {
        for (int j = 0; j < N; ++j) {
            memcpy(&w[j].x[i], row(i) + 4 * j, sizeof(int32_t));
        }
    }
}

template <int N> inline void load_words(vi * w, const char * p, size_t stride) {
    gather_words<N>(w, [=](int i) { return p + i * stride; });
}

//
// blocks as floats
//

inline void unpack_with(void (*dequantize)(const void *, float *), const void * x, vf * y) {
    float f[QK_SCALAR];
    dequantize(x, f);
    memcpy(y, f, sizeof(f));
}

inline void unpack(const block_turbo2_0 & x, vf * y) {
    unpack_with([](const void * b, float * f) { dequantize_row_turbo2_0((const block_turbo2_0 *) b, f, QK_SCALAR); },
                &x, y);
}

inline void unpack(const block_turbo3_0 & x, vf * y) {
    unpack_with([](const void * b, float * f) { dequantize_row_turbo3_0((const block_turbo3_0 *) b, f, QK_SCALAR); },
                &x, y);
}

inline void unpack(const block_turbo4_0 & x, vf * y) {
    unpack_with([](const void * b, float * f) { dequantize_row_turbo4_0((const block_turbo4_0 *) b, f, QK_SCALAR); },
                &x, y);
}

inline void unpack(const block_q8_0 & x, vf * y) {
    const float d = GGML_CPU_FP16_TO_FP32(x.d);
    float       f[QK8_0];
    for (int i = 0; i < QK8_0; ++i) {
        f[i] = d * x.qs[i];
    }
    memcpy(y, f, sizeof(f));
}

inline void unpack(const block_q4_0 & x, vf * y) {
    const float d = GGML_CPU_FP16_TO_FP32(x.d);
    float       f[QK4_0];
    for (int i = 0; i < QK4_0 / 2; ++i) {
        f[i]             = d * ((x.qs[i] & 15) - 8);
        f[i + QK4_0 / 2] = d * ((x.qs[i] >> 4) - 8);
    }
    memcpy(y, f, sizeof(f));
}

template <int BITS, int HALF> inline void unpack(const trellis_half<BITS, HALF> & x, vf * y) {
    int8_t levels[QK_TRELLIS];
    trellis_unpack_levels(&TRELLIS<BITS>, x.bytes, levels);
    const float d = trellis_scale_of(x.bytes[0]) / TRELLIS_LEVEL_STEPS;
    float       f[QK_SCALAR];
    for (int i = 0; i < QK_SCALAR; ++i) {
        f[i] = d * levels[HALF * QK_SCALAR + i];
    }
    memcpy(y, f, sizeof(f));
}

}  // namespace
