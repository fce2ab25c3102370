#pragma once

struct ggml_tensor;
struct llm_graph_context;
class llm_graph_input_attn_kv;
class llm_graph_input_attn_kv_iswa;

// Attention of layers that have a calibration (calibrated.h) or exact tokens (exact.h), built around upstream's.

// Called first in llm_graph_context::build_attn(): whether the layer has one of these. Then its attention is built by the second function,
// which calls build_attn() again. In that call the answer is no: the thread remembers that it is within, since build_attn() has no argument
// to tell it by.
template <typename input> bool llama_turbo_attends(input * inp, int il);

template <typename input>
ggml_tensor * llama_turbo_build_attn(const llm_graph_context & graph,
                                     input *                   inp,
                                     ggml_tensor *             wo,
                                     ggml_tensor *             wo_b,
                                     ggml_tensor *             wo_s,
                                     ggml_tensor *             q,
                                     ggml_tensor *             k,
                                     ggml_tensor *             v,
                                     ggml_tensor *             kq_b,
                                     ggml_tensor *             sinks,
                                     ggml_tensor *             v_mla,
                                     float                     kq_scale,
                                     int                       il);
