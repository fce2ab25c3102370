#include "calibration.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama-arch.h"
#include "llama-model.h"
#include "model.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <utility>

static constexpr float SCALE_MAX = 1 << 20;
static constexpr float SCALE_MIN = 1.0f / SCALE_MAX;

//
// the file
//

namespace {

class calibration_reader {
  public:
    calibration_reader(const std::string & path, const llama_model & model) : path(path), model(model) {}

    std::shared_ptr<const llama_turbo_calibration> read(const std::vector<uint32_t> & kv_layers) {
        open(/*no_alloc =*/true);  // a model that was named by mistake is not read as a whole
        check_metadata();
        check_size();
        open(/*no_alloc =*/false);

        auto res = std::make_shared<llama_turbo_calibration>();
        for (int64_t i = 0; i < gguf_get_n_tensors(meta.get()); ++i) {
            read_tensor(*ggml_get_tensor(data.get(), gguf_get_tensor_name(meta.get(), i)), kv_layers, *res);
        }
        if (res->layers.empty()) {
            fail("it has no layer");
        }

        try {
            llama_turbo_check_calibration(*res, model);
        } catch (const std::runtime_error & error) {
            fail(error.what());
        }
        res->n_tokens    = number("turbo.calibration.tokens");
        res->sink        = number("turbo.calibration.sink");
        const int64_t id = gguf_find_key(meta.get(), "turbo.calibration.sink_distance");
        res->sink_distance =
            id >= 0 && gguf_get_kv_type(meta.get(), id) == GGUF_TYPE_FLOAT32 ? gguf_get_val_f32(meta.get(), id) : 0.0f;

        return res;
    }

  private:
    const std::string   path;
    const llama_model & model;

    gguf_context_ptr meta;
    ggml_context_ptr data;

    [[noreturn]] void fail(const std::string & why) const {
        throw std::invalid_argument("calibration " + path + ": " + why);
    }

    void open(bool no_alloc) {
        std::error_code error;
        if (!std::filesystem::is_regular_file(path, error)) {
            fail(error ? error.message() : "no file");
        }

        ggml_context * ctx = nullptr;
        meta.reset(gguf_init_from_file(path.c_str(), { no_alloc, &ctx }));
        data.reset(ctx);
        if (!meta) {
            fail("no GGUF file, or a damaged or truncated one");
        }
    }

    void check_size() const {
        size_t size = gguf_get_data_offset(meta.get());
        for (int64_t i = 0; i < gguf_get_n_tensors(meta.get()); ++i) {
            const size_t end = gguf_get_tensor_offset(meta.get(), i) + gguf_get_tensor_size(meta.get(), i);
            size             = std::max(size, gguf_get_data_offset(meta.get()) + end);
        }

        std::error_code error;
        if (std::filesystem::file_size(path, error) < size || error) {
            fail("truncated: its tensors need " + std::to_string(size) + " bytes");
        }
    }

    std::string text(const char * key) const {
        const int64_t id = gguf_find_key(meta.get(), key);
        return id >= 0 && gguf_get_kv_type(meta.get(), id) == GGUF_TYPE_STRING ? gguf_get_val_str(meta.get(), id) : "";
    }

    // 0: there is none
    uint32_t number(const char * key) const {
        const int64_t id = gguf_find_key(meta.get(), key);
        return id >= 0 && gguf_get_kv_type(meta.get(), id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(meta.get(), id) : 0;
    }

    void check_metadata() const {
        if (text("general.type") != "turbo-calibration") {
            fail("no calibration: write one with turbo-gguf calibrate");
        }

        const uint32_t version = number("turbo.calibration.version");
        if (version != llama_turbo_calibration::VERSION) {
            fail("it has version " + std::to_string(version) + ", this build reads version " +
                 std::to_string(llama_turbo_calibration::VERSION) + ": write it again with turbo-gguf calibrate");
        }

        const std::string arch = text("general.architecture");
        if (arch != llm_arch_name(model.arch)) {
            fail("it was made for the architecture " + arch + ", this model is " + llm_arch_name(model.arch));
        }
        if (const char * why = llama_turbo_cant_attend(model)) {
            fail(std::string("this model can't be calibrated: ") + why);
        }
        if (model.hparams.no_alloc) {
            return;  // a model without its weights: only its memory is planned
        }
        const std::string made_for = text("turbo.calibration.model");
        const std::string found    = llama_turbo_model_fingerprint(model);
        if (made_for != found) {
            fail("it was made for another model: its norms have the fingerprint " + made_for + ", those of this one " +
                 found);
        }
    }

    void read_tensor(const ggml_tensor &           tensor,
                     const std::vector<uint32_t> & kv_layers,
                     llama_turbo_calibration &     calibration) const {
        unsigned il       = 0;
        char     what[16] = "";
        if (sscanf(tensor.name, "blk.%u.%15s", &il, what) != 2) {
            fail(std::string("unknown tensor ") + tensor.name);
        }
        if (std::find(kv_layers.begin(), kv_layers.end(), il) == kv_layers.end()) {
            fail(std::string(tensor.name) + ": this model has no KV cache in layer " + std::to_string(il));
        }

        llama_turbo_calibration_layer & layer = calibration.layers[il];

        const int64_t n_embd_k  = model.hparams.n_embd_head_k(il);
        const int64_t n_embd_v  = model.hparams.n_embd_head_v(il);
        const int64_t n_head_kv = model.hparams.n_head_kv(il);

        const std::string name = what;
        if (name == "k_scale") {
            layer.k_scale = values(tensor, { n_embd_k, n_head_kv, 1 });
        } else if (name == "k_map") {
            layer.k_map = values(tensor, { n_embd_k, n_embd_k, n_head_kv });
        } else if (name == "q_map") {
            layer.q_map = values(tensor, { n_embd_k, n_embd_k, n_head_kv });
        } else if (name == "v_scale") {
            layer.v_scale = values(tensor, { n_embd_v, n_head_kv, 1 });
        } else if (name == "k_mean") {
            if (const char * why = llama_turbo_cant_center_k(model, il)) {
                fail(std::string(tensor.name) + ": keys of this model can't be centered: " + why);
            }
            layer.k_mean = values(tensor, { n_embd_k, n_head_kv, 1 });
        } else if (name == "v_mean") {
            if (const char * why = llama_turbo_cant_center_v(model, il)) {
                fail(std::string(tensor.name) + ": values of this model can't be centered: " + why);
            }
            layer.v_mean = values(tensor, { n_embd_v, n_head_kv, 1 });
        } else {
            fail(std::string("unknown tensor ") + tensor.name);
        }
    }

    std::vector<float> values(const ggml_tensor & tensor, const std::array<int64_t, 3> & shape) const {
        if (tensor.type != GGML_TYPE_F32 || !std::equal(shape.begin(), shape.end(), tensor.ne) || tensor.ne[3] != 1) {
            fail(std::string(tensor.name) + ": " + ggml_type_name(tensor.type) + " " + text_of(tensor.ne) +
                 ", this model needs f32 " + text_of(shape.data()));
        }
        const float * begin = (const float *) tensor.data;
        return { begin, begin + ggml_nelements(&tensor) };
    }

    // Of three dimensions, without the last one where it is 1.
    static std::string text_of(const int64_t * ne) {
        return "[" + std::to_string(ne[0]) + ", " + std::to_string(ne[1]) +
               (ne[2] > 1 ? ", " + std::to_string(ne[2]) : "") + "]";
    }
};

}  // namespace

std::shared_ptr<const llama_turbo_calibration> llama_turbo_load_calibration(const std::string &           path,
                                                                            const llama_model &           model,
                                                                            const std::vector<uint32_t> & layers) {
    return calibration_reader(path, model).read(layers);
}

//
// values
//

uint32_t llama_turbo_calibration::digest() const {
    uint32_t res = 0;
    for (const auto & [il, layer] : layers) {
        res = llama_turbo_crc32(res, &il, sizeof(il));
        for (const auto * values : layer.all()) {
            const uint64_t n = values->size();
            res              = llama_turbo_crc32(res, &n, sizeof(n));
            res              = llama_turbo_crc32(res, values->data(), n * sizeof(float));
        }
    }

    return res;
}

// Whether A_q, transposed, undoes A_k, as far as floats go: tried with one vector, since a product of matrices would take long at each start.
static bool are_inverse(const float * k_map, const float * q_map, int64_t n) {
    std::vector<double> x(n);
    std::vector<double> undone(n, 0.0);
    double              error = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        x[i] = (uint32_t) (i + 1) * 2654435761u >> 16 & 1 ? 1.0 : -1.0;
    }
    for (int64_t i = 0; i < n; ++i) {
        const double stored = std::inner_product(x.begin(), x.end(), k_map + i * n, 0.0);
        for (int64_t j = 0; j < n; ++j) {
            undone[j] += q_map[i * n + j] * stored;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        error = std::max(error, std::abs(undone[i] - x[i]));
    }

    return error < 1e-2;
}

void llama_turbo_check_calibration(const llama_turbo_calibration & calibration, const llama_model & model) {
    const auto check = [](uint32_t il, const char * name, const std::vector<float> & values, auto is_right,
                          const char * wrong) {
        if (!std::all_of(values.begin(), values.end(), is_right)) {
            throw std::runtime_error("blk." + std::to_string(il) + "." + name + ": " + wrong);
        }
    };
    const auto is_scale = [](float s) {
        return s >= SCALE_MIN && s <= SCALE_MAX;
    };
    const auto is_finite = [](float m) {
        return std::isfinite(m);
    };
    const auto is_element = [](float a) {
        return std::abs(a) <= SCALE_MAX;
    };
    for (const auto & [il, layer] : calibration.layers) {
        check(il, "k_scale", layer.k_scale, is_scale, "a scale is not within 2^-20 and 2^20");
        check(il, "v_scale", layer.v_scale, is_scale, "a scale is not within 2^-20 and 2^20");
        check(il, "k_mean", layer.k_mean, is_finite, "a value is not finite");
        check(il, "v_mean", layer.v_mean, is_finite, "a value is not finite");
        check(il, "k_map", layer.k_map, is_element, "an element is not within 2^20");
        check(il, "q_map", layer.q_map, is_element, "an element is not within 2^20");

        const std::string name = "blk." + std::to_string(il) + ".k_map: ";
        if (layer.k_map.size() != layer.q_map.size() || (!layer.k_map.empty() && !layer.k_scale.empty())) {
            throw std::runtime_error(name + "it has to stand beside q_map, and not beside k_scale");
        }
        const int64_t n = model.hparams.n_embd_head_k(il);
        for (size_t begin = 0; begin < layer.k_map.size(); begin += n * n) {
            if (!are_inverse(layer.k_map.data() + begin, layer.q_map.data() + begin, n)) {
                throw std::runtime_error(name + "q_map is not its inverse, transposed");
            }
        }
    }
}

std::shared_ptr<const llama_turbo_calibration> llama_turbo_planned_calibration(const llama_model &           model,
                                                                               const std::vector<uint32_t> & layers) {
    auto res = std::make_shared<llama_turbo_calibration>();
    for (uint32_t il : layers) {
        const size_t n_k = (size_t) model.hparams.n_embd_head_k(il) * model.hparams.n_head_kv(il);
        const size_t n_v = (size_t) model.hparams.n_embd_head_v(il) * model.hparams.n_head_kv(il);

        llama_turbo_calibration_layer & layer = res->layers[il];
        if (model.hparams.n_embd_head_k(il) <= LLAMA_TURBO_LARGEST_MAP) {
            layer.k_map.resize(n_k * model.hparams.n_embd_head_k(il));
            layer.q_map.resize(n_k * model.hparams.n_embd_head_k(il));
        } else {
            layer.k_scale.resize(n_k, 1.0f);
        }
        layer.v_scale.resize(n_v, 1.0f);
        layer.k_mean.resize(llama_turbo_cant_center_k(model, il) ? 0 : n_k, 0.0f);
        layer.v_mean.resize(llama_turbo_cant_center_v(model, il) ? 0 : n_v, 0.0f);
    }

    return res;
}

//
// writing
//

void llama_turbo_save_calibration(const llama_turbo_calibration & calibration,
                                  const llama_model &             model,
                                  const std::string &             path) {
    size_t n_values   = 0;  // bytes
    size_t n_overhead = 0;
    for (const auto & [il, layer] : calibration.layers) {
        for (const auto * values : layer.all()) {
            n_values += values->size() * sizeof(float);
            n_overhead += GGML_MEM_ALIGN + ggml_tensor_overhead();
        }
    }
    ggml_context_ptr data{ ggml_init({ n_values + n_overhead, /*mem_buffer =*/nullptr, /*no_alloc =*/false }) };
    gguf_context_ptr meta{ gguf_init_empty() };

    gguf_set_val_str(meta.get(), "general.type", "turbo-calibration");
    gguf_set_val_str(meta.get(), "general.architecture", llm_arch_name(model.arch));
    gguf_set_val_str(meta.get(), "general.name", (model.name + " calibration").c_str());
    gguf_set_val_u32(meta.get(), "turbo.calibration.version", llama_turbo_calibration::VERSION);
    gguf_set_val_str(meta.get(), "turbo.calibration.model", llama_turbo_model_fingerprint(model).c_str());
    gguf_set_val_u32(meta.get(), "turbo.calibration.tokens", calibration.n_tokens);
    gguf_set_val_u32(meta.get(), "turbo.calibration.sink", calibration.sink);
    gguf_set_val_f32(meta.get(), "turbo.calibration.sink_distance", calibration.sink_distance);

    for (const auto & [il, layer] : calibration.layers) {
        const int64_t n_head_kv = model.hparams.n_head_kv(il);
        const auto    add       = [&, il = il](const char * name, const std::vector<float> & values, int64_t n_to = 1) {
            if (!values.empty()) {
                const int64_t n_from = values.size() / n_head_kv / n_to;
                ggml_tensor * tensor = n_to > 1 ?
                                                    ggml_new_tensor_3d(data.get(), GGML_TYPE_F32, n_from, n_to, n_head_kv) :
                                                    ggml_new_tensor_2d(data.get(), GGML_TYPE_F32, n_from, n_head_kv);
                ggml_format_name(tensor, "blk.%u.%s", il, name);
                std::copy(values.begin(), values.end(), (float *) tensor->data);
                gguf_add_tensor(meta.get(), tensor);
            }
        };
        add("k_mean", layer.k_mean);
        add("k_scale", layer.k_scale);
        add("k_map", layer.k_map, model.hparams.n_embd_head_k(il));
        add("q_map", layer.q_map, model.hparams.n_embd_head_k(il));
        add("v_mean", layer.v_mean);
        add("v_scale", layer.v_scale);
    }

    // under another name first, so that nobody reads half of it
    char unique[32];
    snprintf(unique, sizeof(unique), ".%llx.part",
             (unsigned long long) std::chrono::steady_clock::now().time_since_epoch().count());
    const std::string part = path + unique;

    errno                      = 0;
    const bool      is_written = gguf_write_to_file(meta.get(), part.c_str(), /*only_meta =*/false);
    std::error_code error(is_written ? 0 : errno ? errno : EIO, std::generic_category());
    if (is_written && std::filesystem::file_size(part, error) < gguf_get_meta_size(meta.get()) + n_values) {
        error = std::make_error_code(std::errc::no_space_on_device);  // what is left is written when the file is closed
    }
    if (!error) {
        std::filesystem::rename(part, path, error);
    }
    if (error) {
        std::error_code ignored;
        std::filesystem::remove(part, ignored);
        throw std::runtime_error(path + ": can't be written: " + error.message());
    }
}
