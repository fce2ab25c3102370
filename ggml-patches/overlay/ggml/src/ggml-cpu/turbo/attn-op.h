#pragma once

// What an op of attention asks for: its segments of keys, cut into tiles, and its rows, cut into units.

#include "attn-types.h"

#include <algorithm>
#include <cmath>
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

    // As many queries as decoding has, or drafts: each one's sums are the same whatever the others are, and how many.
    bool is_narrow;

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
    return s.kernels_k.unpack && s.kernels_v.unpack && s.k->nb[0] == ggml_type_size(s.k->type) &&
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
    a.is_narrow  = a.n_queries <= TILE;
    a.negligible = std::ldexp(1.0f, -13) / n_keys;

    return known && a.q->type == GGML_TYPE_F32 && a.q->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) &&
           a.dv <= TILE * TILE;
}

}  // namespace
