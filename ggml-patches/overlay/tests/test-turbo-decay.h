#pragma once

// Shares of temporal decay, and which cells have lost a bit: in the saved state, and in the log.

#include "test-turbo-device.h"
#include "test-turbo-session.h"
#include "test-turbo-state.h"

using positions = std::set<llama_pos>;

constexpr int N_CTX = 512;

struct shares {
    const char * text;
    int          hot, warm, cold;
};

inline const shares BALANCED = { "balanced", 15, 35, 50 };

inline const shares ALL_SHARES[] = {
    { "conservative", 25, 40, 35  },
    BALANCED, { "aggressive",   5,  25, 70  },
    { "59,0,41",      59, 0,  41  },
    { "0,0,100",      0,  0,  100 },
};

inline setup decaying(const setup & types, const char * decay) {
    setup s = types;
    s.decay = decay;
    s.n_ctx = N_CTX;
    return s;
}

inline setup balanced(const setup & types) {
    return decaying(types, BALANCED.text);
}

inline setup plain(const setup & types) {
    return decaying(types, "");
}

//
// what has decayed
//

inline positions range(llama_pos begin, llama_pos end) {
    positions res;
    for (llama_pos pos = begin; pos < end; ++pos) {
        res.insert(pos);
    }
    return res;
}

inline positions operator|(positions a, const positions & b) {
    a.insert(b.begin(), b.end());
    return a;
}

// Rows of turbo3 and turbo4 where not all blocks have decayed though they should, or some though none should.
struct decay_count {
    int n_wrong    = 0;
    int n_decayed  = 0;
    int n_expected = 0;
};

// open_k: positions whose K may be either.
inline decay_count count_decayed(saved_state &     state,
                                 const positions & k,
                                 const positions & v,
                                 const positions & open_k) {
    decay_count res;
    for (size_t c = 0; c < state.caches.size(); ++c) {
        const bool has_window = c > 0;
        for (const saved_stream & stream : state.caches[c]) {
            for_each_tensor(stream, [&](const saved_tensor & tensor, bool is_k) {
                if (!ggml_turbo_decays(tensor.type)) {
                    return;
                }
                const int n_blocks = (int) (tensor.row_size / ggml_type_size(tensor.type));
                for (size_t i = 0; i < stream.cells.size(); ++i) {
                    if (is_k && open_k.count(stream.cells[i].pos) > 0) {
                        continue;
                    }
                    const bool expected = !has_window && (is_k ? k : v).count(stream.cells[i].pos) > 0;
                    const int  n        = n_decayed_blocks(tensor.type, state.row(tensor, i), tensor.row_size);
                    res.n_decayed += n == n_blocks;
                    res.n_expected += expected;
                    res.n_wrong += n != (expected ? n_blocks : 0);
                }
            });
        }
    }
    return res;
}

inline void check_decayed(const std::string & what,
                          saved_state         state,
                          const positions &   k,
                          const positions &   v,
                          const positions &   open_k = {}) {
    const decay_count n        = count_decayed(state, k, v, open_k);
    const bool        has_rows = n.n_expected > 0 || (k.empty() && v.empty());
    report(n.n_wrong == 0 && has_rows, what,
           format("%.0f rows decayed, expected %.0f, %.0f are wrong", n.n_decayed, n.n_expected, n.n_wrong));
}

inline void check_decayed(const std::string & what, const saved_state & state, const positions & both) {
    check_decayed(what, state, both, both);
}

// The numbers that a cache logs when it is freed.
struct decay_totals {
    long long n_passes = -1;
    long long n_k      = -1;
    long long n_v      = -1;
};

inline decay_totals logged_totals() {
    decay_totals res;
    const size_t pos = log_text.rfind("llama_turbo_cache: decay: ");
    if (pos != std::string::npos) {
        sscanf(log_text.c_str() + pos, "llama_turbo_cache: decay: %lld passes, %lld cells of K, %lld cells of V\n",
               &res.n_passes, &res.n_k, &res.n_v);
    }
    return res;
}

// Layers without a window whose K or V can decay.
inline int n_decaying_layers(const saved_state & state, bool k) {
    int n = 0;
    for_each_tensor(state.caches[0][0],
                    [&](const saved_tensor & tensor, bool is_k) { n += is_k == k && ggml_turbo_decays(tensor.type); });
    return n;
}

//
// by hand
//

inline void decay_row(const saved_tensor & tensor, uint8_t * row) {
    if (ggml_turbo_decays(tensor.type)) {
        const int64_t n_values = tensor.row_size / ggml_type_size(tensor.type) * QK_SCALAR;
        ggml_turbo_decay_row(tensor.type, ggml_turbo_get_scale(), row, n_values);
    }
}

// Decays what is cold of a sequence, as the library should have done by now, and puts the state back.
inline void decay_by_hand(const session & s, int percent) {
    saved_state state = read_seq_state(s, 0);
    if (state.caches[0].empty()) {
        return;
    }
    const saved_stream & stream = state.caches[0][0];
    const int            cold   = n_cold((int) stream.cells.size(), percent);
    for_each_tensor(stream, [&](const saved_tensor & tensor, bool) {
        for (size_t i = 0; i < stream.cells.size(); ++i) {
            if (stream.cells[i].pos < cold) {
                decay_row(tensor, state.row(tensor, i));
            }
        }
    });
    if (!set_seq_state(s, state.bytes, 0)) {
        check("state with decayed rows read", false);
    }
}

//
// scenarios in test-turbo-decay-life.cpp
//

void test_state(const setup & types);
void test_twice(const setup & types);
void test_rewrite(const setup & types);
void test_shared_cells(const setup & types);
void test_copied_buffer(const setup & types);
void test_sequences(const setup & types);
void test_shift(const setup & types);
