#pragma once

#include "observed.h"

#include <complex>
#include <cstdint>
#include <vector>

// What RoPE makes of a constant vector, on average over positions.
struct llama_turbo_rope_mean {
    std::vector<std::complex<double>>
           turn;                    // [n_rot/2]: by what each pair of channels (x, y), as x + iy, is multiplied
    double size = 1.0;              // of any vector, since some kinds of RoPE change it

    bool pairs_neighbours = false;  // channels 2i and 2i + 1 are a pair; otherwise i and i + n_rot/2
};

// The average over n positions, near 1 for pairs that turn slowly, and near 0 for fast ones. Position p has the weight 1/max(p, FEW) - 1/n: what it has on average in contexts that are filled up to a length between FEW and n, all
// lengths being as likely as on a logarithmic scale.
// Of a RoPE that is not known, no pair is turned. Throws std::runtime_error: out of memory.
llama_turbo_rope_mean llama_turbo_mean_over_positions(const llama_turbo_rope & rope, int64_t n);
