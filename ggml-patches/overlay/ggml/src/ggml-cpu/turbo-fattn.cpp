// Attention over caches of turbo types, a tile of keys at a time.
//
// A unit of work is one KV head and up to TILE of the rows that share it: all query heads of its group, for one query or several. For
// each tile of keys, each block of K and V is decoded once per unit:
//
//     scores    Q has become int8 blocks with a scale. Keys are decoded into registers, transposed: lane i holds four values of key i,
//               so that a dot product needs no sum over lanes and its scales are a vector too. Keys of other types are decoded to
//               floats and take the product of matrices.
//     weights   online softmax: weights relative to the largest score so far, and a factor for the sum up to here
//     values    keys that no row gives weight are left out, the others decoded, a block of columns at a time, and multiplied
//
// With few units the keys are split: thread i takes tiles i, i + n, .. of all units and the partial sums are merged at the end. With
// many units each thread takes whole units. Either way the memory needed does not depend on the number of keys.
//
// The tiles of a second segment of keys (ggml_turbo_flash_attn_add_segment) follow those of the first.

#include "turbo-fattn.h"

#include "turbo-fattn-types.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace {

constexpr float     INF            = std::numeric_limits<float>::infinity();
constexpr ggml_half HALF_MINUS_INF = 0xfc00;

//
// the op
//

struct unit {
    int64_t seq;
    int64_t head_kv;
    int64_t first;  // of the rows of the group: query * gqa + head within the group
    int     rows;
};

struct segment {
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;

    kernels kernels_k, kernels_v;

    int64_t n_keys() const { return k->ne[1]; }

    int64_t n_tiles() const { return (n_keys() + TILE - 1) / TILE; }
};

struct tile {
    int     segment;
    int64_t key;  // the first
    int     n_keys;
};

struct attention {
    const ggml_tensor * q;
    const ggml_tensor * sinks;
    ggml_tensor *       dst;

    segment segments[SEGMENTS];
    int     n_segments;

    int64_t dk, dv, dv_padded;
    int64_t n_queries, n_heads, n_heads_kv, gqa;
    float   scale, max_bias, softcap;
    float
        negligible;  // weight, relative to that of the largest score, below which all keys together change no f16 digit

    // what keys are multiplied with
    bool needs_int8_q, needs_float_q;

    int64_t rows_of_group() const { return gqa * n_queries; }

    int64_t units_of_group() const { return (rows_of_group() + TILE - 1) / TILE; }

    int64_t n_tiles() const { return segments[0].n_tiles() + (n_segments > 1 ? segments[1].n_tiles() : 0); }

    tile tile_at(int64_t i) const {
        const int64_t n   = segments[0].n_tiles();
        const int     s   = i < n ? 0 : 1;
        const int64_t key = (i < n ? i : i - n) * TILE;
        return { s, key, (int) std::min<int64_t>(TILE, segments[s].n_keys() - key) };
    }

    int64_t n_units() const { return n_heads_kv * q->ne[3] * units_of_group(); }

    unit unit_at(int64_t i) const {
        const int64_t per_group = units_of_group();
        const int64_t part      = i % per_group;
        const int64_t first     = rows_of_group() * part / per_group;
        const int64_t end       = rows_of_group() * (part + 1) / per_group;
        return { i / per_group / n_heads_kv, i / per_group % n_heads_kv, first, (int) (end - first) };
    }

    int64_t query_of(const unit & u, int row) const { return (u.first + row) / gqa; }

    int64_t head_of(const unit & u, int row) const { return u.head_kv * gqa + (u.first + row) % gqa; }

    const char * rows_of(const ggml_tensor * t, const unit & u) const {
        return (const char *) t->data + u.head_kv * t->nb[2] + u.seq / (q->ne[3] / t->ne[3]) * t->nb[3];
    }

    const ggml_half * mask_of(const ggml_tensor * mask, const unit & u, int row) const {
        return !mask ? nullptr :
                       (const ggml_half *) ((const char *) mask->data + query_of(u, row) * mask->nb[1] +
                                            head_of(u, row) % mask->ne[2] * mask->nb[2] +
                                            u.seq % mask->ne[3] * mask->nb[3]);
    }

    float slope_of(int64_t head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int64_t n = int64_t(1) << (int) std::floor(std::log2((float) n_heads));
        return head < n ? std::exp2(-max_bias / n * (head + 1)) : std::exp2(-max_bias / 2 / n * (2 * (head - n) + 1));
    }
};

segment segment_of(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask) {
    return { k, v, mask, kernels_of(k->type), kernels_of(v->type) };
}

bool is_known(const segment & s) {
    return s.kernels_k.decode && s.kernels_v.decode && s.k->nb[0] == ggml_type_size(s.k->type) &&
           s.v->nb[0] == ggml_type_size(s.v->type) && s.k->ne[2] == s.v->ne[2] && s.k->ne[3] == s.v->ne[3];
}

bool init(attention & a, ggml_tensor * dst) {
    a.q     = dst->src[0];
    a.sinks = dst->src[4];
    a.dst   = dst;

    a.segments[0] = segment_of(dst->src[1], dst->src[2], dst->src[3]);
    a.n_segments  = 1;
    if (ggml_turbo_flash_attn_has_segment(dst)) {
        a.segments[1] = segment_of(dst->src[5], dst->src[6], dst->src[7]);
        a.n_segments  = 2;
    }

    a.dk         = dst->src[1]->ne[0];
    a.dv         = dst->src[2]->ne[0];
    a.dv_padded  = GGML_PAD(a.dv, BLOCK);
    a.n_queries  = a.q->ne[1];
    a.n_heads    = a.q->ne[2];
    a.n_heads_kv = dst->src[1]->ne[2];
    a.gqa        = a.n_heads / a.n_heads_kv;

    memcpy(&a.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a.softcap, (const float *) dst->op_params + 2, sizeof(float));

    int64_t n_keys  = 0;
    bool    known   = true;
    a.needs_int8_q  = false;
    a.needs_float_q = false;
    for (int i = 0; i < a.n_segments; ++i) {
        const segment & s = a.segments[i];
        n_keys += s.n_keys();
        known                                                  = known && is_known(s);
        (s.kernels_k.score ? a.needs_int8_q : a.needs_float_q) = true;
    }
    a.negligible = std::ldexp(1.0f, -13) / n_keys;

    return known && a.q->type == GGML_TYPE_F32 && a.q->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) &&
           a.dv <= TILE * TILE;
}

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
        s.kernels_k.decode({ s.k, k.first, keys, TILE, column }, w.block);
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
    if (s.kernels_k.dots && u.rows <= GEMM_ROWS && a.dk % LANES == 0) {
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
        store(s + i, weight);
        total = add(total, weight);
    }
    const float factor = max_so_far > old ? std::exp(old - max_so_far) : 1.0f;
    tile_sum           = sum_lanes(total);
    sum                = sum * factor + tile_sum;
    return factor;
}

// The keys that some row gives weight, and the weights of only those
int select_keys(float * s, int rows, int n_keys, float negligible, int * keys) {
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
        n += !(largest[i] < negligible);
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
    const int  n     = select_keys(w.s, u.rows, t.n_keys, a.negligible, keys);
    const bool pairs = HAS_DOT_PAIRS && u.rows > GEMM_ROWS;
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

//
// threads
//

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

// Whether all keys are few, and units not too few: whoever then splits the keys, most of which a young cache masks, leaves threads idle.
// 23 -> 11 us for 64 keys of turbo3. With more keys, units that stride over them lose.
bool few_keys(const attention & a, int64_t nth) {
    const auto per_thread = [nth](int64_t n) {
        return (n + nth - 1) / nth;
    };
    return a.n_tiles() <= 2 * nth && per_thread(a.n_units()) * a.n_tiles() <= per_thread(a.n_tiles()) * a.n_units();
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

enum fattn_use { USE_NEVER, USE_TURBO, USE_ALWAYS };

fattn_use use_from_environment() {
    const char * value = std::getenv("GGML_TURBO_CPU_FATTN");
    return !value || !strcmp(value, "1") ? USE_TURBO : !strcmp(value, "all") ? USE_ALWAYS : USE_NEVER;
}

}  // namespace

const char * ggml_turbo_cpu_fattn_isa(void) {
    return SIMD_NAME;
}

bool ggml_turbo_cpu_flash_attn_supported(const ggml_tensor * op) {
    attention a;
    return init(a, const_cast<ggml_tensor *>(op));
}

bool ggml_turbo_cpu_flash_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    static const fattn_use use = use_from_environment();

    attention  a;
    const bool has_turbo = ggml_is_turbo(dst->src[1]->type) || ggml_is_turbo(dst->src[2]->type);
    const bool wanted    = !params->use_ref && use != USE_NEVER && (use == USE_ALWAYS || has_turbo);
    if (ggml_turbo_flash_attn_has_segment(dst)) {
        GGML_ASSERT(init(a, dst));  // nobody else knows segments
    } else if (!wanted || !init(a, dst)) {
        return false;
    }

    const thread_team team = { params, a };
    const scratch     w    = team.buffer_of(params->ith);
    GGML_ASSERT(w.n_states >= std::min<int64_t>(TILE, a.rows_of_group()) && "work buffer too small");

    if (a.rows_of_group() > TILE / 2 && a.n_units() >= 4 * params->nth) {
        split_units(team, w);
    } else if (few_keys(a, params->nth)) {
        deal_units(team, w);
    } else {
        split_keys(team, w);
    }
    return true;
}
