#pragma once

#include <vector>

// What the vectors of a head are multiplied by before they are quantized, so that errors of equal size in all channels cost least where the
// vectors are read: in products with other ones, the readers. Both are known by means over tokens. See docs/design/0011-calibration.md.

// Scales [n] from mean squares of channels [n]: fourth roots of reader / stored, with a geometric mean of 1.
std::vector<double> llama_turbo_balance_scales(const std::vector<double> & reader, const std::vector<double> & stored);

// Matrices [n][n], for what is stored and for its readers: the inverse of the other one, transposed. Their determinants are 1 or -1.
struct llama_turbo_maps {
    std::vector<double> stored;
    std::vector<double> reader;
};

// What is known of vectors.
struct llama_turbo_products {
    std::vector<double> mean;  // products of channels, [n][n]
    std::vector<double>
           squares;   // of channels, [n]: the diagonal, or what replaces it where the rest of the matrix is not trusted
    double n_tokens;  // that it comes from
};

// Behind the maps, stored vectors and readers have the same squares of channels, and no products of two channels: the error of their product
// is then least.
llama_turbo_maps llama_turbo_balance_maps(const llama_turbo_products & reader, const llama_turbo_products & stored);
