#pragma once

// Sees attention as a graph computes it, and sums up what a calibration needs.

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// Sums over tokens.
struct layer_sums {
    std::vector<double> q_sq, k_sq, k, v_sq, v;  // [n_head_kv][channel]

    size_t n_queries = 0;                        // per KV head: tokens, times query heads
    size_t n_tokens  = 0;

    std::vector<double> v_weight;  // [n_head_kv]
};

// An f32 tensor, or a view of one, on the host.
class host_tensor {
  public:
    explicit host_tensor(const ggml_tensor * tensor) : tensor(tensor) {
        const ggml_tensor * root = tensor->view_src ? tensor->view_src : tensor;
        if (tensor->type != GGML_TYPE_F32) {
            throw std::runtime_error(std::string(tensor->name) + " is not f32");
        }
        data.resize(ggml_nbytes(root));
        ggml_backend_tensor_get(root, data.data(), 0, data.size());
        begin = data.data() + (tensor->view_src ? tensor->view_offs : 0);
    }

    float at(int64_t i0, int64_t i1, int64_t i2) const {
        float value;
        memcpy(&value, begin + i0 * tensor->nb[0] + i1 * tensor->nb[1] + i2 * tensor->nb[2], sizeof(value));
        return value;
    }

  private:
    const ggml_tensor *  tensor;
    std::vector<uint8_t> data;
    const uint8_t *      begin;
};

// Sees the two products of attention, K * Q ("kq-N") and V * softmax(K * Q) ("kqv-N"), as the graph without flash attention has them.
class observer {
  public:
    std::map<uint32_t, layer_sums> layers;  // by the layer whose cache it is

    std::string error;

    void begin_chunk() { n_stored.clear(); }

    static bool callback(ggml_tensor * tensor, bool ask, void * user_data) {
        observer & self = *(observer *) user_data;

        int        il    = -1;
        const bool is_kq = sscanf(tensor->name, "kq-%d", &il) == 1;
        if (tensor->op != GGML_OP_MUL_MAT || (!is_kq && sscanf(tensor->name, "kqv-%d", &il) != 1)) {
            return !ask;
        }
        try {
            if (!ask && is_kq) {
                self.observe_kq(il, tensor->src[0], tensor->src[1]);
            } else if (!ask) {
                self.observe_v(tensor->src[0], tensor->src[1]);
            }
        } catch (const std::exception & err) {
            self.error = err.what();
            return false;
        }
        return true;
    }

  private:
    struct stored {
        int64_t n_before;  // cells that earlier batches of the chunk have filled
        int64_t n_new;
    };

    std::map<int, stored> n_stored;  // by layer; absent: the layer attends what another one has stored

    // The layer whose cache this is a view of; -1: attention without a cache.
    static int source_of(const ggml_tensor * view) {
        const std::string cache  = view->view_src ? view->view_src->name : "";
        const size_t      number = cache.rfind("_l");
        return number == std::string::npos ? -1 : atoi(cache.c_str() + number + 2);
    }

    // k: view of the cache [head size, n_kv, n_head_kv], q: [head size, n_tokens, n_head]
    void observe_kq(int il, const ggml_tensor * k, const ggml_tensor * q) {
        const int source = source_of(k);
        if (source < 0) {
            return;
        }
        layer_sums & sums = layers[source];

        const int64_t n_embd    = k->ne[0];
        const int64_t n_head_kv = k->ne[2];
        const int64_t n_group   = q->ne[2] / n_head_kv;
        const int64_t n_tokens  = q->ne[1];

        sums.q_sq.resize(n_head_kv * n_embd);
        sums.k_sq.resize(n_head_kv * n_embd);
        sums.k.resize(n_head_kv * n_embd);

        const host_tensor queries(q);
        for (int64_t h = 0; h < q->ne[2]; ++h) {
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t i = 0; i < n_embd; ++i) {
                    const double value = queries.at(i, t, h);
                    sums.q_sq[h / n_group * n_embd + i] += value * value;
                }
            }
        }
        sums.n_queries += n_group * n_tokens;

        if (source != il) {
            return;
        }
        stored & cells = n_stored[il];
        cells          = { cells.n_before + cells.n_new, n_tokens };

        const host_tensor keys(k);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t i = 0; i < n_embd; ++i) {
                    const double value = keys.at(i, cells.n_before + t, h);
                    sums.k[h * n_embd + i] += value;
                    sums.k_sq[h * n_embd + i] += value * value;
                }
            }
        }
        sums.n_tokens += n_tokens;
    }

    // v: view of the cache [n_kv, head size, n_head_kv], weights: [n_kv, n_tokens, n_head]
    void observe_v(const ggml_tensor * v, const ggml_tensor * weights) {
        const int source = source_of(v);
        if (source < 0) {
            return;
        }
        layer_sums & sums = layers[source];

        const int64_t n_kv      = v->ne[0];
        const int64_t n_embd    = v->ne[1];
        const int64_t n_head_kv = v->ne[2];
        const int64_t n_group   = weights->ne[2] / n_head_kv;

        sums.v.resize(n_head_kv * n_embd);
        sums.v_sq.resize(n_head_kv * n_embd);
        sums.v_weight.resize(n_head_kv);

        if (weights->type != GGML_TYPE_F32 || !ggml_is_contiguous(weights)) {
            throw std::runtime_error(std::string(weights->name) + " has no rows of floats");
        }
        const host_tensor   values(v);
        std::vector<float>  of_group(n_kv * weights->ne[1] * n_group);  // all heads would be too much memory
        std::vector<double> squares(n_kv);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            const size_t n_bytes = of_group.size() * sizeof(float);
            ggml_backend_tensor_get(weights, of_group.data(), h * n_bytes, n_bytes);

            std::fill(squares.begin(), squares.end(), 0.0);
            for (size_t i = 0; i < of_group.size(); ++i) {
                squares[i % n_kv] += of_group[i] * of_group[i];
            }
            for (int64_t t = 0; t < n_kv; ++t) {
                if (squares[t] == 0.0) {
                    continue;  // empty cells
                }
                sums.v_weight[h] += squares[t];
                for (int64_t i = 0; i < n_embd; ++i) {
                    const double value = values.at(t, i, h);
                    sums.v[h * n_embd + i] += squares[t] * value;
                    sums.v_sq[h * n_embd + i] += squares[t] * value * value;
                }
            }
        }
    }
};
