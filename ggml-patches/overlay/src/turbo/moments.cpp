#include "moments.h"

#include "balance.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>

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

void llama_turbo_moments::add(const llama_turbo_observed_layer & layer, int64_t n_tokens, int64_t n_group) {
    n_embd_k  = layer.k_sum->ne[0];
    n_embd_v  = layer.v_sum->ne[0];
    n_head_kv = layer.k_sum->ne[1];
    rope      = layer.rope;
    turns_q   = layer.turns_q;

    n_keys += n_tokens;
    n_queries += n_tokens * n_group;

    const std::vector<float> sum = read_sums(layer.k_sum);
    add_to(k_sum, sum);
    add_to(q_products, read_sums(layer.q_products));
    add_to(k_products, read_sums(layer.k_products));
    for (size_t i = 0; i < k_products.size(); ++i) {  // those of the mean of the ubatch, which was taken away
        const size_t head = i / (n_embd_k * n_embd_k) * n_embd_k;

        k_products[i] += (double) sum[head + i / n_embd_k % n_embd_k] * sum[head + i % n_embd_k] / n_tokens;
    }
    add_to(v_sum, read_sums(layer.v_sum));
    add_to(v_sq, read_sums(layer.v_sq));
    add_to(v_weight, read_sums(layer.v_weight));
    k_first.clear();
    add_to(k_first, read_sums(layer.k_first));
    if (layer.has_output && out_sq.empty()) {
        add_to(out_sq, read_sums(layer.out_sq));
    }
}

static void append(std::vector<float> & to, const std::vector<double> & values) {
    to.insert(to.end(), values.begin(), values.end());
}

// Of the n values or products of a head.
static std::vector<double> mean_of(const std::vector<double> & sums, int64_t head, size_t n, double n_tokens) {
    std::vector<double> res(sums.begin() + head * n, sums.begin() + (head + 1) * n);
    for (double & value : res) {
        value /= n_tokens;
    }

    return res;
}

static std::vector<double> diagonal(const std::vector<double> & products, size_t n) {
    std::vector<double> res(n);
    for (size_t i = 0; i < n; ++i) {
        res[i] = products[i * n + i];
    }

    return res;
}

void llama_turbo_moments::calibrate_k(int64_t                         head,
                                      const llama_turbo_rope_mean &   rope_mean,
                                      const choice &                  choice,
                                      llama_turbo_calibration_layer & res) const {
    const size_t n = n_embd_k;

    llama_turbo_products queries = { mean_of(q_products, head, n * n, n_queries), {}, n_queries };
    llama_turbo_products keys    = { mean_of(k_products, head, n * n, n_keys), {}, n_keys };

    keys.mean    = rope_mean.turn_products(keys.mean);
    queries.mean = turns_q ? rope_mean.turn_products(queries.mean) : queries.mean;
    if (choice.centers_k) {
        const std::vector<double> mean = rope_mean.turn(mean_of(k_sum, head, n, n_keys));
        for (size_t i = 0; i < n * n; ++i) {
            keys.mean[i] -= mean[i / n] * mean[i % n];
        }
        append(res.k_mean, mean);
    }
    for (llama_turbo_products * products : { &queries, &keys }) {
        products->squares = diagonal(products->mean, n);
        rope_mean.even_out(products->squares);
    }

    if (choice.maps_k && turns_q) {
        const llama_turbo_maps maps = llama_turbo_balance_maps(queries, keys);
        append(res.k_map, maps.stored);
        append(res.q_map, maps.reader);
    } else {
        append(res.k_scale, llama_turbo_balance_scales(queries.squares, keys.squares));
    }
}

llama_turbo_calibration_layer llama_turbo_moments::calibrate(const llama_turbo_rope_mean & rope_mean,
                                                             const choice &                choice) const {
    llama_turbo_calibration_layer res;
    for (int64_t head = 0; head < n_head_kv; ++head) {
        calibrate_k(head, rope_mean, choice, res);

        std::vector<double> mean    = mean_of(v_sum, head, n_embd_v, v_weight[head]);
        std::vector<double> squares = mean_of(v_sq, head, n_embd_v, v_weight[head]);
        if (choice.centers_v) {
            for (int64_t i = 0; i < n_embd_v; ++i) {
                squares[i] -= mean[i] * mean[i];
            }
            append(res.v_mean, mean);
        }
        if (!out_sq.empty()) {
            append(res.v_scale, llama_turbo_balance_scales(mean_of(out_sq, head, n_embd_v, 1.0), squares));
        }
    }

    return res;
}

std::vector<double> llama_turbo_moments::first_tokens() const {
    const size_t n      = n_embd_k;
    double       others = 0.0;
    for (size_t i = 0; i < k_sum.size(); ++i) {
        others += k_products[(i / n * n + i % n) * n + i % n] / n_keys - std::pow(k_sum[i] / n_keys, 2);
    }

    std::vector<double> res;
    for (size_t begin = 0; begin < k_first.size(); begin += k_sum.size()) {
        double distance = 0.0;
        for (size_t i = 0; i < k_sum.size(); ++i) {
            distance += std::pow(k_first[begin + i] - k_sum[i] / n_keys, 2);
        }
        res.push_back(std::sqrt(distance / others));
    }

    return res;
}
