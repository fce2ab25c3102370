#pragma once

#include "observed.h"

#include <cstdint>
#include <utility>
#include <vector>

// What RoPE makes of the vectors of heads, on average over positions.
class llama_turbo_rope_mean {
  public:
    // Positions 0 .. n - 1. Position p has the weight 1/max(p, FEW) - 1/n: what it has on average in contexts that are filled up to a length
    // between FEW and n, all lengths being as likely as on a logarithmic scale. Pairs of channels that turn slowly stay near where they are,
    // fast ones near 0.
    // A RoPE that is not known turns nothing. Throws std::runtime_error: out of memory.
    llama_turbo_rope_mean(const llama_turbo_rope & rope, int64_t n_embd_head, int64_t n);

    // What becomes of a vector [n_embd_head], and of the mean products of the channels of vectors [n_embd_head][n_embd_head].
    std::vector<double> turn(const std::vector<double> & vector) const;
    std::vector<double> turn_products(const std::vector<double> & of_channels) const;

    // Makes the values [n_embd_head] of both channels of a pair equal: their mean.
    void even_out(std::vector<double> & values) const;

  private:
    std::vector<std::pair<int64_t, int64_t>> pairs;  // of channels

    std::vector<double> unit;      // [n_embd_head]: what the unit vectors of all pairs, (1, 0), become
    std::vector<double> products;  // [n_embd_head][n_embd_head]: of the channels of that

    void set_pairs(bool are_neighbours, int64_t n_rot, int64_t n_embd_head);
};
