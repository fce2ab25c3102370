#pragma once

#include "ggml-cpp.h"
#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

struct llama_memory_i;
struct llama_model;

// What llama needs to know about turbo cache types: when a context may use them, how K and V are rotated,
// and how cached keys move when positions shift.
//
// A turbo type is a codebook for Gaussian values, so K and V must be rotated by a Walsh-Hadamard matrix before they are
// stored, and Q and the attention output likewise. Upstream's graph does that for quantized types whose head size is a
// multiple of 64; the functions here extend it to other head sizes (adaptive group) and make K-shift right for them and
// for partial RoPE.

// Reads the settings of a context that is about to be made (llama-turbo-cache.h), switches flash attention on where its cache types
// need it, and refuses what can't work, with the reason in the log. False means that the context must not be made.
bool llama_turbo_check_context(const llama_model & model, llama_context_params & params);

// How many nodes and leafs of a graph upstream's estimate, 8 per tensor of the model, has no room for: those of a calibration and of an exact
// sink and tail.
uint32_t llama_turbo_graph_nodes(const llama_memory_i * memory);

// Whether K and V come from a common latent vector (DeepSeek, MiniCPM3, PLM): K has its RoPE at the end of the head, or there is no V.
bool llama_turbo_has_latent_attention(const llama_model & model);

// Room for the description of n tensors, and memory for them once they are there; none for a model without memory, of which only the needs
// are planned. what: for the error. Throws std::runtime_error.
ggml_context_ptr        llama_turbo_tensors(size_t n);
ggml_backend_buffer_ptr llama_turbo_allocate(const llama_model &        model,
                                             ggml_context *             tensors,
                                             ggml_backend_buffer_type_t buft,
                                             const char *               what);

// Largest power of two that divides the head size, at most 128.
int64_t llama_turbo_rotation_group(int64_t n_embd_head);

// Whether a cache of this type is rotated by our rules: turbo types, and f32 if LLAMA_TURBO_ROTATE_F32=1 is set, which makes
// an f32 cache a turbo cache without quantization error (to test the rotation, or to measure its cost).
bool llama_turbo_rotates(ggml_type type);

// Adds our rules to upstream's decision on the rotation of K and V, for the types of one layer of the cache: what one layer needs, all
// layers get.
//   n_embd_head_k, n_embd_head_v: head size in all layers of this cache; 0 = no such tensor, -1 = layers differ
//   rot_k, rot_v:                 sizes of the groups that the graph rotates, or whether it does, see turbo/compat.h
//   hadamard:                     group size n -> symmetric orthonormal matrix [n*n]; gets groups that upstream lacks
//   is_mixed:                     layers have types of their own, so upstream's rule for its quantized types is applied here, too
// Throws std::runtime_error if the layers of the cache have different head sizes.
template <typename T>
void llama_turbo_init_rotation(ggml_type                                         type_k,
                               ggml_type                                         type_v,
                               int32_t                                           n_embd_head_k,
                               int32_t                                           n_embd_head_v,
                               T &                                               rot_k,
                               T &                                               rot_v,
                               std::unordered_map<int64_t, std::vector<float>> & hadamard,
                               bool                                              is_mixed = false);

// Graph input [n, n] for the rotation of head sizes that upstream does not rotate; nullptr: leave it to upstream.
ggml_tensor * llama_turbo_build_rot(ggml_context * ctx, int32_t n_embd_head, const char * name);

// Multiplies each group of rot->ne[0] values by the matrix.
ggml_tensor * llama_turbo_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot);

// Whether K-shift of this view of the cache [n_rot, n_head_kv, n_cells] is ours: turbo types, and the types that may stand beside a
// turbo V where upstream's own path fails (quantized without a rotation: null pointer, or with RoPE on a part of the head: abort; bf16:
// no RoPE for it on the CPU).
//   is_mixed: layers may have types of their own; f16 and f32 may then be rotated because of another layer, and upstream would apply
//             RoPE in the wrong basis
bool llama_turbo_shifts(const ggml_tensor * cur, const ggml_tensor * rot, bool is_mixed);

// K-shift of such a cache: to f32, rotate back, RoPE by the shift, rotate, store.
//   cur:  view of the roped part of each head in the cache, [n_rot, n_head_kv, n_cells]
//   rot:  rotation matrix of K, or nullptr if K is not rotated
//   rope: applies RoPE by the shift to the first n_rot values of each head of an f32 tensor, keeps the others
ggml_tensor * llama_turbo_build_shift(ggml_context *                                      ctx,
                                      ggml_tensor *                                       cur,
                                      ggml_tensor *                                       rot,
                                      const std::function<ggml_tensor *(ggml_tensor *)> & rope);
