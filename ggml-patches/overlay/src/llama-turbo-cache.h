#pragma once

#include "llama-turbo-attn.h"
#include "llama-turbo-calibration.h"
#include "llama-turbo-exact.h"
#include "llama-turbo-layers.h"
#include "llama-turbo.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

struct llama_memory_context_i;
struct llama_model;
struct llama_ubatch;
class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_kv_cache_context;
class llm_graph_result;

// What is added to a KV cache of upstream: types by layer, temporal decay, calibration, and an exact sink and tail.
//
// The settings come from the environment (the options of the tools set these variables), and are read once when a context is made:
//   TURBO_CACHE_TYPE_K_LAYERS, TURBO_CACHE_TYPE_V_LAYERS   maps, see llama-turbo-layers.h
//   TURBO_LAYER_ADAPTIVE                                   a mode instead of maps
//   TURBO_DECAY                                            shares of temporal decay
//   TURBO_CALIBRATION                                      file, see llama-turbo-calibration.h
//   TURBO_CACHE_SINK, TURBO_CACHE_TAIL                     numbers of tokens, see llama-turbo-exact.h
// A context that belongs to another one (draft, MTP) has none of them. Where it attends layers of the other's cache, it does so as the other.

struct llama_turbo_settings {
    bool                   by_layer = false;  // a map or mode is set
    std::vector<uint32_t>  layers;            // layers of the model that have a KV cache, ascending
    std::vector<ggml_type> types_k;           // [layers.size()]
    std::vector<ggml_type> types_v;

    llama_turbo_decay_shares decay;

    std::shared_ptr<const llama_turbo_calibration> calibration;  // nullptr: none

    llama_turbo_exact_sizes exact;
};

// Throws std::invalid_argument.
llama_turbo_settings llama_turbo_read_settings(const llama_model & model, const llama_context_params & params);

// Hands the settings to the caches that this thread makes from now on: those of the context that is being made.
void llama_turbo_use_settings(llama_turbo_settings settings);

// Temporal decay: the oldest tokens of each sequence lose one bit of each value of turbo3 and turbo4, in place (ggml-turbo.h). It runs
// before the tokens of a ubatch are stored, outside of the model's graph, on the devices that hold the cache:
//
//   cold       positions below pmin + cold percent of the positions stored, rounded down to a multiple of BOUNDARY_STEP
//   cold cell  one that is cold for all its sequences
//
// What was decayed is remembered per cell (llama_kv_cells::turbo_decayed) and forgotten when the cell gets a new token, or for K when the
// token moves, which encodes K again. All layers go together. Forgetting too much does no harm: decaying twice changes nothing.
// So nothing has to be saved with a state, either.
struct llama_turbo_cache {
    static constexpr llama_pos BOUNDARY_STEP = 32;

    explicit llama_turbo_cache(llama_turbo_settings settings) : settings(std::move(settings)) {}

    ~llama_turbo_cache();

    // Types of K and V of a layer, the given ones unless a map says otherwise. Makes *turbo if there is something to remember.
    static std::pair<ggml_type, ggml_type> layer_types(std::shared_ptr<llama_turbo_cache> & turbo,
                                                       uint32_t                             il,
                                                       ggml_type                            type_k,
                                                       ggml_type                            type_v);

    // When the tensors are there: rotation, log.
    static void init(llama_kv_cache & kv, ggml_type type_k, ggml_type type_v);

    // Graph inputs for rotations that upstream lacks; nullptr: leave it to upstream.
    static ggml_tensor * build_k_rot(const llama_kv_cache & kv, ggml_context * ctx);
    static ggml_tensor * build_v_rot(const llama_kv_cache & kv, ggml_context * ctx);

    // Before a batch: pending shifts and copies of streams (llama_kv_cache::stream_copy_info) are about to be applied.
    template <typename stream_copies>
    static void update(llama_kv_cache & kv, llama_context * lctx, const stream_copies & copies) {
        for (size_t i = 0; i < copies.ssrc.size(); ++i) {
            copy_stream(kv, lctx, copies.ssrc[i], copies.sdst[i]);
        }
        update(kv, lctx);
    }

    // Before the tokens of a ubatch are stored. False: computing failed, or the graph does not attend a layer as it must.
    static bool apply(llama_kv_cache & kv);

    // K-shift: whether it is ours, and its graph; see llama-turbo.h. il: layer of the cache.
    static bool shifts(const llama_kv_cache & kv, uint32_t il, const ggml_tensor * cur, const ggml_tensor * rot);
    static ggml_tensor * build_shift(const llama_kv_cache &                              kv,
                                     uint32_t                                            il,
                                     ggml_context *                                      ctx,
                                     ggml_tensor *                                       cur,
                                     ggml_tensor *                                       rot,
                                     const std::function<ggml_tensor *(ggml_tensor *)> & rope);

    // See llama_turbo_graph_nodes().
    static uint32_t n_graph_nodes(const llama_kv_cache & kv);

    // Calibration of what a layer of the model attends, nullptr if it has none.
    static const llama_turbo_calibrated_layer * calibrated_layer(const llama_kv_cache_context & mctx, int32_t il);

    // Copies of what a layer of the model attends, nullptr if it has none; and those of the streams of a ubatch as attention takes them,
    // K [n_embd_head_k, n_head_kv, n_rows, n_stream] and V.
    static const llama_turbo_exact::layer *        exact_layer(const llama_kv_cache_context & mctx, int32_t il);
    static std::pair<ggml_tensor *, ggml_tensor *> exact_views(ggml_context *                 ctx,
                                                               const llama_kv_cache_context & mctx,
                                                               int32_t                        il);

    static const llama_turbo_exact & exact_of(const llama_kv_cache_context & mctx);

    // Whether a ubatch of so many tokens in each of so many streams is copied before it is attended. Where memory is reserved, tokens stand for
    // ubatches that have all of them in one stream.
    static bool is_copied_first(const llama_kv_cache_context & mctx, uint32_t n_tokens, uint32_t n_stream);

    // Places the tokens of a ubatch and splits its mask.
    static void set_exact_input(const llama_kv_cache_context &  mctx,
                                const llama_ubatch &            ubatch,
                                const llama_turbo_exact_input & input);

    static const llama_kv_cache & cache_of(const llama_kv_cache_context & mctx);

    // What a cache is to another batch, nullptr: not found.
    static const llama_kv_cache_context * find_context(const llama_memory_context_i * mctx, const llama_kv_cache & kv);

    // K-shift of the copies of a layer. shift: does it for a view of them [n_rot, n_head_kv, n_rows * n_stream] and shifts of each row.
    static void shift_exact(const llama_kv_cache &                                    kv,
                            llm_graph_result &                                        res,
                            uint32_t                                                  il,
                            const std::function<void(ggml_tensor *, ggml_tensor *)> & shift);

    // Before v_trans is written, and after it is read: the first of the numbers that a state has in front of K and V. Marks of ours may come
    // before it: of the layout, of a calibration with its digest, and of an exact sink and tail with its copies.
    //
    // States of an upstream whose states have another layout, and states of another calibration, or of none, are refused, with the reason in the log: false. Copies are taken where there is room for
    // them.
    //   ranges: of cells, pairs of begin and end
    static void write_state(const llama_kv_cache &                             kv,
                            llama_io_write_i &                                 io,
                            uint32_t                                           stream,
                            const std::vector<std::pair<uint32_t, uint32_t>> & ranges);
    static bool read_state(const llama_kv_cache &        kv,
                           llama_io_read_i &             io,
                           uint32_t                      stream,
                           const std::vector<uint32_t> & cells,
                           uint32_t &                    v_trans);

  private:
    const llama_turbo_settings settings;

    // of this cache, or of the one whose layers it shares
    std::shared_ptr<const llama_turbo_calibrated>            calibrated;
    std::map<uint32_t, const llama_turbo_calibrated_layer *> calibrated_layers;  // by number of the layer of this cache

    std::unique_ptr<llama_turbo_exact> exact;                                    // nullptr: none

    llama_context * lctx = nullptr;                                              // of the last update

    // tensors that decay, [layer][stream]
    std::vector<std::vector<ggml_tensor *>> decaying_k;
    std::vector<std::vector<ggml_tensor *>> decaying_v;

    // for the log
    uint64_t n_passes  = 0;
    uint64_t n_cells_k = 0;
    uint64_t n_cells_v = 0;

    static void update(llama_kv_cache & kv, llama_context * lctx);
    static void copy_stream(llama_kv_cache & kv, llama_context * lctx, uint32_t from, uint32_t to);
    static bool read_calibration(const llama_kv_cache & kv, llama_io_read_i & io, uint32_t & v_trans);
    static bool read_layout(const llama_kv_cache & kv, llama_io_read_i & io, uint32_t & v_trans);
    static bool has_turbo_types(const llama_kv_cache & kv);

    static void log_cache(const llama_kv_cache & kv, ggml_type type_k, ggml_type type_v);
    void        init_calibration(const llama_kv_cache & kv);
    void        share_calibration(const llama_kv_cache & kv, const llama_kv_cache & other);
    void        init_exact(llama_kv_cache & kv);
    void        init_decay(const llama_kv_cache & kv);
    bool        decay(llama_kv_cache & kv);
    bool        decay_stream(const llama_kv_cells & cells, uint32_t stream, std::vector<uint8_t> & decayed);
};
