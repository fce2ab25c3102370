#pragma once

#include "calibration.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

// Computes a calibration: the model reads a text, and Q, K and V are observed (observed.h).
//
//   m   = mean of K, turned from before RoPE over the positions that contexts have (rope-mean.h)
//   n   = mean of V
//   A_k = what makes the channels of A_k * (K - m) and A_q * Q equal in size, and free of common parts: the error of a score is then least
//   s_k = square root of rms(Q) / rms(K - m), likewise for large heads, and where the graph does not show what RoPE does; both channels of
//         a RoPE pair share it
//   s_v = square root of norm of the column of the output projection / rms(V - n), likewise for the output
//
// Maps and scales have a geometric mean of 1 per head (balance.h). Where scores or weights are compared with something else, nothing is centered
// (model.h). See docs/design/0011-calibration.md.

struct llama_turbo_calibrate_options {
    int32_t n_tokens = 768;  // at most
    int32_t n_chunk  = 384;  // tokens that are read at once, and know each other
    double  seconds  = 1e9;  // no more tokens than the time allows, as the first few show it

    // Called before each chunk, with the tokens that were read, and those that will be.
    std::function<void(int32_t n_read, int32_t n_all)> progress = [](int32_t, int32_t) {
    };
};

// Why a model can't be calibrated; nullptr: it can.
const char * llama_turbo_cant_calibrate(const llama_model & model);

// The context in which this is done: one of the model, with f32 cache and without flash attention.
//   params: of the context that the calibration is for; its RoPE, threads, devices and abort callback count
//   text:   pieces, one behind the other
// Throws std::runtime_error: with the reason why it can't be done; std::invalid_argument: too little text.
std::shared_ptr<const llama_turbo_calibration> llama_turbo_calibrate(llama_model &                         model,
                                                                     const llama_context_params &          params,
                                                                     const std::vector<std::string> &      text,
                                                                     const llama_turbo_calibrate_options & options);

// Whether this thread makes the context of an observation: it has no other settings.
bool llama_turbo_is_observing();
