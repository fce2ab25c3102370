#pragma once

// Flash attention over packed caches: the operands of the decode kernel.

#include "ggml-cuda/common.cuh"

// Operands of one attention op, or of one of its segments of keys; strides in bytes. Heads of a group share a KV head:
// head = kv_head * gqa_ratio + i.
struct turbo_attn_args {
    const char *  Q;      // f32 [DK, n_q, n_head, n_seq]
    const char *  K;      // packed [DK, n_kv, n_head_kv, n_seq]
    const char *  V;      // packed [DV, n_kv, n_head_kv, n_seq]
    const char *  mask;   // f16 [n_kv, >= n_q, 1, n_mask_seq], or null
    const float * sinks;  // [n_head], or null
    float *
        dst;  // [DV, n_head, n_q, n_seq]; of several parts, partial results [DV, n_parts, n_head, n_q, n_seq] instead
    float2 * meta;  // of several parts: maximum and sum of each row of dst, the maximum in units of log2

    int     n_q, n_head, gqa_ratio, n_kv, n_mask_seq;
    int     part0, n_parts;  // block y of the grid makes part part0 + y
    int     nbq1, nbq2, nbk1, nbk2, nbv1, nbv2, nbm1;
    int64_t nbq3, nbk3, nbv3, nbm3;

    float    scale, softcap;  // the scale is divided by the soft cap already; no cap: 0
    float    max_bias, m0, m1;
    uint32_t n_head_log2;

    bool aligned;  // addresses and strides of K and V suit the widest loads
};
