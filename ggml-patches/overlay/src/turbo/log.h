#pragma once

#include "ggml.h"

class llama_kv_cache;

// One line of the log for each KV cache. It starts with the types and settings in the notation of turbo-gguf's --types:
//
//   llama_turbo_cache: turbo3/turbo4 decay=15,35,50 cal=1a2b3c4d sink=4 tail=16 | rotated 1/1 | bits 3.500/4.500 |
//                      calibrated K 28 28 V 28 28 of 28 | decaying 28/28 | copies 32 rows in 1 streams, 1.25 MiB
//
// Only what is in force is named; decay= is named wherever it was asked for. With types by layer, k= and v= name each layer once. What follows
// counts for K/V: rotated or not, bits per value of the tensors, layers that are centered and scaled of all, layers that decay (or
// `no decay: REASON`), and f16 copies. What would be there by default and can't be ends the line, as `no calibration: REASON` and `no exact
// tokens: REASON`. Upstream's line about rotations comes before, and knows of its own only.
//   type_k, type_v: as asked for
void llama_turbo_log_cache(const llama_kv_cache & kv, ggml_type type_k, ggml_type type_v);
