#pragma once

#include "llama-graph.h"

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

class llama_kv_cache;
class llama_kv_cache_context;

// What a graph needs of the exact tokens of a cache (exact.h): inputs that are set for each ubatch, and views of the copies.

class llama_turbo_exact_input : public llm_graph_input_i {
  public:
    // packed_mask: of upstream, F16 [n_kv, n_tokens/n_stream, 1, n_stream]; while memory is reserved, its n_stream may be 1
    llama_turbo_exact_input(ggml_context * ctx, const llama_kv_cache_context & mctx, ggml_tensor * packed_mask);

    // Places the tokens of a ubatch and splits its mask.
    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * const packed_mask;
    ggml_tensor *       mask;  // F16 [n_keys, n_tokens/n_stream, 1, n_stream]
    ggml_tensor *       rows;  // I64 [n_copied * n_stream], of copies that are written

    // nullptr: all tokens are copied, in order, before they are attended
    ggml_tensor * copied = nullptr;  // I32 like rows: the tokens of the ubatch
    ggml_tensor * attended =
        nullptr;                     // I32 [(n_keys - n_rows) * n_stream]: tokens behind the rows, and any up to n_keys

    std::map<const ggml_tensor *, ggml_tensor *> keys;  // by copies: what attention takes

  private:
    const llama_kv_cache &         kv;
    const llama_kv_cache_context * mctx;

    // Where the data of the tensors that belong to a stream begin.
    struct cursor;

    void set_stream(uint32_t s, const llama_ubatch & ubatch, cursor & at);
};

// The input of a graph for the cache whose mask this is, made where there is none.
llama_turbo_exact_input & llama_turbo_exact_input_of(const llm_graph_context &      graph,
                                                     const llama_kv_cache_context & mctx,
                                                     ggml_tensor *                  packed_mask);

// Copies of what a layer of the model attends, for the streams of a ubatch: K [n_embd_head_k, n_head_kv, n_rows, n_stream] and V.
std::pair<ggml_tensor *, ggml_tensor *> llama_turbo_exact_views(ggml_context *                 ctx,
                                                                const llama_kv_cache_context & mctx,
                                                                int32_t                        il);

// K-shift of the copies of a layer. shift: does it for a view of them [n_rot, n_head_kv, n_rows * n_stream] and shifts of each row.
void llama_turbo_shift_exact(const llama_kv_cache &                                    kv,
                             llm_graph_result &                                        res,
                             uint32_t                                                  il,
                             const std::function<void(ggml_tensor *, ggml_tensor *)> & shift);
