#pragma once

#include "llama-kv-cache.h"

#include <type_traits>
#include <utility>

// The private members of upstream's KV cache that we read, and where the supported upstreams differ. This is the friend that a hook declares:
// no other file of ours touches them. Included in .cpp files only, since llama-kv-cache.h includes cache.h.
struct llama_turbo_access {
    //
    // a cache
    //

    static const llama_model & model(const llama_kv_cache & kv) { return kv.model; }

    static const llama_hparams & hparams(const llama_kv_cache & kv) { return kv.hparams; }

    static const auto & layers(const llama_kv_cache & kv) { return kv.layers; }

    static auto & cells(llama_kv_cache & kv) { return kv.v_cells; }

    static const auto & cells(const llama_kv_cache & kv) { return kv.v_cells; }

    static auto & buffers(llama_kv_cache & kv) { return kv.ctxs_bufs; }

    static uint32_t n_stream(const llama_kv_cache & kv) { return kv.n_stream; }

    static uint32_t n_seq_max(const llama_kv_cache & kv) { return kv.n_seq_max; }

    static bool has_window(const llama_kv_cache & kv) { return kv.swa_type != LLAMA_SWA_TYPE_NONE; }

    // The cache whose layers it shares, or nullptr.
    static const llama_kv_cache * other(const llama_kv_cache & kv) { return kv.other; }

    static std::shared_ptr<llama_turbo_parts> & parts(llama_kv_cache & kv) { return kv.turbo; }

    static llama_turbo_parts * parts(const llama_kv_cache & kv) { return kv.turbo.get(); }

    // Layers of the model that attend something in this cache: their number, and the layer whose K and V one attends.
    static uint32_t n_attending(const llama_kv_cache & kv) { return kv.map_layer_ids.size(); }

    static const auto & attended(const llama_kv_cache & kv, int32_t il) { return kv.layers[kv.map_layer_ids.at(il)]; }

    // Head size in all layers; 0: no such tensor, -1: layers differ.
    static int32_t n_embd_head_k(const llama_kv_cache & kv) { return kv.n_embd_head_k_all; }

    static int32_t n_embd_head_v(const llama_kv_cache & kv) { return kv.n_embd_head_v_all; }

    //
    // a cache in a batch
    //

    static llama_kv_cache & cache(const llama_kv_cache_context & mctx) { return *mctx.kv; }

    static const auto & slots(const llama_kv_cache_context & mctx) { return mctx.sinfos[mctx.i_cur]; }

    // While llama.cpp reserves memory for graphs there are no ubatches.
    static bool is_reserving(const llama_kv_cache_context & mctx) { return mctx.ubatches.empty(); }

    //
    // rotation: since some build after 0.3.36 and before b11434, upstream keeps the sizes of the groups, n_rot_k and n_rot_v (0: none), and a
    // state holds them. Older ones keep flags, attn_rot_k and attn_rot_v, and the graph chooses the size.
    //

    static auto & hadamard(llama_kv_cache & kv) { return kv.attn_rot_hadamard; }

    template <typename T> static auto rot_k(T & kv, int) -> decltype((kv.n_rot_k)) { return kv.n_rot_k; }

    template <typename T> static auto rot_k(T & kv, long) -> decltype((kv.attn_rot_k)) { return kv.attn_rot_k; }

    template <typename T> static auto rot_v(T & kv, int) -> decltype((kv.n_rot_v)) { return kv.n_rot_v; }

    template <typename T> static auto rot_v(T & kv, long) -> decltype((kv.attn_rot_v)) { return kv.attn_rot_v; }

    template <typename T = llama_kv_cache> static constexpr bool has_rot_sizes() {
        return std::is_same_v<std::decay_t<decltype(rot_k(std::declval<T &>(), 0))>, uint32_t>;
    }
};

// ggml_prec_set_acc() was ggml_mul_mat_set_prec().
template <typename T>
auto llama_turbo_add_up_in_f32(T * cur, int) -> decltype(ggml_prec_set_acc(cur, GGML_PREC_F32), void()) {
    ggml_prec_set_acc(cur, GGML_PREC_F32);
}

template <typename T> void llama_turbo_add_up_in_f32(T * cur, long) {
    ggml_mul_mat_set_prec(cur, GGML_PREC_F32);
}

// Outputs of a ubatch, which memory is reserved for. Older upstreams reserve it for all tokens.
template <typename T> auto llama_turbo_limit_outputs(T & params, int) -> decltype((void) params.n_outputs_max) {
    params.n_outputs_max         = 1;
    params.n_outputs_max_per_seq = 1;
}

template <typename T> void llama_turbo_limit_outputs(T &, long) {}

// Architectures that not all upstreams have an enumerator for; nullptr ends the list.
constexpr const char * LLAMA_TURBO_LATENT_ARCHS[]        = { "deepseek4", nullptr };
constexpr const char * LLAMA_TURBO_OWN_ATTENTION_ARCHS[] = { "dflash", "minimax-m3", "qwen4exp", nullptr };
constexpr const char * LLAMA_TURBO_NO_CACHE_ARCHS[]      = {
    "bert",     "jina-bert-v2",     "jina-bert-v3", "nomic-bert",      "nomic-bert-moe",   "neo-bert",
    "eurobert", "wavtokenizer-dec", "modern-bert",  "gemma-embedding", "gemma-embedding2", "clef",
    nullptr
};  // encoders
