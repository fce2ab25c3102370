#include "model.h"

#include "compat.h"
#include "ggml-backend.h"
#include "llama-arch.h"
#include "llama-model.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <map>

// Recurrent layers of hybrid models have no KV cache. In Falcon-H1 every layer is both, and in Nemotron-H some are neither.
std::vector<uint32_t> llama_turbo_layers_with_kv(const llama_model & model) {
    const llama_hparams & hparams       = model.hparams;
    const bool            is_nemotron_h = model.arch == LLM_ARCH_NEMOTRON_H || model.arch == LLM_ARCH_NEMOTRON_H_MOE;

    std::vector<uint32_t> layers;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const bool is_recurrent =
            llm_arch_is_hybrid(model.arch) && model.arch != LLM_ARCH_FALCON_H1 && hparams.is_recr(il);
        const bool is_ffn = is_nemotron_h && hparams.n_ff(il) > 0;
        if (hparams.has_kv(il) && hparams.n_head_kv(il) > 0 && !is_recurrent && !is_ffn) {
            layers.push_back(il);
        }
    }

    return layers;
}

static bool is_architecture(const llama_model & model, const char * const * names) {
    for (; *names; ++names) {
        if (strcmp(llm_arch_name(model.arch), *names) == 0) {
            return true;
        }
    }

    return false;
}

bool llama_turbo_has_kv_cache(const llama_model & model) {
    return !llm_arch_is_recurrent(model.arch) && !llm_arch_is_diffusion(model.arch) &&
           !is_architecture(model, LLAMA_TURBO_NO_CACHE_ARCHS);
}

bool llama_turbo_has_latent_attention(const llama_model & model) {
    return model.hparams.is_mla() || model.hparams.n_lora_kv > 0 || is_architecture(model, LLAMA_TURBO_LATENT_ARCHS);
}

bool llama_turbo_needs_other(const llama_model & model) {
    return is_architecture(model, LLAMA_TURBO_DEPENDENT_ARCHS);
}

const char * llama_turbo_cant_attend(const llama_model & model) {
    if (!llama_turbo_has_kv_cache(model)) {
        return "it has no KV cache";
    }
    if (llama_turbo_has_latent_attention(model)) {
        return "it has multi-head latent attention";
    }
    if (is_architecture(model, LLAMA_TURBO_OWN_ATTENTION_ARCHS)) {
        return "its architecture has an attention of its own";
    }
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        if (!ggml_backend_dev_backend_reg(model.dev_layer(il))) {
            return "it is split over devices by -sm tensor";  // the meta device
        }
    }

    return nullptr;
}

const char * llama_turbo_cant_center_k(const llama_model & model, uint32_t il) {
    if (model.hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        return "its scores are capped, which depends on their size";
    }
    if (model.layers[il].attn_sinks) {
        return "it has attention sinks, with which scores are compared";
    }

    return nullptr;
}

const char * llama_turbo_cant_center_v(const llama_model & model, uint32_t il) {
    return model.layers[il].attn_sinks ? "it has attention sinks, which take a part of the weights" : nullptr;
}

//
// fingerprint
//

uint32_t llama_turbo_crc32(uint32_t crc, const void * data, size_t size) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> res;
        for (uint32_t i = 0; i < res.size(); ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) {
                value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
            }
            res[i] = value;
        }
        return res;
    }();

    const uint8_t * bytes = (const uint8_t *) data;

    crc = ~crc;
    for (size_t i = 0; i < size; ++i) {
        crc = table[(crc ^ bytes[i]) & 0xFF] ^ crc >> 8;
    }

    return ~crc;
}

static bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string llama_turbo_model_fingerprint(const llama_model & model) {
    std::map<std::string, const ggml_tensor *> norms;
    for (const auto & [name, tensor] : model.tensors_by_name) {
        if (ends_with(name, "norm.weight") && tensor->type == GGML_TYPE_F32) {
            norms[name] = tensor;
        }
    }

    uint32_t             crc = 0;
    std::vector<uint8_t> data;
    for (const auto & [name, tensor] : norms) {
        data.resize(ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, data.data(), 0, data.size());

        crc = llama_turbo_crc32(crc, name.data(), name.size());
        crc = llama_turbo_crc32(crc, data.data(), data.size());
    }

    char res[9];
    snprintf(res, sizeof(res), "%08x", crc);

    return res;
}
