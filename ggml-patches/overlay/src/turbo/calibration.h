#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

// Calibration of a KV cache: other values are stored than K and V, chosen so that quantization loses less, and attention computes what it
// would without.
//
//   stored K = A_k * (K - m)   and Q is multiplied by A_q, the inverse of A_k transposed: every score of a query loses the same q * m, which
//                              softmax does not see
//   stored V = s_v * (V - n)   and the attention output is divided by s_v, then n is added: the weights of a query sum to one
//
// m, n and s_v are vectors per layer and KV head, A_k and A_q matrices, or A_k is a vector s_k of scales. All are in the channels of the model:
// K after RoPE, before the rotation of the cache. All query heads of a KV head share them. Any numbers are right, as far as floats go; good ones
// are computed by calibrate.h.
//
// The file is a GGUF:
//   general.type               "turbo-calibration"
//   general.architecture       of the model
//   turbo.calibration.version  u32, 2
//   turbo.calibration.model    fingerprint of the model (model.h)
//   turbo.calibration.tokens   u32, of the text that it comes from; optional, like the next two
//   turbo.calibration.sink     u32, the one of the first tokens whose K lies farthest from the mean
//   turbo.calibration.sink_distance f32, how far, over how far other tokens lie from it
//   blk.N.k_mean, blk.N.k_scale [n_embd_head_k, n_head_kv], blk.N.v_mean, blk.N.v_scale [n_embd_head_v, n_head_kv]: f32, each optional
//   blk.N.k_map, blk.N.q_map [n_embd_head_k (from), n_embd_head_k (to), n_head_kv]: f32, both or none, in place of k_scale
// N is the number of a layer in the model. Scales are within 2^-20 .. 2^20.

// Of one layer, or empty: vectors [n_head_kv][channel], and matrices [n_head_kv][to][from].
struct llama_turbo_calibration_layer {
    std::vector<float> k_mean;
    std::vector<float> k_scale;
    std::vector<float> k_map;
    std::vector<float> q_map;
    std::vector<float> v_mean;
    std::vector<float> v_scale;

    std::array<const std::vector<float> *, 6> all() const {
        return { &k_mean, &k_scale, &k_map, &q_map, &v_mean, &v_scale };
    }
};

struct llama_turbo_calibration {
    static constexpr uint32_t VERSION = 2;

    std::map<uint32_t, llama_turbo_calibration_layer> layers;  // by number in the model

    uint32_t n_tokens      = 0;                                // of the text that it comes from; 0: not known
    uint32_t sink          = 0;                                // a token that stands out, and how far
    float    sink_distance = 0.0f;                             // 0: not known

    uint32_t digest() const;                                   // CRC-32 of all values
};

// Reads a calibration and checks that it fits.
//   layers: those of the model that have a KV cache
// Throws std::invalid_argument: the file is missing, damaged, of another version, for another model, or asks for what the model can't have.
std::shared_ptr<const llama_turbo_calibration> llama_turbo_load_calibration(const std::string &           path,
                                                                            const llama_model &           model,
                                                                            const std::vector<uint32_t> & layers);

// Writes a calibration of the model; the file is there whole or not at all. Throws std::runtime_error.
void llama_turbo_save_calibration(const llama_turbo_calibration & calibration,
                                  const llama_model &             model,
                                  const std::string &             path);

// Throws std::runtime_error: a value is not finite, a scale is out of bounds, or a matrix is not the inverse that it has to be.
void llama_turbo_check_calibration(const llama_turbo_calibration & calibration, const llama_model & model);

// One of the right shape that changes nothing, for a model without weights, of which only the memory is planned.
std::shared_ptr<const llama_turbo_calibration> llama_turbo_planned_calibration(const llama_model &           model,
                                                                               const std::vector<uint32_t> & layers);
