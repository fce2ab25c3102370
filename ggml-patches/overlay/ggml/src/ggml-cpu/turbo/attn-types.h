#pragma once

// What differs from type to type in attention over turbo types: scores from keys, and sums from values.

#include "attn-math.h"

#include <cmath>
#include <numeric>
#include <utility>

namespace {

constexpr int TILE    = 64;  // keys of a tile; rows of a unit, at most
constexpr int N_WORDS = BLOCK / 4;

constexpr int SEGMENTS = 2;  // of keys, at most

static_assert(TILE % LANES == 0, "a tile is whole vectors");

//
// what is kept in the work buffer
//

// Of each row, from tile to tile
struct row_states {
    int64_t            dk, dv;  // lengths of rows of q and o; dv is a multiple of BLOCK
    float *            o;       // [rows][dv] sum of weight * value
    float *            max;     // [rows] largest score
    float *            sum;     // [rows] sum of weights
    float *            slope;   // [rows] ALiBi
    const ggml_half ** mask;    // [rows][SEGMENTS] from the first key on; null: all are seen
    float *            qf;    // [rows][dk] Q times the scale of scores, if some keys become floats; and if some don't,
    int8_t *           qs;    // [rows][dk] Q, and per block
    float *            qd;    // [rows][dk / BLOCK] its scale times the scale of scores
    int32_t *          bias;  // [rows][dk / BLOCK] what LEVEL_BIAS adds to a dot product, negated

    row_states from(int64_t row) const {
        const int64_t blocks = dk / BLOCK;

        row_states st = { dk,      dv,      o + row * dv, max + row, sum + row, slope + row, mask + row * SEGMENTS,
                          nullptr, nullptr, nullptr,      nullptr };
        if (qf) {
            st.qf = qf + row * dk;
        }
        if (qs) {
            st.qs   = qs + row * dk;
            st.qd   = qd + row * blocks;
            st.bias = bias + row * blocks;
        }
        return st;
    }
};

struct scratch {
    float *     s;         // [TILE][TILE] scores, then weights: row, key
    float *     block;     // [TILE][BLOCK] unpacked: key, column
    float *     block_t;   // [BLOCK][TILE] the same transposed
    ggml_half * scales;    // [dk / BLOCK][TILE] of keys
    char *      tail;      // [TILE] rows of keys, for a tile that has fewer
    row_states  states;
    int64_t     n_states;  // rows that there is room for
};

//
// values
//

// BLOCK columns, from `column` on, of n rows of K or V; fewer where the rows end
struct column_block {
    const ggml_tensor * t;
    const char *        rows;
    const int *         keys;
    int                 n;
    int64_t             column;

    const char * row(int i) const { return rows + keys[i] * t->nb[1]; }

    bool is_whole() const { return column + BLOCK <= t->ne[0]; }
};

// As floats, y[n][BLOCK]; columns that the rows don't have are zero.
using unpack_t = void (*)(const column_block & x, float * y);

// Columns of a block
template <class B> constexpr int64_t WIDTH = BLOCK;

template <int BITS, int HALF> constexpr int64_t WIDTH<trellis_half<BITS, HALF>> = QK_TRELLIS;

template <class B> void unpack_blocks(const column_block & x, float * y) {
    for (int i = 0; i < x.n; ++i) {
        vf values[BLOCK / LANES];
        unpack(((const B *) x.row(i))[x.column / WIDTH<B>], values);
        for (int j = 0; j < BLOCK / LANES; ++j) {
            store(y + i * BLOCK + j * LANES, values[j]);
        }
    }
}

void unpack_any(const column_block & x, float * y) {
    const ggml_to_float_t to_float = ggml_get_type_traits(x.t->type)->to_float;
    const int64_t         length   = std::min<int64_t>(BLOCK, x.t->ne[0] - x.column);
    for (int i = 0; i < x.n; ++i, y += BLOCK) {
        const char * values = x.row(i) + ggml_row_size(x.t->type, x.column);
        if (to_float) {
            to_float(values, y, length);
        } else {
            memcpy(y, values, length * sizeof(float));
        }
        std::fill(y + length, y + BLOCK, 0.0f);
    }
}

template <class T> void unpack_plain(const column_block & x, float * y) {
    if (!x.is_whole()) {
        return unpack_any(x, y);
    }
    for (int i = 0; i < x.n; ++i) {
        for (int j = 0; j < BLOCK; j += LANES) {
            store(y + i * BLOCK + j, load_as_float((const T *) x.row(i) + x.column + j));
        }
    }
}

// Adds values to a block of columns of the sums. Blocks that are needed once, in one pass of rows, go from registers to the product.
using accumulate_t = void (*)(const product & m, int rows, const column_block & x, float * buffer);

// NaN if there is one
float max_magnitude(const float * x) {
    return std::accumulate(x, x + LANES, 0.0f, [](float a, float b) { return a > b || a != a ? a : b; });
}

// Floats y[n][BLOCK] become pairs in place; returns their scale. The largest magnitude as an integer: NaN and infinity stay.
float make_pairs(float * y, int n) {
    vi largest = splat_i32(0);
    for (int i = 0; i < n * BLOCK; i += LANES) {
        largest = max_i32(largest, bit_and(as_int(load(y + i)), splat_i32(0x7fffffff)));
    }
    float lanes[LANES];
    store(lanes, as_float(largest));
    const float top     = max_magnitude(lanes);
    const vf    inverse = splat(top > 0.0f ? INT16_MAX / top : 0.0f);
    if (n % 2) {
        std::fill(y + n * BLOCK, y + (n + 1) * BLOCK, 0.0f);
    }
    for (int k = 0; k < n; k += 2) {
        for (int j = 0; j < BLOCK; j += LANES) {
            const vf even = load(y + k * BLOCK + j);
            const vf odd  = load(y + (k + 1) * BLOCK + j);
            store(y + k * BLOCK + j, as_float(to_pairs(mul(inverse, even), mul(inverse, odd))));
        }
    }
    return top / INT16_MAX;
}

template <unpack_t unpack_rows>
void accumulate_floats(const product & m, int rows, const column_block & x, float * buffer) {
    unpack_rows(x, buffer);
    if constexpr (HAS_DOT_PAIRS) {
        if (m.scale) {
            const float scale = make_pairs(buffer, x.n);
            return multiply(m, rows, BLOCK, pair_rows{ buffer, 2 * BLOCK, scale });
        }
    }
    multiply(m, rows, BLOCK, float_rows{ buffer, BLOCK });
}

template <class T> void accumulate_plain(const product & m, int rows, const column_block & x, float * buffer) {
    if (rows <= GEMM_ROWS && x.is_whole()) {
        return multiply(m, rows, BLOCK, plain_rows<T>{ x.rows + x.column * sizeof(T), x.t->nb[1], x.keys });
    }
    accumulate_floats<unpack_plain<T>>(m, rows, x, buffer);
}

template <class B> void accumulate_blocks(const product & m, int rows, const column_block & x, float * buffer) {
    if constexpr (GEMM_VECS * LANES == BLOCK) {
        if (rows <= GEMM_ROWS) {
            return multiply(m, rows, BLOCK,
                            block_rows<B>{ x.rows + x.column / WIDTH<B> * sizeof(B), x.t->nb[1], x.keys });
        }
    }
    accumulate_floats<unpack_blocks<B>>(m, rows, x, buffer);
}

template <int BITS> void unpack_trellis(const column_block & x, float * y) {
    x.column % QK_TRELLIS == 0 ? unpack_blocks<trellis_half<BITS, 0>>(x, y) :
                                 unpack_blocks<trellis_half<BITS, 1>>(x, y);
}

template <int BITS> void accumulate_trellis(const product & m, int rows, const column_block & x, float * buffer) {
    x.column % QK_TRELLIS == 0 ? accumulate_blocks<trellis_half<BITS, 0>>(m, rows, x, buffer) :
                                 accumulate_blocks<trellis_half<BITS, 1>>(m, rows, x, buffer);
}

//
// scores: levels of a block of LANES keys, the values 4j .. 4j + 3 of each in levels[j]. All types start a block with its scale.
//

template <class... Levels> auto table_of(Levels... levels) {
    constexpr int n           = sizeof...(levels);
    const int8_t  codebook[n] = { (int8_t) levels... };
    int8_t        repeated[16];
    for (int i = 0; i < 16; ++i) {
        repeated[i] = codebook[i % n];
    }
    return lookup_table(repeated);
}

template <int BITS> struct keys_scalar;

template <> struct keys_scalar<2> {
    using block = block_turbo2_0;

    static auto table() { return table_of(TURBO2_0_CODEBOOK); }

    template <class Table> static void levels(vi * out, const char * qs, size_t stride, const Table & t) {
        vi       q[2];
        const vi two_bits = splat_i8(3);
        load_words<2>(q, qs, stride);
        for (int h = 0; h < 2; ++h) {
            out[h]     = lookup(t, bit_and(q[h], two_bits));
            out[2 + h] = lookup(t, bit_and(shift_right<2>(q[h]), two_bits));
            out[4 + h] = lookup(t, bit_and(shift_right<4>(q[h]), two_bits));
            out[6 + h] = lookup(t, bit_and(shift_right<6>(q[h]), two_bits));
        }
    }
};

template <> struct keys_scalar<3> {
    using block = block_turbo3_0;

    static auto table() { return table_of(TURBO3_0_CODEBOOK); }

    template <int P, int H, class Table> static vi four(vi q, vi signs, const Table & t) {
        const vi index = bit_select(splat_i8(4), shift_right<2 * P + H - 2>(signs), shift_right<2 * P>(q));
        return lookup(t, bit_and(index, splat_i8(7)));
    }

    template <class Table> static void levels(vi * out, const char * qs, size_t stride, const Table & t) {
        vi w[3];  // qs[0..3], qs[4..7], signs
        load_words<3>(w, qs, stride);
        out[0] = four<0, 0>(w[0], w[2], t);
        out[1] = four<0, 1>(w[1], w[2], t);
        out[2] = four<1, 0>(w[0], w[2], t);
        out[3] = four<1, 1>(w[1], w[2], t);
        out[4] = four<2, 0>(w[0], w[2], t);
        out[5] = four<2, 1>(w[1], w[2], t);
        out[6] = four<3, 0>(w[0], w[2], t);
        out[7] = four<3, 1>(w[1], w[2], t);
    }
};

template <class Table> void levels_of_nibbles(vi * out, const char * qs, size_t stride, const Table & t) {
    vi       q[4];
    const vi nibble = splat_i8(15);
    load_words<4>(q, qs, stride);
    for (int j = 0; j < 4; ++j) {
        out[j]     = lookup(t, bit_and(q[j], nibble));
        out[4 + j] = lookup(t, bit_and(shift_right<4>(q[j]), nibble));
    }
}

template <> struct keys_scalar<4> {
    using block = block_turbo4_0;

    static auto table() { return table_of(TURBO4_0_CODEBOOK); }

    template <class Table> static void levels(vi * out, const char * qs, size_t stride, const Table & t) {
        levels_of_nibbles(out, qs, stride, t);
    }
};

struct keys_q4_0 {
    using block = block_q4_0;

    static auto table() { return table_of(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }

    template <class Table> static void levels(vi * out, const char * qs, size_t stride, const Table & t) {
        levels_of_nibbles(out, qs, stride, t);
    }
};

struct keys_q8_0 {
    using block = block_q8_0;

    static int table() { return 0; }

    static void levels(vi * out, const char * qs, size_t stride, int) {
        load_words<N_WORDS>(out, qs, stride);
        for (int j = 0; j < N_WORDS; ++j) {
            out[j] = bias_levels(out[j]);
        }
    }
};

// Scores of a tile from integer dot products
using score_t = void (*)(const row_states & st, int rows, const char * k, size_t stride, int n_keys, const scratch & w);

// Adds the products of LANES keys with block b of all rows to their scores.
void score_rows(const row_states & st, int rows, const vi * levels, vf d, int b, float * s) {
    const int n_blocks = st.dk / BLOCK;
    for (int r = 0; r < rows; ++r, s += TILE) {
        const int8_t * q   = st.qs + r * st.dk + b * BLOCK;
        vi             acc = splat_i32(st.bias[r * n_blocks + b]);
        for (int j = 0; j < N_WORDS; ++j) {
            acc = dot(acc, levels[j], splat_bytes4(q + 4 * j));
        }
        const vf x = mul(to_float(acc), splat(st.qd[r * n_blocks + b]));
        store(s, b == 0 ? mul(x, d) : fma(x, d, load(s)));
    }
}

template <class Keys>
void score_blocks(const row_states & st, int rows, const char * k, size_t stride, int n_keys, const scratch & w) {
    constexpr size_t size     = sizeof(typename Keys::block);
    const int        n_blocks = st.dk / BLOCK;
    for (int i = 0; i < TILE; ++i) {
        for (int b = 0; b < n_blocks; ++b) {
            memcpy(w.scales + b * TILE + i, k + i * stride + b * size, sizeof(ggml_half));
        }
    }
    const auto table = Keys::table();
    for (int i = 0; i < n_keys; i += LANES) {
        for (int b = 0; b < n_blocks; ++b) {
            vi levels[N_WORDS];
            Keys::levels(levels, k + i * stride + b * size + sizeof(ggml_half), stride, table);
            score_rows(st, rows, levels, load_half(w.scales + b * TILE + i), b, w.s + i);
        }
    }
}

//
// keys of the trellis types: words of LANES blocks, as turbo/trellis.h draws them
//

// Both words of 64 bits that are rotated to the left
template <int N> void rotate(const vi * x, vi * y) {
    y[0] = bit_or(shift_right<-N>(x[0]), shift_right<32 - N>(x[1]));
    y[1] = bit_or(shift_right<-N>(x[1]), shift_right<32 - N>(x[0]));
}

// Four bits to the lowest bits of four bytes
inline vi spread(vi x) {
    const vi low  = bit_and(x, splat_i32(15));
    const vi both = bit_or(bit_or(low, shift_right<-7>(low)), bit_or(shift_right<-14>(low), shift_right<-21>(low)));
    return bit_and(both, splat_i8(1));
}

template <int BITS> struct keys_trellis {
    static constexpr size_t size = sizeof(trellis_half<BITS, 0>);

    using table = wide_table<4 << BITS>;

    static table make_table() { return make_wide_table<4 << BITS>(TRELLIS_LEVELS<BITS, LEVEL_BIAS>); }

    // One half: two bits z of subsets for every second station in even and odd, two more in low, one in high
    struct half_words {
        vi even, odd, low[2], high, selectors;
    };

    // Levels of the values 4J .. 4J + 3
    template <int J> static vi four(const half_words & x, const table & t) {
        const vi z = J % 2 == 0 ? x.even : x.odd;
        if constexpr (BITS == 2) {
            const vi upper = bit_select(splat_i8(4), shift_right<J - 2>(x.high), x.selectors);
            return lookup_wide<4 << BITS>(t, bit_select(splat_i8(3), shift_right<J / 2 * 2>(z), upper));
        } else {
            // two nibbles to a byte: of J and J + 4
            const vi nibbles = J / 2 % 2 == 0 ? bit_select(splat_i8(0x33), z, shift_right<-2>(x.low[J % 2])) :
                                                bit_select(splat_i8(0x33), shift_right<2>(z), x.low[J % 2]);
            const vi upper =
                BITS == 3 ? x.selectors : bit_select(splat_i8(16), shift_right<J - 4>(x.high), x.selectors);
            return lookup_wide<4 << BITS>(t, bit_select(splat_i8(15), shift_right<J / 4 * 4>(nibbles), upper));
        }
    }

    template <int... J>
    static void all(vi * out, const half_words & x, const table & t, std::integer_sequence<int, J...>) {
        ((out[J] = four<J>(x, t)), ...);
    }

    static void levels(vi * out, const char * words, size_t stride, vi selectors, const table & t) {
        vi w[2 * BITS];
        load_words<2 * BITS>(w, words, stride);
        vi by1[2], by2[2], by3[2];
        rotate<1>(w, by1);
        rotate<2>(w, by2);
        rotate<3>(w, by3);
        for (int half = 0; half < 2; ++half) {
            const vi   z1     = bit_xor(w[half], bit_xor(by1[half], by3[half]));
            const vi   z0     = by2[half];
            const vi   bit    = splat_i8(0x55);
            const vi * low    = BITS == 2 ? w : w + 2 + 2 * half;
            const vi   chosen = spread(half == 0 ? selectors : shift_right<4>(selectors));
            all(out + half * N_WORDS,
                {
                    bit_select(bit, z0, shift_right<-1>(z1)),
                    bit_select(bit, shift_right<1>(z0), z1),
                    { low[0], low[1] },
                    w[2 * BITS - 2 + half],
                    shift_right<-BITS - 1>(chosen)
            },
                t, std::make_integer_sequence<int, N_WORDS>());
        }
    }
};

template <int BITS>
void score_trellis(const row_states & st, int rows, const char * k, size_t stride, int n_keys, const scratch & w) {
    using Keys = keys_trellis<BITS>;

    const int n_blocks = st.dk / QK_TRELLIS;
    for (int i = 0; i < TILE; ++i) {
        for (int b = 0; b < n_blocks; ++b) {
            const uint8_t * block            = (const uint8_t *) k + i * stride + b * Keys::size;
            w.scales[2 * b * TILE + i]       = (ggml_half) (block[0] << 7);
            w.scales[(2 * b + 1) * TILE + i] = block[1];  // selectors
        }
    }
    const auto table = Keys::make_table();
    for (int i = 0; i < n_keys; i += LANES) {
        for (int b = 0; b < n_blocks; ++b) {
            const ggml_half * scales = w.scales + 2 * b * TILE + i;
            const vf          d      = mul(load_half(scales), splat(1.0f / TRELLIS_LEVEL_STEPS));
            vi                levels[2 * N_WORDS];
            Keys::levels(levels, k + i * stride + b * Keys::size + 2, stride, load_u16(scales + TILE), table);
            score_rows(st, rows, levels, d, 2 * b, w.s + i);
            score_rows(st, rows, levels + N_WORDS, d, 2 * b + 1, w.s + i);
        }
    }
}

//
// scores of few rows from keys that are single values: no buffer, but a sum over lanes for each
//

// s[row][key] of DOT_KEYS keys; lengths of keys are multiples of LANES.
using dots_t = void (*)(const row_states & st, int rows, const char * const * keys, float * s);

template <class T> void dots_of_plain(const row_states & st, int rows, const char * const * keys, float * s) {
    dot_all_rows(dot_products<T>{ s, TILE, st.qf, keys, st.dk }, rows);
}

//
// types
//

struct kernels {
    score_t      score;  // null: keys become floats
    dots_t       dots;   // for few rows; null: keys are unpacked to a buffer for those, too
    unpack_t     unpack;
    accumulate_t accumulate;
};

template <class Keys> constexpr kernels block_kernels() {
    using block = typename Keys::block;
    return { score_blocks<Keys>, nullptr, unpack_blocks<block>, accumulate_blocks<block> };
}

template <int BITS> constexpr kernels trellis_kernels() {
    return { score_trellis<BITS>, nullptr, unpack_trellis<BITS>, accumulate_trellis<BITS> };
}

template <class T> constexpr kernels plain_kernels() {
    return { nullptr, dots_of_plain<T>, unpack_plain<T>, accumulate_plain<T> };
}

#define TURBO_KERNELS_SCALAR(BITS)  block_kernels<keys_scalar<BITS>>()
#define TURBO_KERNELS_TRELLIS(BITS) trellis_kernels<BITS>()

kernels kernels_of(ggml_type type) {
    switch (type) {
#define TURBO_CASE(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                           \
        return TURBO_KERNELS_##FAMILY(BITS);
        GGML_TURBO_TYPES_X(TURBO_CASE)
#undef TURBO_CASE
        case GGML_TYPE_Q8_0:
            return block_kernels<keys_q8_0>();
        case GGML_TYPE_Q4_0:
            return block_kernels<keys_q4_0>();
        case GGML_TYPE_F16:
            return plain_kernels<ggml_half>();
        case GGML_TYPE_BF16:
            return plain_kernels<ggml_bf16_t>();
        case GGML_TYPE_F32:
            return plain_kernels<float>();
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_IQ4_NL:
            return { nullptr, nullptr, unpack_any, accumulate_floats<unpack_any> };
        default:
            return {};
    }
}

}  // namespace
