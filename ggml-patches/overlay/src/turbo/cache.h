#pragma once

// What the hooks in upstream's files call. Each function passes on to one room: parts.h says what is added to a cache, and the order of the
// hooks is check (check.h), cache_types, init, update, apply, attention (attn.h), K-shift and states.

#include "attn.h"
#include "check.h"
#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

struct llama_memory_i;
struct llama_turbo_access;
struct llama_turbo_parts;
class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llm_graph_result;

// How many nodes and leafs of a graph upstream's estimate, 8 per tensor of the model, has no room for: those of a calibration and of exact
// tokens. memory: nullptr, as long as the context has none.
uint32_t llama_turbo_graph_nodes(const llama_memory_i * memory);

struct llama_turbo_cache {
    // In the constructor of a cache, for each layer of the model: types of K and V of the layer, the given ones unless a map says otherwise.
    // Makes *parts where settings are in force. The settings are those that llama_turbo_check_context() has read for this context; the thread
    // carries them here (settings.h).
    static std::pair<ggml_type, ggml_type> layer_types(std::shared_ptr<llama_turbo_parts> & parts,
                                                       uint32_t                             il,
                                                       ggml_type                            type_k,
                                                       ggml_type                            type_v);

    // At the end of it, when the tensors are there: parts, rotation, log. type_k, type_v: as asked for.
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

    // K-shift of a layer of the cache, see rotation.h; nullptr: leave it to upstream.
    static ggml_tensor * build_shift(const llama_kv_cache &                              kv,
                                     uint32_t                                            il,
                                     ggml_context *                                      ctx,
                                     ggml_tensor *                                       cur,
                                     ggml_tensor *                                       rot,
                                     const std::function<ggml_tensor *(ggml_tensor *)> & rope);

    // K-shift of its copies, see exact-input.h.
    static void shift_exact(const llama_kv_cache &                                    kv,
                            llm_graph_result &                                        res,
                            uint32_t                                                  il,
                            const std::function<void(ggml_tensor *, ggml_tensor *)> & shift);

    // Before v_trans is written, and after it is read, see state.h.
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
    static void update(llama_kv_cache & kv, llama_context * lctx);
    static void copy_stream(llama_kv_cache & kv, llama_context * lctx, uint32_t from, uint32_t to);
};
