#pragma once

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
//   stored K = s_k * (K - m)   and Q is divided by s_k: every score of a query loses the same q * m, which softmax does not see
//   stored V = s_v * (V - n)   and the attention output is divided by s_v, then n is added: the weights of a query sum to one
//
// m, n, s_k and s_v are vectors per layer and KV head, in the channels of the model: K after RoPE, before the rotation of the cache. All query
// heads of a KV head share them. Any numbers are right, as far as floats go; good ones come from turbo-gguf calibrate.
//
// The file is a GGUF:
//   general.type               "turbo-calibration"
//   general.architecture       of the model
//   turbo.calibration.version  u32, 1
//   turbo.calibration.model    fingerprint of the model, see below
//   blk.N.k_mean, blk.N.k_scale [n_embd_head_k, n_head_kv], blk.N.v_mean, blk.N.v_scale [n_embd_head_v, n_head_kv]: f32, each optional
// N is the number of a layer in the model. Scales are within 2^-20 .. 2^20.

// Vectors of one layer, [n_head_kv][channel], or empty.
struct llama_turbo_calibration_layer {
    std::vector<float> k_mean;
    std::vector<float> k_scale;
    std::vector<float> v_mean;
    std::vector<float> v_scale;
};

struct llama_turbo_calibration {
    static constexpr uint32_t VERSION = 1;

    std::map<uint32_t, llama_turbo_calibration_layer> layers;  // by number in the model

    uint32_t digest = 0;                                       // of all values
};

// Reads a calibration and checks that it fits.
//   layers: those of the model that have a KV cache
// Throws std::invalid_argument: the file is missing, damaged, of another version, for another model, or asks for what the model can't have.
std::shared_ptr<const llama_turbo_calibration> llama_turbo_load_calibration(const std::string &           path,
                                                                            const llama_model &           model,
                                                                            const std::vector<uint32_t> & layers);

// CRC-32 (that of zlib) of the names and bytes of all weights of norms, in the order of their names, as 8 hexadecimal digits. They are f32 in
// every quantization of a model, and differ between models and their fine-tunes. A few KiB per layer are read from the devices.
std::string llama_turbo_model_fingerprint(const llama_model & model);

// Why attention of this model can't be built anew, with a calibration or with exact tokens; nullptr: it can.
const char * llama_turbo_cant_attend(const llama_model & model);

// Why no vector may be taken from the keys, or the values, of a layer; nullptr: it may.
const char * llama_turbo_cant_center_k(const llama_model & model, uint32_t il);
const char * llama_turbo_cant_center_v(const llama_model & model, uint32_t il);

// CRC-32 of more bytes; 0 to begin with.
uint32_t llama_turbo_crc32(uint32_t crc, const void * data, size_t size);
