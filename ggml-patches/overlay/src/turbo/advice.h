#pragma once

#include "settings.h"

struct llama_model;

// Warns of what costs much more than it has to, with the cure: a K of few bits that is not calibrated, on a model whose K has large biases or norms
// with outliers; and a calibration without exact sink on a model that has a sink token.
void llama_turbo_advise(const llama_model & model, const llama_turbo_settings & settings);
