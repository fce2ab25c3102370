#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

// Cache types by layer, and the shares of temporal decay: from text to values. Knows nothing of models.
//
// A map is a list of LAYERS:TYPE separated by ';'. LAYERS is '*' or a list, separated by ',', of layers N and ranges N-M. Layers are
// counted over those that have a KV cache, from 0, negative ones from the end: "0-1,-2--1:q8_0;*:turbo3". The first item
// that names a layer counts.

// Types of the layers 0 .. n_layer - 1. Layers that no item names get `rest`.
//   what: how messages call the map, such as "K cache types by layer"
//   clip: leave out what is beyond the layers of the model instead of refusing it
// Throws std::invalid_argument, with the layer and the type.
std::vector<ggml_type> llama_turbo_parse_layers(const std::string & map,
                                                uint32_t            n_layer,
                                                ggml_type           rest,
                                                const char *        what,
                                                bool                clip);

// The other way round, shortest form: "0:q8_0;1-2:turbo3;3:q8_0". layers[i]: number of types[i].
std::string llama_turbo_format_layers(const std::vector<uint32_t> & layers, const std::vector<ggml_type> & types);

// TURBO_CACHE_LAYER_ADAPTIVE: modes of earlier systems, as maps. A map may be empty.
struct llama_turbo_layer_mode {
    int          mode;
    const char * map_k;
    const char * map_v;
};

// nullptr for "" and "0". Throws std::invalid_argument for what is no mode.
const llama_turbo_layer_mode * llama_turbo_parse_mode(const std::string & text);

// Temporal decay: percent of a sequence, from its newest to its oldest tokens.
struct llama_turbo_decay_shares {
    int hot  = 100;
    int warm = 0;
    int cold = 0;  // these lose one bit; 0 = no decay
};

// "conservative", "balanced", "aggressive", "HOT,WARM,COLD", or "" and "off" for none. Throws std::invalid_argument.
llama_turbo_decay_shares llama_turbo_parse_decay(const std::string & text);
