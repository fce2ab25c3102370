#pragma once

// The turbo cache types as the rest of ggml and llama sees them. Included by ggml.h after enum ggml_type;
// block layouts and codecs are in turbo/scalar.h and turbo/trellis.h.

#undef GGML_TYPE_COUNT
#define GGML_TYPE_COUNT GGML_TYPE_TURBO_COUNT

#include "ggml-turbo-list.h"

static inline bool ggml_is_turbo(enum ggml_type type) {
    switch (type) {
#define GGML_TURBO_CASE(ENUM, NAME, C_NAME, FAMILY, BITS) case GGML_TYPE_##ENUM:
        GGML_TURBO_TYPES_X(GGML_TURBO_CASE)
        return true;
        default:
            return false;
    }
}

static inline bool ggml_turbo_is_trellis(enum ggml_type type) {
    switch (type) {
        GGML_TURBO_TRELLIS_TYPES_X(GGML_TURBO_CASE)
        return true;
        default:
            return false;
    }
}

#undef GGML_TURBO_CASE

// Temporal decay takes one bit of each value of these types, in place.
GGML_API bool ggml_turbo_decays(enum ggml_type type);

// Decay as an operation of a graph: in place, by the scale rule of the process; the result is a view of a, which is contiguous and of a
// type that decays. It is a GGML_OP_MAP_CUSTOM1, so that backends which do not know it say no.
GGML_API struct ggml_tensor * ggml_turbo_decay(struct ggml_context * ctx, struct ggml_tensor * a);
GGML_API bool                 ggml_turbo_is_decay(const struct ggml_tensor * op);

// Gives a GGML_OP_FLASH_ATTN_EXT a second segment of keys and values: it attends those of both in one softmax, as if the rows of k, v and
// mask stood behind its own. Types and numbers of rows are independent of the first segment's; sinks count once.
//   k:    [n_embd_head_k, n_rows, n_head_kv, n_seq]
//   v:    [n_embd_head_v, n_rows, n_head_kv, n_seq]
//   mask: [n_rows, n_queries, 1, n_seq or 1], f16; the op must have a mask of its own
// They are src[5], src[6] and src[7]. The CPU backend and the CUDA/HIP backend know them, and the RPC backend asks its server; others would
// leave them out without a word, so who builds such a graph must ask for the device first.
GGML_API void ggml_turbo_flash_attn_add_segment(struct ggml_tensor * a,
                                                struct ggml_tensor * k,
                                                struct ggml_tensor * v,
                                                struct ggml_tensor * mask);
GGML_API bool ggml_turbo_flash_attn_has_segment(const struct ggml_tensor * op);
