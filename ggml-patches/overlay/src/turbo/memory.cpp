#include "memory.h"

#include "ggml-backend.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <stdexcept>
#include <string>

ggml_context_ptr llama_turbo_tensors(size_t n) {
    const ggml_init_params params = {
        /*.mem_size   =*/n * ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };

    return ggml_context_ptr{ ggml_init(params) };
}

ggml_backend_buffer_ptr llama_turbo_allocate(const llama_model &        model,
                                             ggml_context *             tensors,
                                             ggml_backend_buffer_type_t buft,
                                             const char *               what) {
    ggml_backend_buffer_ptr res;
    if (model.hparams.no_alloc) {
        res.reset(ggml_backend_buft_alloc_buffer(buft, /*size =*/0));
        for (ggml_tensor * t = ggml_get_first_tensor(tensors); t; t = ggml_get_next_tensor(tensors, t)) {
            t->buffer = res.get();  // so that the scheduler does not allocate it
        }
    } else {
        res.reset(ggml_backend_alloc_ctx_tensors_from_buft(tensors, buft));
    }
    if (!res) {
        throw std::runtime_error(std::string("failed to allocate the ") + what + " of the KV cache");
    }

    return res;
}

// Upstream's kinds of memory, and what they are in a batch. Others have no KV cache, or one with an attention of its own.
namespace {

struct memory_kinds {
    using any         = llama_memory_i;
    using cache       = llama_kv_cache;
    using iswa        = llama_kv_cache_iswa;
    using hybrid      = llama_memory_hybrid;
    using hybrid_iswa = llama_memory_hybrid_iswa;

    template <typename T> static auto attention_of(const T & hybrid) { return hybrid.get_mem_attn(); }
};

struct context_kinds {
    using any         = llama_memory_context_i;
    using cache       = llama_kv_cache_context;
    using iswa        = llama_kv_cache_iswa_context;
    using hybrid      = llama_memory_hybrid_context;
    using hybrid_iswa = llama_memory_hybrid_iswa_context;

    template <typename T> static auto attention_of(const T & hybrid) { return hybrid.get_attn(); }
};

}  // namespace

template <typename kinds> static std::vector<const typename kinds::cache *> caches_of(const typename kinds::any * in) {
    if (const auto * cache = dynamic_cast<const typename kinds::cache *>(in)) {
        return { cache };
    }
    if (const auto * iswa = dynamic_cast<const typename kinds::iswa *>(in)) {
        return { iswa->get_base(), iswa->get_swa() };
    }
    if (const auto * hybrid = dynamic_cast<const typename kinds::hybrid *>(in)) {
        return { kinds::attention_of(*hybrid) };
    }
    if (const auto * hybrid = dynamic_cast<const typename kinds::hybrid_iswa *>(in)) {
        return caches_of<kinds>(kinds::attention_of(*hybrid));
    }

    return {};
}

std::vector<const llama_kv_cache *> llama_turbo_caches(const llama_memory_i * memory) {
    return caches_of<memory_kinds>(memory);
}

std::vector<const llama_kv_cache_context *> llama_turbo_caches(const llama_memory_context_i * mctx) {
    return caches_of<context_kinds>(mctx);
}
