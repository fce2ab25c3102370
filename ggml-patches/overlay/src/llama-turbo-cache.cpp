#include "llama-turbo-cache.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-arch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"
#include "turbo/compat.h"

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

//
// settings
//

static std::string env_text(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

static uint32_t env_tokens(const char * name, const char * option) {
    static constexpr uint32_t MAX_TOKENS = 1 << 24;

    const std::string text = env_text(name);
    if (text.size() > 8 || text.find_first_not_of("0123456789") != std::string::npos ||
        (!text.empty() && std::stoul(text) > MAX_TOKENS)) {
        throw std::invalid_argument(std::string(option) + " " + text + ": not a number of tokens from 0 to " +
                                    std::to_string(MAX_TOKENS));
    }

    return text.empty() ? 0 : std::stoul(text);
}

// Recurrent layers of hybrid models have no KV cache. In Falcon-H1 every layer is both, and in Nemotron-H some are neither.
static std::vector<uint32_t> layers_with_kv(const llama_model & model) {
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

static std::vector<ggml_type> parse_side(const std::string & map,
                                         const char *        what,
                                         size_t              n_layer,
                                         ggml_type           rest,
                                         bool                clip) {
    return map.empty() ? std::vector<ggml_type>(n_layer, rest) :
                         llama_turbo_parse_layers(map, n_layer, rest, what, clip);
}

llama_turbo_settings llama_turbo_read_settings(const llama_model & model, const llama_context_params & params) {
    std::string map_k;
    std::string map_v;
    std::string file;

    const llama_turbo_layer_mode * mode = nullptr;

    llama_turbo_settings res;
    if (!params.ctx_other) {
        map_k     = env_text("TURBO_CACHE_TYPE_K_LAYERS");
        map_v     = env_text("TURBO_CACHE_TYPE_V_LAYERS");
        mode      = llama_turbo_parse_mode(env_text("TURBO_LAYER_ADAPTIVE"));
        res.decay = llama_turbo_parse_decay(env_text("TURBO_DECAY"));
        file      = env_text("TURBO_CALIBRATION");

        res.exact.sink = env_tokens("TURBO_CACHE_SINK", "--cache-sink");
        res.exact.tail = env_tokens("TURBO_CACHE_TAIL", "--cache-tail");
    }
    if (mode) {
        if (!map_k.empty() || !map_v.empty()) {
            throw std::invalid_argument("a layer-adaptive mode and cache types by layer can't be used together");
        }
        map_k = mode->map_k;
        map_v = mode->map_v;
    }

    res.by_layer = !map_k.empty() || !map_v.empty();
    res.layers   = layers_with_kv(model);
    res.types_k  = parse_side(map_k, "K cache types by layer", res.layers.size(), params.type_k, mode != nullptr);
    res.types_v  = parse_side(map_v, "V cache types by layer", res.layers.size(), params.type_v, mode != nullptr);

    if (!file.empty()) {
        res.calibration = llama_turbo_load_calibration(file, model, res.layers);
    }

    return res;
}

static thread_local llama_turbo_settings settings_in_use;

void llama_turbo_use_settings(llama_turbo_settings settings) {
    settings_in_use = std::move(settings);
}

// Whether the graph takes the sizes of rotations from the cache, and a state of it holds them.
static constexpr bool STATES_HAVE_ROT_SIZES = llama_turbo_compat::has_rot_sizes<llama_kv_cache>();

//
// types by layer
//

std::pair<ggml_type, ggml_type> llama_turbo_cache::layer_types(std::shared_ptr<llama_turbo_cache> & turbo,
                                                               uint32_t                             il,
                                                               ggml_type                            type_k,
                                                               ggml_type                            type_v) {
    if (!turbo && (settings_in_use.by_layer || settings_in_use.decay.cold > 0 || settings_in_use.calibration ||
                   settings_in_use.exact)) {
        turbo = std::make_shared<llama_turbo_cache>(settings_in_use);
    }
    if (!turbo || !turbo->settings.by_layer) {
        return { type_k, type_v };
    }

    const llama_turbo_settings & settings = turbo->settings;

    const auto it = std::find(settings.layers.begin(), settings.layers.end(), il);
    if (it == settings.layers.end()) {
        return { type_k, type_v };
    }
    const size_t i = it - settings.layers.begin();

    return { settings.types_k[i], settings.types_v[i] };
}

void llama_turbo_cache::init(llama_kv_cache & kv, ggml_type type_k, ggml_type type_v) {
    const bool by_layer = kv.turbo && kv.turbo->settings.by_layer;

    for (const auto & layer : kv.layers) {
        llama_turbo_init_rotation(layer.k->type, layer.v ? layer.v->type : GGML_TYPE_F32, kv.n_embd_head_k_all,
                                  kv.n_embd_head_v_all, llama_turbo_compat::rot_k(kv, 0),
                                  llama_turbo_compat::rot_v(kv, 0), kv.attn_rot_hadamard, by_layer);
    }

    if (kv.turbo && kv.turbo->settings.calibration) {
        kv.turbo->init_calibration(kv);
    }
    if (kv.other && kv.other->turbo && kv.other->turbo->calibrated) {
        kv.turbo = kv.turbo ? kv.turbo : std::make_shared<llama_turbo_cache>(llama_turbo_settings{});
        kv.turbo->share_calibration(kv, *kv.other);
    }
    if (kv.turbo && kv.turbo->settings.exact) {
        kv.turbo->init_exact(kv);
    }
    if (kv.turbo && kv.turbo->settings.decay.cold > 0) {
        kv.turbo->init_decay(kv);
    }
    log_cache(kv, type_k, type_v);
}

ggml_tensor * llama_turbo_cache::build_k_rot(const llama_kv_cache & kv, ggml_context * ctx) {
    return STATES_HAVE_ROT_SIZES || !llama_turbo_compat::rot_k(kv, 0) ?
               nullptr :
               llama_turbo_build_rot(ctx, kv.n_embd_head_k_all, "attn_inp_k_rot");
}

ggml_tensor * llama_turbo_cache::build_v_rot(const llama_kv_cache & kv, ggml_context * ctx) {
    return STATES_HAVE_ROT_SIZES || !llama_turbo_compat::rot_v(kv, 0) ?
               nullptr :
               llama_turbo_build_rot(ctx, kv.n_embd_head_v_all, "attn_inp_v_rot");
}

// Bits per value of K, or of V, and the map that names the type of each layer.
struct side_facts {
    double                 n_bits   = 0.0;
    double                 n_values = 0.0;
    std::vector<uint32_t>  ordinals;  // of layers with a KV cache
    std::vector<ggml_type> types;

    double bits() const { return n_values > 0.0 ? n_bits / n_values : 0.0; }
};

static std::string formatted(const char * format, ...) {
    char    text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);

    return text;
}

void llama_turbo_cache::log_cache(const llama_kv_cache & kv, ggml_type type_k, ggml_type type_v) {
    static const llama_turbo_cache none{ llama_turbo_settings{} };

    const llama_turbo_cache &    turbo    = kv.turbo ? *kv.turbo : none;
    const llama_turbo_settings & settings = turbo.settings;

    side_facts k;
    side_facts v;
    for (const auto & layer : kv.layers) {
        const auto it = std::find(settings.layers.begin(), settings.layers.end(), layer.il);
        for (auto [side, tensor] : { std::make_pair(&k, layer.k), std::make_pair(&v, layer.v) }) {
            if (tensor) {
                side->ordinals.push_back(it - settings.layers.begin());
                side->types.push_back(tensor->type);
                side->n_bits += 8.0 * ggml_nbytes(tensor);
                side->n_values += ggml_nelements(tensor);
            }
        }
    }

    std::string text = ggml_type_name(type_k);
    if (type_v != type_k) {
        text += std::string("/") + ggml_type_name(type_v);
    }
    if (settings.by_layer) {
        text += " k=" + llama_turbo_format_layers(k.ordinals, k.types);
        text += v.types.empty() ? "" : " v=" + llama_turbo_format_layers(v.ordinals, v.types);
    }
    if (settings.decay.cold > 0) {
        text += formatted(" decay=%d,%d,%d", settings.decay.hot, settings.decay.warm, settings.decay.cold);
    }
    text += turbo.calibrated ? formatted(" cal=%08x", turbo.calibrated->digest) : "";
    text += turbo.exact && settings.exact.sink > 0 ? formatted(" sink=%u", settings.exact.sink) : "";
    text += turbo.exact && settings.exact.tail > 0 ? formatted(" tail=%u", settings.exact.tail) : "";

    text += formatted(" | rotated %d/%d | bits %.3f/%.3f", llama_turbo_compat::rot_k(kv, 0) != 0,
                      llama_turbo_compat::rot_v(kv, 0) != 0, k.bits(), v.bits());
    if (turbo.calibrated) {
        size_t n_k_mean = 0, n_k_scale = 0, n_v_mean = 0, n_v_scale = 0;
        for (const auto & [il, layer] : turbo.calibrated_layers) {
            n_k_mean += layer->k_mean != nullptr;
            n_k_scale += layer->k_scale != nullptr;
            n_v_mean += layer->v_mean != nullptr;
            n_v_scale += layer->v_scale != nullptr;
        }
        text += formatted(" | calibrated K %zu %zu V %zu %zu of %zu", n_k_mean, n_k_scale, n_v_mean, n_v_scale,
                          kv.layers.size());
    }
    const bool decays = !turbo.decaying_k.empty() || !turbo.decaying_v.empty();
    if (decays) {
        text += formatted(" | decaying %zu/%zu", turbo.decaying_k.size(), turbo.decaying_v.size());
    }
    const bool has_window = kv.swa_type != LLAMA_SWA_TYPE_NONE;
    const bool is_useless = settings.decay.cold > 0 && !decays && !has_window;
    if (settings.decay.cold > 0 && !decays) {
        text += has_window ? " | no decay: sliding window" : " | no decay: no layer";
    }
    if (turbo.exact) {
        size_t n_bytes = 0;
        for (const auto & [il, layer] : turbo.exact->layers) {
            n_bytes += ggml_nbytes(layer.k) + ggml_nbytes(layer.v);
        }
        text += formatted(" | copies %u rows in %u streams, %.2f MiB", turbo.exact->n_rows, kv.n_stream,
                          n_bytes / 1024.0 / 1024.0);
    }
    if (is_useless) {
        LLAMA_LOG_WARN("llama_turbo_cache: %s\n", text.c_str());
    } else {
        LLAMA_LOG_INFO("llama_turbo_cache: %s\n", text.c_str());
    }
}

//
// calibration
//

void llama_turbo_cache::init_calibration(const llama_kv_cache & kv) {
    std::vector<uint32_t> layers;
    for (const auto & layer : kv.layers) {
        layers.push_back(layer.il);
    }
    calibrated = std::make_shared<const llama_turbo_calibrated>(*settings.calibration, kv.model, layers);

    for (const auto & [il, layer] : calibrated->layers()) {
        calibrated_layers[il] = &layer;
    }
}

void llama_turbo_cache::share_calibration(const llama_kv_cache & kv, const llama_kv_cache & other) {
    calibrated = other.turbo->calibrated;
    for (const auto & layer : kv.layers) {
        for (const auto & source : other.layers) {
            const auto it = other.turbo->calibrated_layers.find(source.il);
            if (source.k == layer.k && it != other.turbo->calibrated_layers.end()) {
                calibrated_layers[layer.il] = it->second;
            }
        }
    }
}

const llama_turbo_calibrated_layer * llama_turbo_cache::calibrated_layer(const llama_kv_cache_context & mctx,
                                                                         int32_t                        il) {
    const llama_kv_cache & kv = *mctx.kv;
    if (!kv.turbo || kv.turbo->calibrated_layers.empty()) {
        return nullptr;
    }
    const auto it = kv.turbo->calibrated_layers.find(kv.layers[kv.map_layer_ids.at(il)].il);

    return it != kv.turbo->calibrated_layers.end() ? it->second : nullptr;
}

bool llama_turbo_cache::shifts(const llama_kv_cache & kv,
                               uint32_t               il,
                               const ggml_tensor *    cur,
                               const ggml_tensor *    rot) {
    const bool is_calibrated = kv.turbo && kv.turbo->calibrated_layers.count(il) > 0;

    return is_calibrated || llama_turbo_shifts(cur, rot, /*is_mixed =*/kv.turbo != nullptr);
}

ggml_tensor * llama_turbo_cache::build_shift(const llama_kv_cache &                              kv,
                                             uint32_t                                            il,
                                             ggml_context *                                      ctx,
                                             ggml_tensor *                                       cur,
                                             ggml_tensor *                                       rot,
                                             const std::function<ggml_tensor *(ggml_tensor *)> & rope) {
    if (!kv.turbo || kv.turbo->calibrated_layers.count(il) == 0) {
        return llama_turbo_build_shift(ctx, cur, rot, rope);
    }
    const llama_turbo_calibrated_layer & layer = *kv.turbo->calibrated_layers.at(il);

    return llama_turbo_build_shift(ctx, cur, rot,
                                   [&](ggml_tensor * k) { return layer.store_k(ctx, rope(layer.restore_k(ctx, k))); });
}

// In place of a number that is 0 or 1, followed by the calibration's digest.
static constexpr uint32_t CALIBRATED_STATE = 0x4C414354;  // "TCAL"

bool llama_turbo_cache::read_calibration(const llama_kv_cache & kv, llama_io_read_i & io, uint32_t & v_trans) {
    const bool is_state_calibrated = v_trans == CALIBRATED_STATE;
    const bool is_cache_calibrated = kv.turbo && kv.turbo->calibrated;
    if (!is_state_calibrated && !is_cache_calibrated) {
        return true;
    }

    uint32_t digest = 0;
    if (is_state_calibrated) {
        io.read(&digest, sizeof(digest));
    }
    const char * hint =
        "give the same --cache-calibration to the program that saves a state and to the one that loads it";
    if (is_state_calibrated && !is_cache_calibrated) {
        LLAMA_LOG_ERROR("%s: the state was saved with calibration %08x, this cache has none: %s\n", __func__, digest,
                        hint);
        return false;
    }
    if (!is_state_calibrated) {
        LLAMA_LOG_ERROR("%s: the state was saved without a calibration, this cache has one: %s\n", __func__, hint);
        return false;
    }
    if (digest != kv.turbo->calibrated->digest) {
        LLAMA_LOG_ERROR("%s: the state was saved with calibration %08x, this cache has %08x: %s\n", __func__, digest,
                        kv.turbo->calibrated->digest, hint);
        return false;
    }
    io.read(&v_trans, sizeof(v_trans));

    return true;
}

//
// exact sink and tail
//

void llama_turbo_cache::init_exact(llama_kv_cache & kv) {
    exact = std::make_unique<llama_turbo_exact>(settings.exact, kv.n_seq_max / kv.n_stream, kv.get_size(), kv.n_stream);

    std::set<ggml_backend_buffer_type_t> bufts;
    for (const auto & layer : kv.layers) {
        if (!layer.v) {
            throw std::runtime_error(
                "a cache without V can't have an exact sink and tail: leave out --cache-sink and --cache-tail");
        }
        bufts.insert(ggml_backend_buffer_get_type(layer.k->buffer));
    }

    for (ggml_backend_buffer_type_t buft : bufts) {
        ggml_context_ptr ctx = llama_turbo_tensors(2 * kv.layers.size());

        const auto add = [&](const char * name, uint32_t il, int64_t n_embd) {
            ggml_tensor * tensor = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, n_embd, exact->n_rows, kv.n_stream);
            ggml_format_name(tensor, "cache_exact_%s_l%u", name, il);
            return tensor;
        };
        for (const auto & layer : kv.layers) {
            if (ggml_backend_buffer_get_type(layer.k->buffer) == buft) {
                exact->layers[layer.il].k = add("k", layer.il, layer.k->ne[0]);
                exact->layers[layer.il].v = add("v", layer.il, layer.v->ne[0]);
            }
        }

        ggml_backend_buffer_ptr buffer = llama_turbo_allocate(kv.model, ctx.get(), buft, "exact sink and tail");
        ggml_backend_buffer_clear(buffer.get(), 0);
        kv.ctxs_bufs.emplace_back(std::move(ctx), std::move(buffer));
    }
}

const llama_turbo_exact::layer * llama_turbo_cache::exact_layer(const llama_kv_cache_context & mctx, int32_t il) {
    const llama_kv_cache & kv = *mctx.kv;
    if (!kv.turbo || !kv.turbo->exact) {
        return nullptr;
    }

    return &kv.turbo->exact->layers.at(kv.layers[kv.map_layer_ids.at(il)].il);
}

std::pair<ggml_tensor *, ggml_tensor *> llama_turbo_cache::exact_views(ggml_context *                 ctx,
                                                                       const llama_kv_cache_context & mctx,
                                                                       int32_t                        il) {
    const llama_turbo_exact::layer & layer = *exact_layer(mctx, il);

    const auto &  sinfo    = mctx.sinfos[mctx.i_cur];
    const int64_t n_stream = sinfo.s1 - sinfo.s0 + 1;

    const auto view = [&](ggml_tensor * copies, int64_t n_embd_head, int64_t n_head_kv) {
        return ggml_view_4d(ctx, copies, n_embd_head, n_head_kv, copies->ne[1], n_stream,
                            ggml_row_size(copies->type, n_embd_head), copies->nb[1], copies->nb[2],
                            copies->nb[2] * sinfo.s0);
    };
    const llama_hparams & hparams = mctx.kv->hparams;

    return { view(layer.k, hparams.n_embd_head_k(il), hparams.n_head_kv(il)),
             view(layer.v, hparams.n_embd_head_v(il), hparams.n_head_kv(il)) };
}

const llama_turbo_exact & llama_turbo_cache::exact_of(const llama_kv_cache_context & mctx) {
    return *mctx.kv->turbo->exact;
}

bool llama_turbo_cache::is_copied_first(const llama_kv_cache_context & mctx, uint32_t n_tokens, uint32_t n_stream) {
    const bool is_reserving = mctx.ubatches.empty();

    return exact_of(mctx).is_copied_first(is_reserving ? n_tokens * n_stream : n_tokens);
}

void llama_turbo_cache::set_exact_input(const llama_kv_cache_context &  mctx,
                                        const llama_ubatch &            ubatch,
                                        const llama_turbo_exact_input & input) {
    llama_turbo_exact & exact = *mctx.kv->turbo->exact;
    const auto &        sinfo = mctx.sinfos[mctx.i_cur];

    for (ggml_tensor * tensor : { input.packed_mask, input.mask, input.rows, input.copied, input.attended }) {
        GGML_ASSERT(!tensor || ggml_backend_buffer_is_host(tensor->buffer));
    }
    const bool is_copied_first = !input.attended;

    uint16_t * packed_mask = (uint16_t *) input.packed_mask->data;
    uint16_t * mask        = (uint16_t *) input.mask->data;
    int64_t *  row         = (int64_t *) input.rows->data;
    int32_t *  copied      = is_copied_first ? nullptr : (int32_t *) input.copied->data;
    int32_t *  attended    = is_copied_first ? nullptr : (int32_t *) input.attended->data;
    uint32_t   first_token = 0;

    const std::vector<uint32_t> none;
    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        const uint32_t                stream    = sinfo.strm[s];
        const llama_kv_cells &        cells     = mctx.kv->v_cells[stream];
        const std::vector<uint32_t> & new_cells = sinfo.idxs[s];
        const uint32_t                n_tokens  = new_cells.size();

        exact.forget(stream, new_cells);

        std::vector<llama_turbo_exact::copy> copies;
        if (is_copied_first) {
            copies = exact.place_all(stream, cells, new_cells);
        }
        for (uint32_t i = 0; i < n_tokens; ++i) {
            exact.split_mask(stream, cells, is_copied_first ? none : new_cells, ubatch.pos[first_token + i],
                             packed_mask, input.packed_mask->ne[0], mask, input.mask->ne[0]);
            packed_mask += input.packed_mask->ne[0];
            mask += input.mask->ne[0];
        }
        if (!is_copied_first) {
            copies = exact.place_needed(stream, cells, new_cells);
            for (uint32_t i = 0; i < input.mask->ne[0] - exact.n_rows; ++i) {
                *attended++ = first_token + (i < n_tokens ? i : 0);
            }
        }
        for (const llama_turbo_exact::copy & copy : copies) {
            *row++ = (int64_t) stream * exact.n_rows + copy.row;
            if (copied) {
                *copied++ = first_token + copy.token;
            }
        }
        first_token += n_tokens;
    }
}

const llama_kv_cache & llama_turbo_cache::cache_of(const llama_kv_cache_context & mctx) {
    return *mctx.kv;
}

const llama_kv_cache_context * llama_turbo_cache::find_context(const llama_memory_context_i * mctx,
                                                               const llama_kv_cache &         kv) {
    if (const auto * cache = dynamic_cast<const llama_kv_cache_context *>(mctx)) {
        return cache->kv == &kv ? cache : nullptr;
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        const llama_kv_cache_context * base = find_context(iswa->get_base(), kv);
        return base ? base : find_context(iswa->get_swa(), kv);
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        return find_context(hybrid->get_attn(), kv);
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        return find_context(hybrid->get_attn(), kv);
    }

    return nullptr;
}

namespace {

class exact_shift_input : public llm_graph_input_i {
  public:
    exact_shift_input(const llama_turbo_exact &           exact,
                      const std::vector<llama_kv_cells> & cells,
                      ggml_tensor *                       shifts) :
        shifts(shifts),
        exact(exact),
        cells(cells) {}

    void set_input(const llama_ubatch *) override {
        GGML_ASSERT(ggml_backend_buffer_is_host(shifts->buffer));
        for (size_t s = 0; s < cells.size(); ++s) {
            exact.get_shifts(s, cells[s], (int32_t *) shifts->data + s * exact.n_rows);
        }
    }

    ggml_tensor * const shifts;  // I32 [n_rows * n_stream]

  private:
    const llama_turbo_exact &           exact;
    const std::vector<llama_kv_cells> & cells;
};

}  // namespace

void llama_turbo_cache::shift_exact(const llama_kv_cache &                                    kv,
                                    llm_graph_result &                                        res,
                                    uint32_t                                                  il,
                                    const std::function<void(ggml_tensor *, ggml_tensor *)> & shift) {
    if (!kv.turbo || !kv.turbo->exact) {
        return;
    }
    const llama_turbo_exact & exact = *kv.turbo->exact;

    ggml_tensor * shifts = nullptr;
    for (const auto & input : res.inputs) {
        if (const auto * found = dynamic_cast<const exact_shift_input *>(input.get())) {
            shifts = found->shifts;
        }
    }
    if (!shifts) {
        shifts = ggml_new_tensor_1d(res.get_ctx(), GGML_TYPE_I32, (int64_t) exact.n_rows * kv.n_stream);
        ggml_set_input(shifts);
        res.add_input(std::make_unique<exact_shift_input>(exact, kv.v_cells, shifts));
    }

    ggml_tensor * k = exact.layers.at(il).k;
    shift(ggml_view_3d(res.get_ctx(), k, kv.hparams.n_rot(il), kv.hparams.n_head_kv(il), k->ne[1] * k->ne[2],
                       ggml_row_size(k->type, kv.hparams.n_embd_head_k(il)), k->nb[1], 0),
          shifts);
}

void llama_turbo_cache::copy_stream(llama_kv_cache & kv, llama_context * lctx, uint32_t from, uint32_t to) {
    if (kv.turbo && kv.turbo->exact) {
        llama_synchronize(lctx);
        kv.turbo->exact->copy_stream(from, to);
    }
}

//
// state
//

static constexpr uint32_t EXACT_STATE = 0x43455854;  // "TXEC", followed by the number of copies
static constexpr uint32_t SIZES_STATE =
    0x5A495354;  // "TSIZ": behind all marks, the sizes of rotations follow the number of layers

static std::vector<uint32_t> cells_in(const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    std::vector<uint32_t> cells;
    for (const auto & [begin, end] : ranges) {
        for (uint32_t cell = begin; cell < end; ++cell) {
            cells.push_back(cell);
        }
    }

    return cells;
}

void llama_turbo_cache::write_state(const llama_kv_cache &                             kv,
                                    llama_io_write_i &                                 io,
                                    uint32_t                                           stream,
                                    const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    const bool is_ours = has_turbo_types(kv) || (kv.turbo && (kv.turbo->calibrated || kv.turbo->exact));
    if (STATES_HAVE_ROT_SIZES && is_ours) {
        io.write(&SIZES_STATE, sizeof(SIZES_STATE));
    }
    if (kv.turbo && kv.turbo->calibrated) {
        io.write(&CALIBRATED_STATE, sizeof(CALIBRATED_STATE));
        io.write(&kv.turbo->calibrated->digest, sizeof(kv.turbo->calibrated->digest));
    }
    if (kv.turbo && kv.turbo->exact) {
        io.write(&EXACT_STATE, sizeof(EXACT_STATE));
        kv.turbo->exact->write(io, stream, kv.v_cells[stream], cells_in(ranges));
    }
}

bool llama_turbo_cache::has_turbo_types(const llama_kv_cache & kv) {
    return std::any_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) {
        return ggml_is_turbo(layer.k->type) || (layer.v && ggml_is_turbo(layer.v->type));
    });
}

bool llama_turbo_cache::read_layout(const llama_kv_cache & kv, llama_io_read_i & io, uint32_t & v_trans) {
    const bool has_sizes = v_trans == SIZES_STATE;
    const bool is_marked = has_sizes || v_trans == CALIBRATED_STATE || v_trans == EXACT_STATE;
    if (has_sizes && !STATES_HAVE_ROT_SIZES) {
        LLAMA_LOG_ERROR(
            "%s: the state was saved by a build of a newer llama.cpp, whose states have another layout: save it again "
            "with this one\n",
            __func__);
        return false;
    }
    if (STATES_HAVE_ROT_SIZES && !has_sizes && (is_marked || has_turbo_types(kv))) {
        LLAMA_LOG_ERROR(
            "%s: the state was saved by a build of an older llama.cpp, whose states have another layout, or with other "
            "cache types: save it again with this one\n",
            __func__);
        return false;
    }
    if (has_sizes) {
        io.read(&v_trans, sizeof(v_trans));
    }

    return true;
}

bool llama_turbo_cache::read_state(const llama_kv_cache &        kv,
                                   llama_io_read_i &             io,
                                   uint32_t                      stream,
                                   const std::vector<uint32_t> & cells,
                                   uint32_t &                    v_trans) {
    if (!read_layout(kv, io, v_trans) || !read_calibration(kv, io, v_trans)) {
        return false;
    }

    llama_turbo_exact * exact = kv.turbo ? kv.turbo->exact.get() : nullptr;
    if (exact) {
        exact->forget(stream, cells);
    }
    if (v_trans == EXACT_STATE) {
        uint32_t n_copies;
        io.read(&n_copies, sizeof(n_copies));
        if (!exact) {
            llama_turbo_exact::skip(io, n_copies);
        } else if (!exact->read(io, n_copies, stream, kv.v_cells[stream], cells)) {
            return false;
        }
        io.read(&v_trans, sizeof(v_trans));
    }

    return true;
}

//
// decay
//

enum decayed_side : uint8_t {
    DECAYED_K = 1,
    DECAYED_V = 2,
};

void llama_turbo_cache::init_decay(const llama_kv_cache & kv) {
    if (kv.swa_type != LLAMA_SWA_TYPE_NONE) {
        return;
    }

    for (const auto & layer : kv.layers) {
        if (ggml_turbo_decays(layer.k->type)) {
            decaying_k.push_back(layer.k_stream);
        }
        if (layer.v && ggml_turbo_decays(layer.v->type)) {
            decaying_v.push_back(layer.v_stream);
        }
    }
}

llama_turbo_cache::~llama_turbo_cache() {
    if (!decaying_k.empty() || !decaying_v.empty()) {
        LLAMA_LOG_INFO("llama_turbo_cache: decay: %" PRIu64 " passes, %" PRIu64 " cells of K, %" PRIu64 " cells of V\n",
                       n_passes, n_cells_k, n_cells_v);
    }
}

struct cold_sequence {
    llama_seq_id id;
    llama_pos    end;  // positions below are cold
};

static std::vector<cold_sequence> cold_sequences(const llama_kv_cells & cells, int percent) {
    std::vector<cold_sequence> res;
    for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ; ++id) {
        const llama_pos first = cells.seq_pos_min(id);
        if (first >= 0) {
            const int64_t   n_pos  = cells.seq_pos_max(id) + 1 - first;
            const llama_pos n_cold = n_pos * percent / 100;
            res.push_back({ id, first + n_cold - n_cold % llama_turbo_cache::BOUNDARY_STEP });
        }
    }

    return res;
}

static bool is_cold(const llama_kv_cells & cells, uint32_t i, const std::vector<cold_sequence> & sequences) {
    const llama_pos pos = cells.pos_get(i);
    return std::all_of(sequences.begin(), sequences.end(), [&](const cold_sequence & sequence) {
        return pos < sequence.end || !cells.seq_has(i, sequence.id);
    });
}

struct cell_range {
    uint32_t begin;
    uint32_t end;
};

static void append_cell(std::vector<cell_range> & ranges, uint32_t i) {
    if (ranges.empty() || ranges.back().end != i) {
        ranges.push_back({ i, i });
    }
    ranges.back().end = i + 1;
}

// The backend that works on the memory of a tensor.
static ggml_backend_t backend_of(ggml_backend_sched_t sched, const ggml_tensor * tensor) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }

    return ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1);  // the CPU
}

// Ops on views of the cache, which need no memory of their own.
struct decay_graph {
    ggml_backend_t   backend;
    ggml_context_ptr ctx;
    ggml_cgraph *    graph;

    decay_graph(ggml_backend_t backend, size_t n_ops) : backend(backend) {
        const size_t n_nodes = 4 * n_ops;  // the op, its rows, and what these are views of

        const ggml_init_params params = {
            /*.mem_size   =*/2 * n_ops * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
            /*.mem_buffer =*/nullptr,
            /*.no_alloc   =*/true,
        };
        ctx.reset(ggml_init(params));
        graph = ggml_new_graph_custom(ctx.get(), n_nodes, false);
    }

    void add(ggml_tensor * cells, const cell_range & range) {
        ggml_tensor * rows = ggml_view_2d(ctx.get(), cells, cells->ne[0], range.end - range.begin, cells->nb[1],
                                          range.begin * cells->nb[1]);
        ggml_backend_view_init(rows);

        ggml_tensor * decayed = ggml_turbo_decay(ctx.get(), rows);
        ggml_backend_view_init(decayed);

        ggml_build_forward_expand(graph, decayed);
    }
};

bool llama_turbo_cache::decay_stream(const llama_kv_cells & cells, uint32_t stream, std::vector<uint8_t> & decayed) {
    const std::vector<cold_sequence> sequences = cold_sequences(cells, settings.decay.cold);

    const uint8_t sides = (decaying_k.empty() ? 0 : DECAYED_K) | (decaying_v.empty() ? 0 : DECAYED_V);

    std::vector<cell_range> ranges_k;
    std::vector<cell_range> ranges_v;
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        const uint8_t missing = sides & ~decayed[i];
        if (missing == 0 || cells.is_empty(i) || !is_cold(cells, i, sequences)) {
            continue;
        }
        if (missing & DECAYED_K) {
            append_cell(ranges_k, i);
            ++n_cells_k;
        }
        if (missing & DECAYED_V) {
            append_cell(ranges_v, i);
            ++n_cells_v;
        }
        decayed[i] |= missing;
    }
    if (ranges_k.empty() && ranges_v.empty()) {
        return true;
    }
    ++n_passes;

    ggml_backend_sched_t sched = lctx->get_sched();
    ggml_backend_sched_synchronize(sched);

    const size_t n_ops = decaying_k.size() * ranges_k.size() + decaying_v.size() * ranges_v.size();

    std::vector<decay_graph> graphs;  // one per backend

    const auto graph_of = [&](ggml_backend_t backend) -> decay_graph & {
        for (decay_graph & graph : graphs) {
            if (graph.backend == backend) {
                return graph;
            }
        }
        return graphs.emplace_back(backend, n_ops);
    };
    const auto add = [&](ggml_tensor * tensor, const std::vector<cell_range> & ranges) {
        decay_graph & graph = graph_of(backend_of(sched, tensor));
        for (const cell_range & range : ranges) {
            graph.add(tensor, range);
        }
    };
    for (const auto & streams : decaying_k) {
        add(streams[stream], ranges_k);
    }
    for (const auto & streams : decaying_v) {
        add(streams[stream], ranges_v);
    }

    for (const decay_graph & graph : graphs) {
        if (ggml_backend_graph_compute(graph.backend, graph.graph) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to decay the cache on %s\n", __func__, ggml_backend_name(graph.backend));
            return false;
        }
    }

    return true;
}

bool llama_turbo_cache::decay(llama_kv_cache & kv) {
    if (decaying_k.empty() && decaying_v.empty()) {
        return true;
    }
    if (!lctx) {
        return true;  // training, which makes no updates
    }

    bool ok = true;
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        llama_kv_cells & cells = kv.v_cells[s];
        cells.turbo_decayed.resize(cells.size(), 0);
        ok = ok && decay_stream(cells, s, cells.turbo_decayed);
    }

    return ok;
}

//
// each batch
//

static std::vector<const llama_kv_cache *> caches_of(const llama_memory_i * memory) {
    if (const auto * cache = dynamic_cast<const llama_kv_cache *>(memory)) {
        return { cache };
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return { iswa->get_base(), iswa->get_swa() };
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        return { hybrid->get_mem_attn() };
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        return caches_of(hybrid->get_mem_attn());
    }

    return {};
}

uint32_t llama_turbo_graph_nodes(const llama_memory_i * memory) {
    uint32_t res = 0;
    for (const llama_kv_cache * cache : caches_of(memory)) {
        res += llama_turbo_cache::n_graph_nodes(*cache);
    }

    return res;
}

uint32_t llama_turbo_cache::n_graph_nodes(const llama_kv_cache & kv) {
    static constexpr uint32_t CALIBRATED = 13 + 7;  // nodes and leafs of a layer
    static constexpr uint32_t EXACT      = 24 + 2;
    static constexpr uint32_t INPUTS     = 4;

    if (!kv.turbo) {
        return 0;
    }
    const uint32_t n_layers = kv.map_layer_ids.size();  // with those that attend what another one stores

    return (kv.turbo->calibrated_layers.empty() ? 0 : n_layers * CALIBRATED) +
           (kv.turbo->exact ? n_layers * EXACT + INPUTS : 0);
}

void llama_turbo_cache::update(llama_kv_cache & kv, llama_context * lctx) {
    if (!kv.turbo) {
        return;
    }
    kv.turbo->lctx = lctx;

    for (llama_kv_cells & cells : kv.v_cells) {
        for (uint32_t i = 0; cells.get_has_shift() && i < cells.turbo_decayed.size(); ++i) {
            if (!cells.is_empty(i) && cells.get_shift(i) != 0) {
                cells.turbo_decayed[i] &= ~DECAYED_K;
            }
        }
    }
}

bool llama_turbo_cache::apply(llama_kv_cache & kv) {
    if (!kv.turbo) {
        return true;
    }
    const char * what = "%s: layer %u of this model attends in a way that can't be %s: leave out %s\n";
    for (const auto & [il, layer] : kv.turbo->calibrated_layers) {
        if (!layer->is_built) {
            LLAMA_LOG_ERROR(what, __func__, il, "calibrated", "its calibration");
            return false;
        }
    }
    for (uint32_t il : kv.turbo->settings.layers) {
        if (kv.turbo->exact && kv.turbo->exact->layers.count(il) > 0 && !kv.turbo->exact->layers.at(il).is_built) {
            LLAMA_LOG_ERROR(what, __func__, il, "exact for some tokens", "--cache-sink and --cache-tail");
            return false;
        }
    }

    return kv.turbo->decay(kv);
}
