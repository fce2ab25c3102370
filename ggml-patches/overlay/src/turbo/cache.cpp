#include "cache.h"

#include "compat.h"
#include "exact-input.h"
#include "log.h"
#include "memory.h"
#include "parts.h"
#include "rotation.h"
#include "state.h"

uint32_t llama_turbo_graph_nodes(const llama_memory_i * memory) {
    uint32_t res = 0;
    for (const llama_kv_cache * cache : llama_turbo_caches(memory)) {
        res += llama_turbo_graph_nodes(*cache);
    }

    return res;
}

std::pair<ggml_type, ggml_type> llama_turbo_cache::layer_types(std::shared_ptr<llama_turbo_parts> & parts,
                                                               uint32_t                             il,
                                                               ggml_type                            type_k,
                                                               ggml_type                            type_v) {
    if (!parts && llama_turbo_settings_in_use().any()) {
        parts = std::make_shared<llama_turbo_parts>(llama_turbo_settings_in_use());
    }

    return parts ? parts->settings.types_of(il, type_k, type_v) : std::make_pair(type_k, type_v);
}

void llama_turbo_cache::init(llama_kv_cache & kv, ggml_type type_k, ggml_type type_v) {
    const llama_turbo_parts * parts = llama_turbo_access::parts(std::as_const(kv));

    llama_turbo_init_rotation(kv, /*is_mixed =*/parts && parts->settings.by_layer);
    llama_turbo_parts::init(kv);
    llama_turbo_log_cache(kv, type_k, type_v);
}

ggml_tensor * llama_turbo_cache::build_k_rot(const llama_kv_cache & kv, ggml_context * ctx) {
    return llama_turbo_build_k_rot(kv, ctx);
}

ggml_tensor * llama_turbo_cache::build_v_rot(const llama_kv_cache & kv, ggml_context * ctx) {
    return llama_turbo_build_v_rot(kv, ctx);
}

void llama_turbo_cache::copy_stream(llama_kv_cache & kv, llama_context * lctx, uint32_t from, uint32_t to) {
    llama_turbo_parts * parts = llama_turbo_access::parts(std::as_const(kv));
    if (parts && parts->exact) {
        llama_synchronize(lctx);
        parts->exact->copy_stream(from, to);
    }
}

void llama_turbo_cache::update(llama_kv_cache & kv, llama_context * lctx) {
    llama_turbo_parts * parts = llama_turbo_access::parts(std::as_const(kv));
    if (parts) {
        parts->lctx = lctx;
        llama_turbo_decay::forget_moved(kv);
    }
}

bool llama_turbo_cache::apply(llama_kv_cache & kv) {
    llama_turbo_parts * parts = llama_turbo_access::parts(std::as_const(kv));
    if (!parts) {
        return true;
    }

    return parts->check_graph() && (!parts->decay || parts->decay->run(kv, parts->lctx));
}

ggml_tensor * llama_turbo_cache::build_shift(const llama_kv_cache &                              kv,
                                             uint32_t                                            il,
                                             ggml_context *                                      ctx,
                                             ggml_tensor *                                       cur,
                                             ggml_tensor *                                       rot,
                                             const std::function<ggml_tensor *(ggml_tensor *)> & rope) {
    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    if (parts && parts->calibrated_layers.count(il) > 0) {
        const llama_turbo_calibrated_layer & layer = *parts->calibrated_layers.at(il);
        return llama_turbo_build_shift(ctx, cur, layer.k_map ? nullptr : rot, [&](ggml_tensor * k) {
            return layer.store_k(ctx, rope(layer.restore_k(ctx, k)));
        });
    }
    const bool is_ours = llama_turbo_shifts(cur, rot, /*is_mixed =*/parts != nullptr);

    return is_ours ? llama_turbo_build_shift(ctx, cur, rot, rope) : nullptr;
}

void llama_turbo_cache::shift_exact(const llama_kv_cache &                                    kv,
                                    llm_graph_result &                                        res,
                                    uint32_t                                                  il,
                                    const std::function<void(ggml_tensor *, ggml_tensor *)> & shift) {
    llama_turbo_shift_exact(kv, res, il, shift);
}

void llama_turbo_cache::write_state(const llama_kv_cache &                             kv,
                                    llama_io_write_i &                                 io,
                                    uint32_t                                           stream,
                                    const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    llama_turbo_write_state(kv, io, stream, ranges);
}

bool llama_turbo_cache::read_state(const llama_kv_cache &        kv,
                                   llama_io_read_i &             io,
                                   uint32_t                      stream,
                                   const std::vector<uint32_t> & cells,
                                   uint32_t &                    v_trans) {
    return llama_turbo_read_state(kv, io, stream, cells, v_trans);
}
