#pragma once

// Files with random calibrations.

#include "../src/llama-model.h"
#include "../src/turbo/calibration.h"
#include "../src/turbo/model.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "test-turbo-session.h"
#include "test-turbo-state.h"

#include <functional>
#include <random>

// A relative error of 1e-4 in the logits, or 1e-3. Measured with an f32 cache: 8e-14 to 2e-11, and up to 1.4e-7 with Gemma 2, whose GELU rounds to
// f16 on the CPU.
inline double nmse_equal() {
    return model->arch == LLM_ARCH_GEMMA2 ? 1e-6 : 1e-8;
}

//
// files
//

enum part { K_MEAN = 1, K_SCALE = 2, V_MEAN = 4, V_SCALE = 8, K_MAP = 16, ALL_SCALED = 15, ALL = 29 };

inline std::vector<uint32_t> kv_layers() {
    return llama_turbo_layers_with_kv(*model);
}

inline bool can_center(part what) {
    const uint32_t il = kv_layers().front();
    return !(what == K_MEAN ? llama_turbo_cant_center_k(*model, il) : llama_turbo_cant_center_v(*model, il));
}

// What is in a file; each value can be made wrong.
struct calibration_file {
    std::string path;  // in the working folder, and left there
    std::string type        = "turbo-calibration";
    std::string arch        = llm_arch_name(model->arch);
    std::string fingerprint = llama_turbo_model_fingerprint(*model);
    uint32_t    version     = llama_turbo_calibration::VERSION;

    struct tensor {
        std::string        name;
        int64_t            n_embd;
        int64_t            n_head;
        std::vector<float> values;
        int64_t            n_to = 1;  // of a matrix
    };

    std::vector<tensor> tensors;

    explicit calibration_file(const std::string & name) : path("test-turbo-calibration-" + name + ".gguf") {}

    void add(uint32_t il, const char * name, int64_t n_embd, const std::function<float()> & value) {
        const int64_t n_head = model->hparams.n_head_kv(il);

        tensor t{ "blk." + std::to_string(il) + "." + name, n_embd, n_head, {} };
        for (int64_t i = 0; i < n_embd * n_head; ++i) {
            t.values.push_back(value());
        }
        tensors.push_back(std::move(t));
    }

    // Matrices S * (1 + a * b^T) with random scales S over two decades, and their inverse, transposed.
    void add_maps(uint32_t il, const std::function<float()> & uniform) {
        const int64_t n      = model->hparams.n_embd_head_k(il);
        const int64_t n_head = model->hparams.n_head_kv(il);

        tensor k_map{ "blk." + std::to_string(il) + ".k_map", n, n_head, {}, n };
        tensor q_map{ "blk." + std::to_string(il) + ".q_map", n, n_head, {}, n };
        for (int64_t head = 0; head < n_head; ++head) {
            std::vector<double> a(n);
            std::vector<double> b(n);
            double              product = 1.0;
            for (int64_t i = 0; i < n; ++i) {
                a[i] = uniform() / sqrt(n);
                b[i] = uniform() / sqrt(n);
                product += a[i] * b[i];
            }
            for (int64_t i = 0; i < n; ++i) {
                const double scale = pow(10.0, uniform());
                for (int64_t j = 0; j < n; ++j) {
                    k_map.values.push_back(scale * ((i == j) + a[i] * b[j]));
                    q_map.values.push_back(((i == j) - b[i] * a[j] / product) / scale);
                }
            }
        }
        tensors.push_back(std::move(k_map));
        tensors.push_back(std::move(q_map));
    }

    // of a tensor, empty if there is none
    std::vector<float> values(uint32_t il, const char * name) const {
        for (const tensor & t : tensors) {
            if (t.name == "blk." + std::to_string(il) + "." + name) {
                return t.values;
            }
        }
        return {};
    }

    void write() const {
        size_t n_bytes = 1024 * 1024;
        for (const tensor & t : tensors) {
            n_bytes += t.values.size() * sizeof(float) + 1024;
        }
        ggml_context_ptr ctx{ ggml_init({ n_bytes, nullptr, false }) };
        gguf_context_ptr gguf{ gguf_init_empty() };

        gguf_set_val_str(gguf.get(), "general.type", type.c_str());
        gguf_set_val_str(gguf.get(), "general.architecture", arch.c_str());
        gguf_set_val_str(gguf.get(), "turbo.calibration.model", fingerprint.c_str());
        gguf_set_val_u32(gguf.get(), "turbo.calibration.version", version);
        for (const tensor & t : tensors) {
            ggml_tensor * res = t.n_to == 1 ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, t.n_embd, t.n_head) :
                                              ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, t.n_embd, t.n_to, t.n_head);
            ggml_set_name(res, t.name.c_str());
            memcpy(res->data, t.values.data(), t.values.size() * sizeof(float));
            gguf_add_tensor(gguf.get(), res);
        }
        if (!gguf_write_to_file(gguf.get(), path.c_str(), /*only_meta =*/false)) {
            printf("FAIL can't write %s\n", path.c_str());
            exit(1);
        }
    }
};

inline calibration_file random_file(int parts, uint32_t seed = 0) {
    std::mt19937                          random(seed);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);

    calibration_file file("random-" + std::to_string(parts) + "-" + std::to_string(seed));
    for (uint32_t il : kv_layers()) {
        if ((parts & K_MEAN) && !llama_turbo_cant_center_k(*model, il)) {
            file.add(il, "k_mean", model->hparams.n_embd_head_k(il), [&] { return 4.0f * uniform(random); });
        }
        if (parts & K_SCALE) {
            file.add(il, "k_scale", model->hparams.n_embd_head_k(il), [&] { return powf(10.0f, uniform(random)); });
        }
        if (parts & K_MAP) {
            file.add_maps(il, [&] { return uniform(random); });
        }
        if ((parts & V_MEAN) && !llama_turbo_cant_center_v(*model, il)) {
            // V is small in some of upstream's models, and what is added to it rounds it in f16
            file.add(il, "v_mean", model->hparams.n_embd_head_v(il), [&] { return 0.1f * uniform(random); });
        }
        if (parts & V_SCALE) {
            file.add(il, "v_scale", model->hparams.n_embd_head_v(il), [&] { return powf(10.0f, uniform(random)); });
        }
    }
    file.write();

    return file;
}

inline setup with(setup s, const calibration_file & file) {
    s.calibration = file.path;
    return s;
}

//
// scenarios in test-turbo-calibration-life.cpp
//

void test_shift(const setup & types);
void test_sequences(const setup & types);
void test_state(const setup & types);
