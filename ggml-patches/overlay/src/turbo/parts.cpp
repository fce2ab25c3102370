#include "parts.h"

#include "compat.h"
#include "ggml-backend.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "memory.h"

#include <algorithm>
#include <set>
#include <stdexcept>

void llama_turbo_parts::init(llama_kv_cache & kv) {
    std::shared_ptr<llama_turbo_parts> & parts = llama_turbo_access::parts(kv);
    const llama_kv_cache *               other = llama_turbo_access::other(kv);

    if (parts && parts->settings.observes) {
        parts->init_observed(kv);
    }
    if (parts && parts->settings.calibration) {
        parts->init_calibration(kv);
    }
    if (other && llama_turbo_access::parts(*other) && llama_turbo_access::parts(*other)->calibrated) {
        parts = parts ? parts : std::make_shared<llama_turbo_parts>(llama_turbo_settings{});
        parts->share_calibration(kv, *other);
    }
    if (parts && llama_turbo_access::rot_k(kv, 0) != 0 && parts->all_keys_are_mapped(kv)) {
        llama_turbo_access::rot_k(kv, 0) = 0;
        parts->maps_rotate_k             = true;
    }
    if (parts && parts->settings.exact) {
        parts->init_exact(kv);
    }
    if (parts && parts->settings.decay.cold > 0) {
        parts->decay = std::make_unique<llama_turbo_decay>(kv, parts->settings.decay.cold);
    }
}

static std::vector<uint32_t> numbers_of_layers(const llama_kv_cache & kv) {
    std::vector<uint32_t> res;
    for (const auto & layer : llama_turbo_access::layers(kv)) {
        res.push_back(layer.il);
    }

    return res;
}

void llama_turbo_parts::init_observed(const llama_kv_cache & kv) {
    observed = std::make_unique<llama_turbo_observed>(llama_turbo_access::model(kv), numbers_of_layers(kv));
}

void llama_turbo_parts::init_calibration(const llama_kv_cache & kv) {
    calibrated =
        std::make_shared<const llama_turbo_calibrated>(*settings.calibration, llama_turbo_access::model(kv),
                                                       numbers_of_layers(kv), llama_turbo_access::rot_k(kv, 0) != 0);
    for (const auto & [il, layer] : calibrated->layers()) {
        calibrated_layers[il] = &layer;
    }
}

bool llama_turbo_parts::all_keys_are_mapped(const llama_kv_cache & kv) const {
    const auto & layers = llama_turbo_access::layers(kv);

    return std::all_of(layers.begin(), layers.end(), [&](const auto & layer) {
        const auto it = calibrated_layers.find(layer.il);
        return it != calibrated_layers.end() && it->second->k_map;
    });
}

void llama_turbo_parts::share_calibration(const llama_kv_cache & kv, const llama_kv_cache & other) {
    const llama_turbo_parts & shared = *llama_turbo_access::parts(other);

    calibrated = shared.calibrated;
    for (const auto & layer : llama_turbo_access::layers(kv)) {
        for (const auto & source : llama_turbo_access::layers(other)) {
            const auto it = shared.calibrated_layers.find(source.il);
            if (source.k == layer.k && it != shared.calibrated_layers.end()) {
                calibrated_layers[layer.il] = it->second;
            }
        }
    }
}

void llama_turbo_parts::init_exact(llama_kv_cache & kv) {
    const uint32_t n_stream = llama_turbo_access::n_stream(kv);
    const auto &   layers   = llama_turbo_access::layers(kv);

    exact = std::make_unique<llama_turbo_exact>(settings.exact, llama_turbo_access::n_seq_max(kv) / n_stream,
                                                kv.get_size(), n_stream);

    std::set<ggml_backend_buffer_type_t> bufts;
    for (const auto & layer : layers) {
        if (!layer.v) {
            throw std::runtime_error(
                "a cache without V can't have an exact sink and tail: leave out --cache-sink and --cache-tail");
        }
        bufts.insert(ggml_backend_buffer_get_type(layer.k->buffer));
    }

    for (ggml_backend_buffer_type_t buft : bufts) {
        ggml_context_ptr ctx = llama_turbo_tensors(2 * layers.size());

        const auto add = [&](const char * name, uint32_t il, int64_t n_embd) {
            ggml_tensor * tensor = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, n_embd, exact->n_rows, n_stream);
            ggml_format_name(tensor, "cache_exact_%s_l%u", name, il);
            return tensor;
        };
        for (const auto & layer : layers) {
            if (ggml_backend_buffer_get_type(layer.k->buffer) == buft) {
                exact->layers[layer.il].k = add("k", layer.il, layer.k->ne[0]);
                exact->layers[layer.il].v = add("v", layer.il, layer.v->ne[0]);
            }
        }

        ggml_backend_buffer_ptr buffer =
            llama_turbo_allocate(llama_turbo_access::model(kv), ctx.get(), buft, "exact sink and tail");
        ggml_backend_buffer_clear(buffer.get(), 0);
        llama_turbo_access::buffers(kv).emplace_back(std::move(ctx), std::move(buffer));
    }
}

bool llama_turbo_parts::check_graph() const {
    const char * what = "%s: layer %u of this model attends in a way that can't be %s: leave out %s\n";
    for (const auto & [il, layer] : calibrated_layers) {
        if (!layer->is_built) {
            LLAMA_LOG_ERROR(what, __func__, il, "calibrated", "its calibration");
            return false;
        }
    }
    for (uint32_t il : settings.layers) {
        if (exact && exact->layers.count(il) > 0 && !exact->layers.at(il).is_built) {
            LLAMA_LOG_ERROR(what, __func__, il, "exact for some tokens", "--cache-sink and --cache-tail");
            return false;
        }
    }

    return true;
}

uint32_t llama_turbo_graph_nodes(const llama_kv_cache & kv) {
    static constexpr uint32_t CALIBRATED = 18 + 7;  // nodes and leafs of a layer
    static constexpr uint32_t EXACT      = 24 + 2;
    static constexpr uint32_t INPUTS     = 4;

    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    if (!parts) {
        return 0;
    }
    const uint32_t n_layers   = llama_turbo_access::n_attending(kv);
    const uint32_t n_observed = parts->observed ? parts->observed->n_nodes() : 0;

    return n_observed + (parts->calibrated_layers.empty() ? 0 : n_layers * CALIBRATED) +
           (parts->exact ? n_layers * EXACT + INPUTS : 0);
}

const llama_turbo_calibrated_layer * llama_turbo_calibrated_layer_of(const llama_kv_cache_context & mctx, int32_t il) {
    const llama_kv_cache &    kv    = llama_turbo_access::cache(mctx);
    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    if (!parts || parts->calibrated_layers.empty()) {
        return nullptr;
    }
    const auto it = parts->calibrated_layers.find(llama_turbo_access::attended(kv, il).il);

    return it != parts->calibrated_layers.end() ? it->second : nullptr;
}

const llama_turbo_exact::layer * llama_turbo_exact_layer_of(const llama_kv_cache_context & mctx, int32_t il) {
    const llama_kv_cache &    kv    = llama_turbo_access::cache(mctx);
    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    if (!parts || !parts->exact) {
        return nullptr;
    }

    return &parts->exact->layers.at(llama_turbo_access::attended(kv, il).il);
}

std::pair<const llama_turbo_observed *, uint32_t> llama_turbo_observed_layer_of(const llama_kv_cache_context & mctx,
                                                                                int32_t                        il) {
    const llama_kv_cache &    kv    = llama_turbo_access::cache(mctx);
    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    if (!parts || !parts->observed) {
        return { nullptr, 0 };
    }

    return { parts->observed.get(), llama_turbo_access::attended(kv, il).il };
}

llama_turbo_exact & llama_turbo_exact_of(const llama_kv_cache_context & mctx) {
    return *llama_turbo_access::parts(std::as_const(llama_turbo_access::cache(mctx)))->exact;
}
