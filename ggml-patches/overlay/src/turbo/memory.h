#pragma once

#include "ggml-cpp.h"

#include <cstddef>
#include <vector>

struct llama_memory_context_i;
struct llama_memory_i;
struct llama_model;
class llama_kv_cache;
class llama_kv_cache_context;

// Memory for tensors of ours, and the KV caches in upstream's kinds of memory.

// Room for the description of n tensors.
ggml_context_ptr llama_turbo_tensors(size_t n);

// Memory for tensors that are described. A model without memory, of which only the needs are planned, gets none. what: for the error. Throws
// std::runtime_error.
ggml_backend_buffer_ptr llama_turbo_allocate(const llama_model &        model,
                                             ggml_context *             tensors,
                                             ggml_backend_buffer_type_t buft,
                                             const char *               what);

// The KV caches of a memory, and the same in a batch.
std::vector<const llama_kv_cache *>         llama_turbo_caches(const llama_memory_i * memory);
std::vector<const llama_kv_cache_context *> llama_turbo_caches(const llama_memory_context_i * mctx);
