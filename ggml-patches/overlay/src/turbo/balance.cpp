#include "balance.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// A channel that a text hardly uses must not be left without bits in another one.
static constexpr double LARGEST_SCALE = 64.0;

// Least mean square of a channel, relative to that of its head: dead channels have scales, too.
static constexpr double LEAST_SQUARE = 1e-6;

// The same for maps, which have no largest scale.
static constexpr double LEAST_SQUARE_OF_MAPS = 1e-4;

// Least part of the products that is not trusted.
static constexpr double LEAST_DOUBT = 0.1;

// Sweeps over all pairs of channels, and the cosine of two channels that is small enough. What is left only makes the error a little larger.
static constexpr int    SWEEPS       = 8;
static constexpr double SMALL_COSINE = 1e-4;

using matrix = std::vector<double>;  // [n][n]

static matrix floored(matrix squares, double least) {
    const double sum = std::accumulate(squares.begin(), squares.end(), 0.0);
    const double min = sum > 0.0 ? sum / squares.size() * least : 1.0;
    for (double & square : squares) {
        square = std::max(square, min);
    }

    return squares;
}

std::vector<double> llama_turbo_balance_scales(const std::vector<double> & reader, const std::vector<double> & stored) {
    const std::vector<double> reader_sq = floored(reader, LEAST_SQUARE);
    const std::vector<double> stored_sq = floored(stored, LEAST_SQUARE);

    std::vector<double> res(stored.size());
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = 0.25 * std::log(reader_sq[i] / stored_sq[i]);
    }
    const double mean = std::accumulate(res.begin(), res.end(), 0.0) / res.size();
    for (double & scale : res) {
        scale = std::clamp(std::exp(scale - mean), 1.0 / LARGEST_SCALE, LARGEST_SCALE);
    }

    return res;
}

// Products of which a part is replaced by the squares alone, so that it has an inverse, and noise of few tokens is not taken for structure.
static matrix trusted(const llama_turbo_products & products) {
    const size_t n     = products.squares.size();
    const double doubt = std::clamp(n / products.n_tokens, LEAST_DOUBT, 1.0);

    const std::vector<double> squares = floored(products.squares, LEAST_SQUARE_OF_MAPS);

    matrix res = products.mean;
    for (size_t i = 0; i < n * n; ++i) {
        res[i] = (1.0 - doubt) * res[i] + (i % (n + 1) == 0 ? doubt * squares[i / n] : 0.0);
    }

    return res;
}

// Cholesky: lower triangle L with L * L^T = a.
static matrix lower_root(const matrix & a, size_t n) {
    matrix res(n * n, 0.0);
    for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j <= i; ++j) {
            const double * row_i = &res[i * n];
            const double * row_j = &res[j * n];
            const double   rest  = a[i * n + j] - std::inner_product(row_i, row_i + j, row_j, 0.0);

            res[i * n + j] = i == j ? std::sqrt(std::max(rest, a[i * n + i] * 1e-12)) : rest / res[j * n + j];
        }
    }

    return res;
}

// Rows of the inverse of a lower triangle.
static matrix inverse_of_lower(const matrix & lower, size_t n) {
    matrix res(n * n, 0.0);
    for (size_t i = 0; i < n; ++i) {
        for (size_t k = 0; k < i; ++k) {
            const double factor = lower[i * n + k];
            for (size_t j = 0; j <= k; ++j) {
                res[i * n + j] -= factor * res[k * n + j];
            }
        }
        res[i * n + i] = 1.0;
        for (size_t j = 0; j <= i; ++j) {
            res[i * n + j] /= lower[i * n + i];
        }
    }

    return res;
}

static matrix multiply(const matrix & a, const matrix & b, size_t n) {
    matrix res(n * n, 0.0);
    for (size_t i = 0; i < n; ++i) {
        for (size_t k = 0; k < n; ++k) {
            const double factor = a[i * n + k];
            for (size_t j = 0; j < n; ++j) {
                res[i * n + j] += factor * b[k * n + j];
            }
        }
    }

    return res;
}

static matrix transpose(const matrix & a, size_t n) {
    matrix res(n * n);
    for (size_t i = 0; i < n * n; ++i) {
        res[i] = a[i % n * n + i / n];
    }

    return res;
}

static void turn_rows(double * x, double * y, size_t n, double cosine, double sine) {
    for (size_t i = 0; i < n; ++i) {
        const double turned = cosine * x[i] - sine * y[i];

        y[i] = sine * x[i] + cosine * y[i];
        x[i] = turned;
    }
}

// Four sums, which processors add up side by side.
static double product(const double * x, const double * y, size_t n) {
    double sums[4] = {};
    size_t i       = 0;
    for (; i + 4 <= n; i += 4) {
        for (size_t j = 0; j < 4; ++j) {
            sums[j] += x[i + j] * y[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[0] += x[i] * y[i];
    }

    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

// One-sided Jacobi: turns pairs of rows until all are at right angles, and the rows of another matrix likewise.
static void make_orthogonal(matrix & rows, matrix & others, size_t n) {
    bool is_done = false;
    for (int sweep = 0; sweep < SWEEPS && !is_done; ++sweep) {
        is_done = true;
        for (size_t i = 0; i < n; ++i) {
            for (size_t j = i + 1; j < n; ++j) {
                double *     x  = &rows[i * n];
                double *     y  = &rows[j * n];
                const double xx = product(x, x, n);
                const double yy = product(y, y, n);
                const double xy = product(x, y, n);
                if (std::abs(xy) <= SMALL_COSINE * std::sqrt(xx * yy)) {
                    continue;
                }
                const double ratio   = (yy - xx) / (2.0 * xy);
                const double tangent = (ratio < 0.0 ? -1.0 : 1.0) / (std::abs(ratio) + std::sqrt(1.0 + ratio * ratio));
                const double cosine  = 1.0 / std::sqrt(1.0 + tangent * tangent);

                turn_rows(x, y, n, cosine, tangent * cosine);
                turn_rows(&others[i * n], &others[j * n], n, cosine, tangent * cosine);
                is_done = false;
            }
        }
    }
}

llama_turbo_maps llama_turbo_balance_maps(const llama_turbo_products & reader, const llama_turbo_products & stored) {
    const size_t n    = stored.squares.size();
    const matrix kept = lower_root(trusted(stored), n);
    const matrix read = lower_root(trusted(reader), n);

    // With stored = L * L^T and reader = R * R^T, let V^T * (L^T * R) have orthogonal rows, and D be the norms of these. Then the maps
    // D^1/2 * V^T * L^-1 and D^-1/2 * V^T * L^T make D of both. They are inverse of each other, whatever D is and any rotation V.
    matrix rows = multiply(transpose(kept, n), read, n);
    matrix turns(n * n, 0.0);
    for (size_t i = 0; i < n; ++i) {
        turns[i * n + i] = 1.0;
    }
    make_orthogonal(rows, turns, n);

    llama_turbo_maps res = { multiply(turns, inverse_of_lower(kept, n), n), multiply(turns, transpose(kept, n), n) };

    std::vector<double> scales(n);
    double              level = 0.0;  // logarithm of the geometric mean of what the maps multiply by
    for (size_t i = 0; i < n; ++i) {
        const double * row = &rows[i * n];

        scales[i] = std::sqrt(std::sqrt(std::inner_product(row, row + n, row, 0.0)));
        level += (std::log(scales[i]) - std::log(kept[i * n + i])) / n;
    }
    for (size_t i = 0; i < n * n; ++i) {
        const double scale = scales[i / n] / std::exp(level);

        res.stored[i] *= scale;
        res.reader[i] /= scale;
    }

    return res;
}
