#pragma once

#include "calibration.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

// The calibration of a model that is made where it is needed: by the first context that asks for one, from a built-in text (calibration-text.h).
// It is kept in llama.cpp's cache folder (LLAMA_CACHE, XDG_CACHE_HOME/llama.cpp, ~/.cache/llama.cpp), for later starts, other quantizations of the
// model, and other programs:
//
//   turbo-calibration-MODEL-METHOD.gguf    MODEL:  its fingerprint (model.h)
//                                          METHOD: digest of the text, how it is read, the model's name and shape, and RoPE as it was asked for
//
//   layers:  those of the model that have a KV cache
//   why_not: the reason where the result is nullptr
std::shared_ptr<const llama_turbo_calibration> llama_turbo_auto_calibration(llama_model &                 model,
                                                                            const llama_context_params &  params,
                                                                            const std::vector<uint32_t> & layers,
                                                                            std::string &                 why_not);

// The built-in text, in pieces.
std::vector<std::string> llama_turbo_calibration_text();
