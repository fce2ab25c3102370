#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

class llama_kv_cache;

// The rotation of K and V, and how cached keys move when positions shift.
//
// A turbo type is a codebook for Gaussian values. So K and V are rotated by a Walsh-Hadamard matrix before they are stored, and Q and the
// attention output likewise. Upstream's graph does that for quantized types whose head size is a multiple of 64. The functions here extend it
// to other head sizes (adaptive group), and make K-shift right for them and for partial RoPE.

// Largest power of two that divides the head size, at most 128.
int64_t llama_turbo_rotation_group(int64_t n_embd_head);

// Whether a cache of this type is rotated by our rules. Turbo types are, and f32 if LLAMA_TURBO_ROTATE_F32=1 is set. Such an f32 cache is a
// turbo cache without quantization error, to test the rotation or to measure its cost.
bool llama_turbo_rotates(ggml_type type);

// Adds our rules to upstream's decision, for the types of one layer of the cache. What one layer needs, all layers get.
//   n_embd_head_k, n_embd_head_v: head size in all layers of this cache; 0 = no such tensor, -1 = layers differ
//   rot_k, rot_v:                 size of the groups that the graph rotates; 0 = none
//   hadamard:                     group size n -> symmetric orthonormal matrix [n*n]; gets groups that upstream lacks
//   is_mixed:                     layers have types of their own, so upstream's rule for its quantized types is applied here, too
// Throws std::runtime_error if the layers of the cache have different head sizes.
void llama_turbo_init_rotation(ggml_type                                         type_k,
                               ggml_type                                         type_v,
                               int32_t                                           n_embd_head_k,
                               int32_t                                           n_embd_head_v,
                               uint32_t &                                        rot_k,
                               uint32_t &                                        rot_v,
                               std::unordered_map<int64_t, std::vector<float>> & hadamard,
                               bool                                              is_mixed = false);

// The same for all layers of a cache.
void llama_turbo_init_rotation(llama_kv_cache & kv, bool is_mixed);

// Graph inputs [n, n] for rotations that the graph of an older upstream lacks; nullptr: leave it to upstream.
ggml_tensor * llama_turbo_build_k_rot(const llama_kv_cache & kv, ggml_context * ctx);
ggml_tensor * llama_turbo_build_v_rot(const llama_kv_cache & kv, ggml_context * ctx);

// Rotates what matrices [n_matrices][n][n] give, of heads of K of size n: the rotation that the graph would apply behind them.
void llama_turbo_rotate_rows(std::vector<float> & matrices, int64_t n);

// Multiplies each group of rot->ne[0] values by the matrix.
ggml_tensor * llama_turbo_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot);

// Whether K-shift of this view of the cache [n_rot, n_head_kv, n_cells] is ours: for turbo types, and where upstream's own path fails for types
// that may stand beside a turbo V. It fails for quantized types without a rotation (null pointer) or with RoPE on a part of the head (abort),
// and for bf16 (no RoPE for it on the CPU).
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
