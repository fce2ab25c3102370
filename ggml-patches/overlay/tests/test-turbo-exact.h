#pragma once

// Settings of exact tokens, and how far logits may differ.

#include "../src/turbo/exact.h"
#include "test-turbo-session.h"
#include "test-turbo-state.h"

constexpr int SINK   = 4;
constexpr int TAIL   = 8;
constexpr int REWIND = llama_turbo_exact_sizes().rewind;

inline setup with(setup s, const std::string & sink, const std::string & tail) {
    s.sink = sink;
    s.tail = tail;
    return s;
}

// Copies of all cells, which attention takes for whole ubatches.
inline setup all_copied(const setup & s) {
    return with(s, "0", "100000");
}

// Every token of the texts below is in the tail, and there are fewer copies than cells: large ubatches are attended from their graph.
inline setup all_in_tail(setup s) {
    s.n_ctx = 1024;
    return with(s, "0", "120");
}

inline setup window(const setup & s) {
    return with(s, std::to_string(SINK), std::to_string(TAIL));
}

inline setup half(setup s) {
    s.type_k     = GGML_TYPE_F16;
    s.type_v     = GGML_TYPE_F16;
    s.layers_k   = "";
    s.layers_v   = "";
    s.flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return s;
}

inline bool is_half(const setup & s) {
    return s.type_k == GGML_TYPE_F16 && s.type_v == GGML_TYPE_F16 && s.layers_k.empty();
}

// Float error that some layers have quantized: measured up to 3e-5.
constexpr double NMSE_DEEP = 1e-4;

// A context of more cells than copies.
constexpr uint32_t N_CTX_LONG = 1024;
constexpr int      N_LONG     = 600;

inline setup long_context(setup s) {
    s.n_ctx = N_CTX_LONG;
    return s;
}

inline logits_t last_logits(const logits_t & logits, int n) {
    return logits_t(logits.end() - (size_t) n * llama_vocab_n_tokens(llama_model_get_vocab(model)), logits.end());
}

// Same values in another batch
inline double nmse_batch(const setup & s) {
    const bool is_trellis = ggml_turbo_is_trellis(s.type_k) || ggml_turbo_is_trellis(s.type_v);
    return is_trellis ? NMSE_BATCH_TRELLIS : NMSE_BATCH;
}

// What the types do to the logits, at most; for types by layer it is that of the coarsest.
inline double nmse_of_types(const setup & s) {
    const type_error k = measured_error(s.layers_k.empty() ? s.type_k : GGML_TYPE_TURBO2_0);
    const type_error v = measured_error(s.layers_v.empty() ? s.type_v : GGML_TYPE_TURBO2_0);
    return ERROR_HEADROOM * (k.k_max + v.v_max);
}

// The rows of copies, and so the sums, are in another order than the first time. What the first token attends is the same; later ones attend
// values that float error may have moved to another level, more so in deeper models.
inline void check_goes_on(const logits_t & expected, const logits_t & got) {
    const size_t n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const bool   is_small = llama_model_n_layer(model) <= 2 && llama_model_n_swa(model) == 0;
    check_at_most(
        "... the first token",
        nmse(logits_t(expected.begin(), expected.begin() + n_vocab), logits_t(got.begin(), got.begin() + n_vocab)),
        nmse_float());
    if (is_small) {
        check_float("... continues", expected, got);
    } else {
        check_at_most("... continues", nmse(expected, got), NMSE_DEEP);
    }
}

inline void erase_row(saved_state & state, const saved_tensor & tensor, size_t row) {
    memset(state.row(tensor, row), 0, tensor.row_size);
}

//
// scenarios in test-turbo-exact-life.cpp
//

void test_shift(const setup & types);
void test_sequences(const setup & types);
void test_removal(const setup & types);
void test_state(const setup & types);
