#pragma once

// How threads share attention: whole units, or the keys of all units.

#include "attn-tile.h"

namespace {

// What a thread owns of the work buffer
scratch split_buffer(const attention & a, char * p, size_t size) {
    const char * end  = p + size;
    const auto   take = [&p](size_t bytes) {
        char * start = p;
        p += GGML_PAD(bytes, 64);
        return start;
    };
    const int64_t n_blocks = a.dk / BLOCK;

    scratch w = {};
    w.s       = (float *) take(TILE * TILE * sizeof(float));
    w.block   = (float *) take(TILE * BLOCK * sizeof(float));

    size_t per_row = a.dv_padded * sizeof(float) + 3 * sizeof(float) + SEGMENTS * sizeof(const ggml_half *);
    if (a.needs_int8_q) {
        size_t largest_row = 0;
        for (int i = 0; i < a.n_segments; ++i) {
            const segment & s = a.segments[i];
            largest_row       = std::max(largest_row, s.kernels_k.score ? ggml_row_size(s.k->type, a.dk) : 0);
        }
        w.scales = (ggml_half *) take(n_blocks * TILE * sizeof(ggml_half));
        w.tail   = take(TILE * largest_row);
        per_row += a.dk + n_blocks * (sizeof(float) + sizeof(int32_t));
    }
    if (a.needs_float_q) {
        w.block_t = (float *) take(TILE * BLOCK * sizeof(float));
        per_row += a.dk * sizeof(float);
    }

    constexpr size_t MAX_PADDING = 9 * 64;  // of the parts of the states
    GGML_ASSERT(end > p + MAX_PADDING && "work buffer too small");
    w.n_states = (end - p - MAX_PADDING) / per_row;

    w.states       = {};
    w.states.dk    = a.dk;
    w.states.dv    = a.dv_padded;
    w.states.o     = (float *) take(w.n_states * a.dv_padded * sizeof(float));
    w.states.max   = (float *) take(w.n_states * sizeof(float));
    w.states.sum   = (float *) take(w.n_states * sizeof(float));
    w.states.slope = (float *) take(w.n_states * sizeof(float));
    w.states.mask  = (const ggml_half **) take(w.n_states * SEGMENTS * sizeof(const ggml_half *));
    if (a.needs_int8_q) {
        w.states.qs   = (int8_t *) take(w.n_states * a.dk);
        w.states.qd   = (float *) take(w.n_states * n_blocks * sizeof(float));
        w.states.bias = (int32_t *) take(w.n_states * n_blocks * sizeof(int32_t));
    }
    if (a.needs_float_q) {
        w.states.qf = (float *) take(w.n_states * a.dk * sizeof(float));
    }
    return w;
}

struct thread_team {
    const ggml_compute_params * params;
    const attention &           a;

    size_t buffer_size() const { return (params->wsize - 64) / params->nth / 64 * 64; }

    scratch buffer_of(int thread) const {
        char * start = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
        return split_buffer(a, start + thread * buffer_size(), buffer_size());
    }
};

void attend_unit(const attention & a, const unit & u, const scratch & w) {
    const row_states & st = w.states;
    start_rows(a, u, st);
    for (int64_t tile = 0; tile < a.n_tiles(); ++tile) {
        attend_tile(a, u, st, tile, 1, w);
    }
    for (int r = 0; r < u.rows; ++r) {
        finish_row(a, u, r, st.o + r * st.dv, st.max[r], st.sum[r]);
    }
}

// Whole units, one at a time to the thread that asks for it
void split_units(const thread_team & team, const scratch & w) {
    const attention & a = team.a;
    if (team.params->ith == 0) {
        ggml_threadpool_chunk_set(team.params->threadpool, team.params->nth);
    }
    ggml_barrier(team.params->threadpool);
    for (int64_t i = team.params->ith; i < a.n_units(); i = ggml_threadpool_chunk_add(team.params->threadpool, 1)) {
        attend_unit(a, a.unit_at(i), w);
    }
}

// Units by which threads are shared out: of a narrow batch those of one query, so that all widths add up in one order
int64_t units_to_share(const attention & a) {
    return a.is_narrow ? a.n_heads_kv : a.n_units();
}

// Whether all keys are few, and units not too few: whoever then splits the keys, most of which a young cache masks, leaves threads idle.
// 23 -> 11 us for 64 keys of turbo3. With more keys, units that stride over them lose.
bool few_keys(const attention & a, int64_t nth) {
    const auto per_thread = [nth](int64_t n) {
        return (n + nth - 1) / nth;
    };
    const int64_t n_units = units_to_share(a);
    return a.n_tiles() <= 2 * nth && per_thread(n_units) * a.n_tiles() <= per_thread(a.n_tiles()) * n_units;
}

// Whole units in turn, which needs no barrier
void deal_units(const thread_team & team, const scratch & w) {
    const attention & a = team.a;
    for (int64_t i = team.params->ith; i < a.n_units(); i += team.params->nth) {
        attend_unit(a, a.unit_at(i), w);
    }
}

// The sum of what the threads have of a row, in the buffer of the caller
void merge_row(const thread_team & team, const unit & u, int r, int64_t index, float * o) {
    const attention & a   = team.a;
    float             max = -INF;
    float             sum = 0.0f;
    std::fill(o, o + a.dv, 0.0f);
    for (int t = 0; t < team.params->nth; ++t) {
        max = std::max(max, team.buffer_of(t).states.max[index]);
    }
    for (int t = 0; t < team.params->nth; ++t) {
        const row_states st = team.buffer_of(t).states.from(index);
        if (*st.sum == 0.0f) {
            continue;
        }
        const float factor = std::exp(*st.max - max);
        sum += factor * *st.sum;
        for (int64_t i = 0; i < a.dv; ++i) {
            o[i] += factor * st.o[i];
        }
    }
    finish_row(a, u, r, o, max, sum);
}

// All threads work on as many units as a buffer has room for, each on its own tiles
void split_keys(const thread_team & team, const scratch & w) {
    const attention & a   = team.a;
    const int         ith = team.params->ith;
    const int         nth = team.params->nth;
    for (int64_t first = 0, end = 0; first < a.n_units(); first = end) {
        int64_t n_rows = 0;
        for (; end < a.n_units() && n_rows + a.unit_at(end).rows <= w.n_states; ++end) {
            start_rows(a, a.unit_at(end), w.states.from(n_rows));
            n_rows += a.unit_at(end).rows;
        }
        for (int64_t tile = ith; tile < a.n_tiles(); tile += nth) {
            int64_t row = 0;
            for (int64_t i = first; i < end; ++i) {
                const unit u = a.unit_at(i);
                attend_tile(a, u, w.states.from(row), tile, nth, w);
                row += u.rows;
            }
        }
        ggml_barrier(team.params->threadpool);
        int64_t row = 0;
        for (int64_t i = first; i < end; ++i) {
            const unit u = a.unit_at(i);
            for (int r = 0; r < u.rows; ++r, ++row) {
                if (row % nth == ith) {
                    merge_row(team, u, r, row, w.s);
                }
            }
        }
        if (end < a.n_units()) {
            ggml_barrier(team.params->threadpool);
        }
    }
}

}  // namespace
