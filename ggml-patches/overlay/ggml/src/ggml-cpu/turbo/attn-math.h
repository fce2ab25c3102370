#pragma once

// What attention over turbo types computes with: elementary functions of vectors, a product of matrices whose right factor may be floats,
// blocks that are unpacked on the way, or pairs of int16, and dot products of rows in memory.

#include "simd.h"

#include <algorithm>
#include <cstddef>

namespace {

constexpr int BLOCK = QK_SCALAR;  // values of a block; columns that are unpacked at a time

static_assert(BLOCK % (GEMM_VECS * LANES) == 0, "a block is whole vectors");
static_assert(QK8_0 == BLOCK && QK4_0 == BLOCK, "blocks of all types are as long");

//
// elementary functions
//

// exp(x) for x <= 0, within 2 ulp; zero below -87, where the result is near the smallest normal number; NaN stays.
inline vf exp_negative(vf x) {
    const vf low = splat(-87.0f);
    const vf y   = select_gt(low, x, low, x);
    const vf n   = round(mul(y, splat(1.44269504f)));
    const vf r   = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
    vf       p   = splat(1.9875691500e-4f);
    p            = fma(p, r, splat(1.3981999507e-3f));
    p            = fma(p, r, splat(8.3334519073e-3f));
    p            = fma(p, r, splat(4.1665795894e-2f));
    p            = fma(p, r, splat(1.6666665459e-1f));
    p            = fma(p, r, splat(5.0000001201e-1f));
    p            = add(fma(p, mul(r, r), r), splat(1.0f));
    return select_gt(low, x, splat(0.0f), pow2_scale(p, n));
}

inline vf tanh_of(vf x) {
    const vf magnitude = max(x, sub(splat(0.0f), x));
    const vf e         = exp_negative(mul(magnitude, splat(-2.0f)));
    const vf t         = div(sub(splat(1.0f), e), add(splat(1.0f), e));
    return select_gt(splat(0.0f), x, sub(splat(0.0f), t), t);
}

//
// single values
//

inline vf load_as_float(const float * p) {
    return load(p);
}

inline vf load_as_float(const ggml_half * p) {
    return load_half(p);
}

inline vf load_as_float(const ggml_bf16_t * p) {
    return as_float(shift_right<-16>(load_u16((const uint16_t *) p)));
}

//
// product of matrices
//

// Where row k of the right factor comes from: floats in memory, from column j on, ...
struct float_rows {
    const float * p;
    size_t        ld;

    float_rows from(int j) const { return { p + j, ld }; }

    void load_row(int k, vf * row) const {
        for (int j = 0; j < GEMM_VECS; ++j) {
            row[j] = load(p + k * ld + j * LANES);
        }
    }
};

// ... single values of another type, ...
template <class T> struct plain_rows {
    const char * p;
    size_t       stride;
    const int *  keys;

    plain_rows from(int j) const { return { p + j * sizeof(T), stride, keys }; }

    void load_row(int k, vf * row) const {
        for (int j = 0; j < GEMM_VECS; ++j) {
            row[j] = load_as_float((const T *) (p + keys[k] * stride) + j * LANES);
        }
    }
};

// ... or blocks that are unpacked where they are needed.
template <class B> struct block_rows {
    const char * p;
    size_t       stride;
    const int *  keys;

    block_rows from(int) const { return *this; }

    void load_row(int k, vf * row) const { unpack(*(const B *) (p + keys[k] * stride), row); }
};

// Two matrices of floats with the lengths of their rows: c[i] = factor[i] * c[i] + sum of a[i][k] * row k of the right factor, for n
// rows of that. With a scale for each row of a, these are int16 times scale.
struct product {
    float *       c;
    size_t        ldc;
    const float * factor;
    const float * a;
    size_t        lda;
    int           n;
    const float * scale = nullptr;

    product from(int i, int j) const {
        return { c + i * ldc + j, ldc, factor + i, a + i * lda, lda, n, scale ? scale + i : nullptr };
    }
};

// ROWS rows and GEMM_VECS vectors of each
template <int ROWS, class Source> void multiply_in_registers(const product & m, const Source & source) {
    vf acc[ROWS][GEMM_VECS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < GEMM_VECS; ++j) {
            acc[i][j] = mul(splat(m.factor[i]), load(m.c + i * m.ldc + j * LANES));
        }
    }
    for (int k = 0; k < m.n; ++k) {
        vf row[GEMM_VECS];
        source.load_row(k, row);
        for (int i = 0; i < ROWS; ++i) {
            const vf x = splat(m.a[i * m.lda + k]);
            for (int j = 0; j < GEMM_VECS; ++j) {
                acc[i][j] = fma(x, row[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < GEMM_VECS; ++j) {
            store(m.c + i * m.ldc + j * LANES, acc[i][j]);
        }
    }
}

// Rows 2k and 2k + 1 of floats as pairs of int16 with one scale
struct pair_rows {
    const float * p;
    size_t        ld;
    float         scale;

    pair_rows from(int j) const { return { p + j, ld, scale }; }
};

template <int ROWS> void multiply_in_registers(const product & m, const pair_rows & source) {
    vi acc[ROWS][GEMM_VECS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < GEMM_VECS; ++j) {
            acc[i][j] = splat_i32(0);
        }
    }
    for (int k = 0; k < (m.n + 1) / 2; ++k) {
        vi row[GEMM_VECS];
        for (int j = 0; j < GEMM_VECS; ++j) {
            row[j] = as_int(load(source.p + k * source.ld + j * LANES));
        }
        for (int i = 0; i < ROWS; ++i) {
            const vi x = splat_bytes4(m.a + i * m.lda + k);
            for (int j = 0; j < GEMM_VECS; ++j) {
                acc[i][j] = dot_pairs(acc[i][j], x, row[j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < GEMM_VECS; ++j) {
            float *  c   = m.c + i * m.ldc + j * LANES;
            const vf old = mul(splat(m.factor[i]), load(c));
            store(c, fma(to_float(acc[i][j]), splat(m.scale[i] * source.scale), old));
        }
    }
}

template <int ROWS = GEMM_ROWS, class Source> void multiply_rows(const product & m, int rows, const Source & source) {
    if constexpr (ROWS > 0) {
        rows == ROWS ? multiply_in_registers<ROWS>(m, source) : multiply_rows<ROWS - 1>(m, rows, source);
    }
}

// Any number of rows, columns in multiples of BLOCK
template <class Source> void multiply(const product & m, int rows, int columns, const Source & source) {
    const int passes = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
    for (int j = 0; j < columns; j += GEMM_VECS * LANES) {
        for (int pass = 0; pass < passes; ++pass) {
            const int i   = rows * pass / passes;
            const int end = rows * (pass + 1) / passes;
            multiply_rows(m.from(i, j), end - i, source.from(j));
        }
    }
}

//
// dot products
//

constexpr int DOT_KEYS = 4;
constexpr int DOT_ROWS = GEMM_ROWS * GEMM_VECS / DOT_KEYS;  // so that there are as many accumulators

// Rows of floats and DOT_KEYS keys of T, all of length n, a multiple of LANES: s[i][j] = row i * key j
template <class T> struct dot_products {
    float *              s;
    size_t               lds;
    const float *        q;
    const char * const * keys;
    int64_t              n;

    dot_products from(int i) const { return { s + i * lds, lds, q + i * n, keys, n }; }
};

template <int ROWS, class T> void dot_in_registers(const dot_products<T> & d) {
    vf acc[ROWS][DOT_KEYS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < DOT_KEYS; ++j) {
            acc[i][j] = splat(0.0f);
        }
    }
    for (int64_t column = 0; column < d.n; column += LANES) {
        vf key[DOT_KEYS];
        for (int j = 0; j < DOT_KEYS; ++j) {
            key[j] = load_as_float((const T *) d.keys[j] + column);
        }
        for (int i = 0; i < ROWS; ++i) {
            const vf x = load(d.q + i * d.n + column);
            for (int j = 0; j < DOT_KEYS; ++j) {
                acc[i][j] = fma(x, key[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        store_sums(d.s + i * d.lds, acc[i]);
    }
}

template <int ROWS = DOT_ROWS, class T> void dot_rows(const dot_products<T> & d, int rows) {
    if constexpr (ROWS > 0) {
        rows == ROWS ? dot_in_registers<ROWS>(d) : dot_rows<ROWS - 1>(d, rows);
    }
}

// Any number of rows
template <class T> void dot_all_rows(const dot_products<T> & d, int rows) {
    const int passes = (rows + DOT_ROWS - 1) / DOT_ROWS;
    for (int pass = 0; pass < passes; ++pass) {
        const int i   = rows * pass / passes;
        const int end = rows * (pass + 1) / passes;
        dot_rows(d.from(i), end - i);
    }
}

}  // namespace
