#pragma once

// Attention of the rows of a unit over a tile of keys: scores, weights, values.

#include "attn-op.h"

namespace {

//
// rows
//

void quantize_query(const float * x, float scale, int64_t n, int8_t * qs, float * qd, int32_t * bias) {
    for (int64_t b = 0; b < n / BLOCK; ++b, x += BLOCK, qs += BLOCK) {
        vf largest = splat(0.0f);
        for (int i = 0; i < BLOCK; i += LANES) {
            largest = max(max(load(x + i), sub(splat(0.0f), load(x + i))), largest);
        }
        const float amax    = max_lane(largest);
        const float inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
        float       rounded[BLOCK];
        for (int i = 0; i < BLOCK; i += LANES) {
            store(rounded + i, round(mul(load(x + i), splat(inverse))));
        }
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; ++i) {
            const int32_t q = (int32_t) rounded[i];
            qs[i]           = (int8_t) q;
            sum += q;
        }
        qd[b]   = amax / 127.0f * scale;
        bias[b] = -LEVEL_BIAS * sum;
    }
}

void start_rows(const attention & a, const unit & u, const row_states & st) {
    const float scale = a.softcap != 0.0f ? a.scale / a.softcap : a.scale;
    std::fill(st.o, st.o + u.rows * st.dv, 0.0f);
    for (int r = 0; r < u.rows; ++r) {
        const int64_t head = a.head_of(u, r);
        const float * x    = (const float *) ((const char *) a.q->data + a.query_of(u, r) * a.q->nb[1] +
                                           head * a.q->nb[2] + u.seq * a.q->nb[3]);
        st.max[r]          = -INF;
        st.sum[r]          = 0.0f;
        st.slope[r]        = a.slope_of(head);
        for (int i = 0; i < a.n_segments; ++i) {
            st.mask[r * SEGMENTS + i] = a.mask_of(a.segments[i].mask, u, r);
        }
        if (a.needs_int8_q) {
            const row_states row = st.from(r);
            quantize_query(x, scale, a.dk, row.qs, row.qd, row.bias);
        }
        if (a.needs_float_q) {
            std::transform(x, x + a.dk, st.qf + r * a.dk, [=](float y) { return scale * y; });
        }
    }
}

// Writes a row that has seen all keys. The sink is a score without a value.
void finish_row(const attention & a, const unit & u, int r, const float * o, float max, float sum) {
    const int64_t head   = a.head_of(u, r);
    float         factor = 1.0f;
    if (a.sinks) {
        const float sink = ((const float *) a.sinks->data)[head];
        if (sink > max) {
            factor = std::exp(max - sink);
            sum    = sum * factor + 1.0f;
        } else {
            sum += std::exp(sink - max);
        }
    }
    factor = sum == 0.0f ? 0.0f : factor / sum;
    float * y =
        (float *) ((char *) a.dst->data + head * a.dst->nb[1] + a.query_of(u, r) * a.dst->nb[2] + u.seq * a.dst->nb[3]);
    std::transform(o, o + a.dv, y, [=](float x) { return factor * x; });
}

//
// a tile
//

bool all_masked(const ggml_half * m, int n) {
    if (m[0] != HALF_MINUS_INF) {  // mostly so
        return false;
    }
    unsigned visible = 0;
    for (int i = 0; i < n; ++i) {
        visible |= m[i] ^ HALF_MINUS_INF;
    }
    return visible == 0;
}

const ggml_half * mask_of(const row_states & st, int row, const tile & t) {
    const ggml_half * mask = st.mask[row * SEGMENTS + t.segment];
    return mask ? mask + t.key : nullptr;
}

// Whether no row sees any of n keys of a tile
bool are_masked(const row_states & st, int rows, const tile & t, int first, int n) {
    const ggml_half * last = nullptr;
    for (int r = 0; r < rows; ++r) {
        const ggml_half * mask = mask_of(st, r, t);
        if (!mask || (mask != last && !all_masked(mask + first, n))) {
            return false;
        }
        last = mask;
    }
    return true;
}

bool is_masked(const row_states & st, int rows, const tile & t) {
    return are_masked(st, rows, t, 0, t.n_keys);
}

// Rows of K or V: of the keys of a tile, for the head of a unit
struct tile_rows {
    const char * first;
    size_t       stride, size;
    int          n;

    void prefetch(int from, int to) const {
        for (int i = from; i < std::min(to, n); ++i) {
            for (size_t j = 0; j < size; j += 64) {
                prefetch_l2(first + i * stride + j);
            }
        }
    }
};

tile_rows rows_of(const attention & a, const ggml_tensor * t, const unit & u, const tile & at) {
    return { a.rows_of(t, u) + at.key * t->nb[1], t->nb[1], ggml_row_size(t->type, t->ne[0]), at.n_keys };
}

// The tile that a thread will see next. Rows of one head are small pieces far apart, which the hardware does not foresee. A tile ahead
// is far enough for main memory: 6.0 -> 4.7 ms for 16,384 keys of turbo4.
struct lookahead {
    tile_rows k, v;

    void prefetch(int from, int to) const {
        k.prefetch(from, to);
        v.prefetch(from, to);
    }
};

lookahead look_ahead(const attention & a, const unit & u, const row_states & st, int64_t index, int64_t step) {
    while (index < a.n_tiles() && is_masked(st, u.rows, a.tile_at(index))) {
        index += step;
    }
    if (index >= a.n_tiles()) {
        return {};
    }
    const tile      t = a.tile_at(index);
    const segment & s = a.segments[t.segment];
    return { rows_of(a, s.k, u, t), rows_of(a, s.v, u, t) };
}

void score_floats(const attention &  a,
                  const segment &    s,
                  const row_states & st,
                  int                rows,
                  const tile_rows &  k,
                  const scratch &    w) {
    int keys[TILE];
    for (int i = 0; i < TILE; ++i) {
        keys[i] = std::min(i, k.n - 1);
    }
    float ones[TILE];
    std::fill(ones, ones + TILE, 1.0f);
    std::fill(w.s, w.s + rows * TILE, 0.0f);
    for (int64_t column = 0; column < a.dk; column += BLOCK) {
        s.kernels_k.unpack({ s.k, k.first, keys, TILE, column }, w.block);
        for (int i = 0; i < TILE; i += LANES) {
            for (int j = 0; j < BLOCK; j += 4) {
                vi four[4];
                load_words<4>(four, (const char *) (w.block + i * BLOCK + j), BLOCK * sizeof(float));
                for (int l = 0; l < 4; ++l) {
                    store(w.block_t + (j + l) * TILE + i, as_float(four[l]));
                }
            }
        }
        const int n = std::min<int64_t>(BLOCK, a.dk - column);
        multiply({ w.s, TILE, ones, st.qf + column, (size_t) a.dk, n }, rows, TILE, float_rows{ w.block_t, TILE });
    }
}

// For few rows, a tile costs little more than its way from memory: keys that no row sees are left out, their scores are anything, and
// the next tile is prefetched along the way, since a core drops prefetches that it can't track. For two rows of f16, 310 -> 200 us.
void score_few_rows(const segment &    s,
                    const row_states & st,
                    int                rows,
                    const tile &       t,
                    const tile_rows &  k,
                    const lookahead &  next,
                    const scratch &    w) {
    for (int i = 0; i < TILE; i += DOT_KEYS) {
        next.prefetch(i, i + DOT_KEYS);
        if (i >= k.n || are_masked(st, rows, t, i, std::min(DOT_KEYS, k.n - i))) {
            continue;
        }
        const char * keys[DOT_KEYS];
        for (int j = 0; j < DOT_KEYS; ++j) {
            keys[j] = k.first + std::min(i + j, k.n - 1) * k.stride;
        }
        s.kernels_k.dots(st, rows, keys, w.s + i);
    }
}

void score_tile(const attention &  a,
                const unit &       u,
                const row_states & st,
                const tile &       t,
                const lookahead &  next,
                const scratch &    w) {
    const segment & s = a.segments[t.segment];
    tile_rows       k = rows_of(a, s.k, u, t);
    if (s.kernels_k.dots && (a.is_narrow || u.rows <= GEMM_ROWS) && a.dk % LANES == 0) {
        return score_few_rows(s, st, u.rows, t, k, next, w);
    }
    next.prefetch(0, TILE);
    if (!s.kernels_k.score) {
        return score_floats(a, s, st, u.rows, k, w);
    }
    if (k.n < TILE) {
        for (int i = 0; i < TILE; ++i) {
            memcpy(w.tail + i * k.size, k.first + std::min(i, k.n - 1) * k.stride, k.size);
        }
        k.first  = w.tail;
        k.stride = k.size;
    }
    s.kernels_k.score(st, u.rows, k.first, k.stride, k.n, w);
}

// Scores of a row become weights relative to the largest score so far; returns what earlier weights have to be multiplied by.
float weigh_row(const attention & a,
                float *           s,
                const ggml_half * mask,
                int               n_keys,
                float             slope,
                float &           max_so_far,
                float &           sum,
                float &           tile_sum) {
    ggml_half padded[TILE] = {};
    if (n_keys < TILE) {
        if (mask) {
            memcpy(padded, mask, n_keys * sizeof(ggml_half));
        }
        std::fill(padded + n_keys, padded + TILE, HALF_MINUS_INF);
        mask = padded;
    }
    vf largest = splat(-INF);
    for (int i = 0; i < TILE; i += LANES) {
        vf x = load(s + i);
        if (a.softcap != 0.0f) {
            x = mul(splat(a.softcap), tanh_of(x));
        }
        if (mask) {  // hides NaN too
            const vf m = load_half(mask + i);
            x          = select_gt(splat(-65504.0f), m, m, fma(splat(slope), m, x));
        }
        store(s + i, x);
        largest = max(x, largest);
    }
    const float old = max_so_far;
    max_so_far      = std::max(old, max_lane(largest));
    if (max_so_far == -INF) {  // nothing seen yet, or nothing but NaN
        sum += std::any_of(s, s + TILE, [](float x) { return x != x; }) ? NAN : 0.0f;
        std::fill(s, s + TILE, 0.0f);
        tile_sum = 0.0f;
        return 1.0f;
    }
    vf total = splat(0.0f);
    for (int i = 0; i < TILE; i += LANES) {
        const vf weight = exp_negative(sub(load(s + i), splat(max_so_far)));
        store(s + i, select_gt(splat(a.negligible), weight, splat(0.0f), weight));  // keeps NaN
        total = add(total, weight);
    }
    const float factor = max_so_far > old ? std::exp(old - max_so_far) : 1.0f;
    tile_sum           = sum_lanes(total);
    sum                = sum * factor + tile_sum;
    return factor;
}

// The keys that some row gives weight, and the weights of only those
int select_keys(float * s, int rows, int n_keys, int * keys) {
    float largest[TILE];
    for (int i = 0; i < TILE; i += LANES) {
        vf m = load(s + i);
        for (int r = 1; r < rows; ++r) {
            m = max(load(s + r * TILE + i), m);
        }
        store(largest + i, m);
    }
    int n = 0;
    for (int i = 0; i < n_keys; ++i) {
        keys[n] = i;
        n += largest[i] != 0.0f;
    }
    for (int r = 0; r < rows && n < n_keys; ++r) {
        for (int i = 0; i < n; ++i) {
            s[r * TILE + i] = s[r * TILE + keys[i]];
        }
    }
    return n;
}

// Weights become int16 in place, as parts of their sum: no sum of products with int16 exceeds int32. Returns their scale.
float weights_to_int16(float * s, int n, float sum) {
    if constexpr (HAS_DOT_PAIRS) {
        const vf inverse = splat(sum > 0.0f ? INT16_MAX / sum : 0.0f);
        if (n % 2) {
            s[n] = 0.0f;
        }
        for (int i = 0; i < TILE; i += LANES) {
            store_i16((int16_t *) s + i, mul(inverse, load(s + i)));
        }
    }
    return sum / INT16_MAX;
}

// The thread will see every step-th tile from this one on.
void attend_tile(const attention &  a,
                 const unit &       u,
                 const row_states & st,
                 int64_t            index,
                 int64_t            step,
                 const scratch &    w) {
    const tile t = a.tile_at(index);
    if (is_masked(st, u.rows, t)) {
        return;
    }
    score_tile(a, u, st, t, look_ahead(a, u, st, index + step, step), w);

    float factor[TILE];
    float tile_sum[TILE];
    for (int r = 0; r < u.rows; ++r) {
        factor[r] =
            weigh_row(a, w.s + r * TILE, mask_of(st, r, t), t.n_keys, st.slope[r], st.max[r], st.sum[r], tile_sum[r]);
    }

    int        keys[TILE];
    float      scale[TILE];
    const int  n     = select_keys(w.s, u.rows, t.n_keys, keys);
    const bool pairs = HAS_DOT_PAIRS && !a.is_narrow && u.rows > GEMM_ROWS;
    if (pairs) {
        for (int r = 0; r < u.rows; ++r) {
            scale[r] = weights_to_int16(w.s + r * TILE, n, tile_sum[r]);
        }
    }
    const segment & s = a.segments[t.segment];
    const tile_rows v = rows_of(a, s.v, u, t);
    for (int64_t column = 0; column < a.dv; column += BLOCK) {
        const product m = { st.o + column, (size_t) st.dv, factor, w.s, TILE, n, pairs ? scale : nullptr };
        s.kernels_v.accumulate(m, u.rows, { s.v, v.first, keys, n, column }, w.block);
    }
}

}  // namespace
