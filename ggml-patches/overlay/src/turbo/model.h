#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct llama_model;

// What a model is, and what it allows.

// Layers that have a KV cache, ascending.
std::vector<uint32_t> llama_turbo_layers_with_kv(const llama_model & model);

// Recurrent models have none, nor those of diffusion, nor encoders.
bool llama_turbo_has_kv_cache(const llama_model & model);

// Whether K and V come from a common latent vector (DeepSeek, MiniCPM3, PLM). Then K has its RoPE at the end of the head, or there is no V.
bool llama_turbo_has_latent_attention(const llama_model & model);

// Whether it can't compute without the context of another model (draft heads).
bool llama_turbo_needs_other(const llama_model & model);

// Why attention of this model can't be built anew, with a calibration or with exact tokens; nullptr: it can.
const char * llama_turbo_cant_attend(const llama_model & model);

// Why no vector may be taken from the keys, or the values, of a layer; nullptr: it may.
const char * llama_turbo_cant_center_k(const llama_model & model, uint32_t il);
const char * llama_turbo_cant_center_v(const llama_model & model, uint32_t il);

// Largest head size of K that gets matrices: beyond, they need more memory than they are worth.
constexpr int64_t LLAMA_TURBO_LARGEST_MAP = 256;

// CRC-32 (that of zlib) of the names and bytes of all weights of norms, in the order of their names, as 8 hexadecimal digits. They are f32 in
// every quantization of a model, and differ between models and their fine-tunes. A few KiB per layer are read from the devices.
std::string llama_turbo_model_fingerprint(const llama_model & model);

// CRC-32 of more bytes; 0 to begin with.
uint32_t llama_turbo_crc32(uint32_t crc, const void * data, size_t size);
