#include "moments.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>

// A channel that a text hardly uses must not be left without bits in another one.
static constexpr double LARGEST_SCALE = 64.0;

// Least mean square of a channel, relative to that of its head: dead channels have scales, too.
static constexpr double LEAST_SQUARE = 1e-6;

static void add_to(std::vector<double> & sums, const std::vector<float> & values) {
    sums.resize(values.size(), 0.0);
    std::transform(values.begin(), values.end(), sums.begin(), sums.begin(),
                   [](float value, double sum) { return sum + value; });
}

static std::vector<float> read_sums(const ggml_tensor * tensor) {
    std::vector<float> res(ggml_nelements(tensor));
    ggml_backend_tensor_get(tensor, res.data(), 0, ggml_nbytes(tensor));

    return res;
}

// Of query heads, those of each KV head.
static std::vector<float> add_groups(const std::vector<float> & values, int64_t n_embd, int64_t n_group) {
    std::vector<float> res(values.size() / n_group, 0.0f);
    for (size_t i = 0; i < values.size(); ++i) {
        res[i / (n_embd * n_group) * n_embd + i % n_embd] += values[i];
    }

    return res;
}

void llama_turbo_moments::add(const llama_turbo_observed_layer & layer, int64_t n_tokens, int64_t n_group) {
    n_embd_k  = layer.k_sum->ne[0];
    n_embd_v  = layer.v_sum->ne[0];
    n_head_kv = layer.k_sum->ne[1];
    rope      = layer.rope;

    n_keys += n_tokens;
    n_queries += n_tokens * n_group;

    add_to(q_sq, add_groups(read_sums(layer.q_sq), n_embd_k, n_group));
    add_to(k_sum, read_sums(layer.k_sum));
    add_to(k_sq, read_sums(layer.k_sq));
    add_to(v_sum, read_sums(layer.v_sum));
    add_to(v_sq, read_sums(layer.v_sq));
    add_to(v_weight, read_sums(layer.v_weight));
    k_first.clear();
    add_to(k_first, read_sums(layer.k_first));
    if (layer.has_output && out_sq.empty()) {
        add_to(out_sq, read_sums(layer.out_sq));
    }
}

// Scale of each channel of each head, the fourth root of a ratio of mean squares, with a geometric mean of 1.
static std::vector<float> balance(const std::vector<double> & reader_sq,
                                  const std::vector<double> & stored_sq,
                                  int64_t                     n_embd) {
    std::vector<float> res(stored_sq.size());
    for (size_t begin = 0; begin < res.size(); begin += n_embd) {
        const auto level_of = [&](const std::vector<double> & squares) {
            double sum = 0.0;
            for (int64_t i = 0; i < n_embd; ++i) {
                sum += squares[begin + i];
            }
            return sum > 0.0 ? sum / n_embd * LEAST_SQUARE : 1.0;
        };
        const double least_reader = level_of(reader_sq);
        const double least_stored = level_of(stored_sq);

        std::vector<double> logs(n_embd);
        double              mean = 0.0;
        for (int64_t i = 0; i < n_embd; ++i) {
            logs[i] = 0.25 * std::log(std::max(reader_sq[begin + i], least_reader) /
                                      std::max(stored_sq[begin + i], least_stored));
            mean += logs[i] / n_embd;
        }
        for (int64_t i = 0; i < n_embd; ++i) {
            res[begin + i] = std::clamp(std::exp(logs[i] - mean), 1.0 / LARGEST_SCALE, LARGEST_SCALE);
        }
    }

    return res;
}

static std::vector<float> to_floats(const std::vector<double> & values) {
    return { values.begin(), values.end() };
}

llama_turbo_calibration_layer llama_turbo_moments::calibrate(bool                          center_k,
                                                             bool                          center_v,
                                                             const llama_turbo_rope_mean & rope_mean) const {
    const size_t  n_k     = k_sq.size();
    const int64_t n_pairs = rope_mean.turn.size();

    std::vector<double> mean(n_k);
    std::vector<double> queries(n_k);
    std::vector<double> keys(n_k);
    for (size_t i = 0; i < n_k; ++i) {
        mean[i]    = center_k ? k_sum[i] / n_keys : 0.0;
        queries[i] = q_sq[i] / n_queries;
        keys[i]    = k_sq[i] / n_keys;
    }
    std::vector<double> left = keys;  // mean squares around the mean
    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (int64_t i = 0; i < n_embd_k; ++i) {
            left[h * n_embd_k + i] -= mean[h * n_embd_k + i] * mean[h * n_embd_k + i];
        }
        for (int64_t pair = 0; pair < n_pairs; ++pair) {
            const size_t a = h * n_embd_k + (rope_mean.pairs_neighbours ? 2 * pair : pair);
            const size_t b = rope_mean.pairs_neighbours ? a + 1 : a + n_pairs;

            const std::complex<double> turned = rope_mean.turn[pair] * std::complex<double>(mean[a], mean[b]);

            left[a] = left[b] = (rope_mean.size * rope_mean.size * (keys[a] + keys[b]) - std::norm(turned)) / 2;
            queries[a] = queries[b] = (queries[a] + queries[b]) / 2;

            mean[a] = turned.real();
            mean[b] = turned.imag();
        }
    }

    llama_turbo_calibration_layer res;
    res.k_scale = balance(queries, left, n_embd_k);
    if (center_k) {
        res.k_mean = to_floats(mean);
    }

    std::vector<double> v_mean(v_sum.size());
    std::vector<double> v_left(v_sum.size());
    for (size_t i = 0; i < v_sum.size(); ++i) {
        const double weight = v_weight[i / n_embd_v];
        v_mean[i]           = center_v ? v_sum[i] / weight : 0.0;
        v_left[i]           = v_sq[i] / weight - v_mean[i] * v_mean[i];
    }
    if (center_v) {
        res.v_mean = to_floats(v_mean);
    }
    if (!out_sq.empty()) {
        res.v_scale = balance(out_sq, v_left, n_embd_v);
    }

    return res;
}

std::vector<double> llama_turbo_moments::first_tokens() const {
    double others = 0.0;
    for (size_t i = 0; i < k_sq.size(); ++i) {
        others += k_sq[i] / n_keys - std::pow(k_sum[i] / n_keys, 2);
    }

    std::vector<double> res;
    for (size_t begin = 0; begin < k_first.size(); begin += k_sq.size()) {
        double distance = 0.0;
        for (size_t i = 0; i < k_sq.size(); ++i) {
            distance += std::pow(k_first[begin + i] - k_sum[i] / n_keys, 2);
        }
        res.push_back(std::sqrt(distance / others));
    }

    return res;
}
