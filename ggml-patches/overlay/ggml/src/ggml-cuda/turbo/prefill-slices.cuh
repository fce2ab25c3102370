#pragma once

// How many keys of a cache are unpacked at a time for attention of many queries.

#include "ggml-cuda/fattn-common.cuh"
#include "turbo/env.h"

// f16 scratch of a slice: 32 MiB are 8,192 keys of 8 KV heads of 128. A slice shall stay in the cache of the device until it is read, if
// that is large enough for one at all. With many queries reading hides behind products, and a merge weighs more: it moves all of the result.
// Then 32,768 of those keys are one slice, with the tokens of the prompt that follow them.
static constexpr int64_t TURBO_SLICE_MIB      = 1024 * 1024;
static constexpr int64_t TURBO_SLICE_MIN_KEYS = 1024;

static int64_t turbo_slice_bytes(const int64_t n_q, const int64_t cache_bytes) {
    if (n_q >= 512) {
        return 144 * TURBO_SLICE_MIB;
    }
    const int64_t fit = cache_bytes / 10 * 7;
    return fit < 16 * TURBO_SLICE_MIB ? 32 * TURBO_SLICE_MIB : std::min(fit, 48 * TURBO_SLICE_MIB);
}

// GGML_TURBO_CUDA_SLICE: keys of a slice, for tests; 0 where it is not set.
static int64_t turbo_slice_keys_wanted() {
    const char * env = ggml_turbo_getenv("GGML_TURBO_CUDA_SLICE", "GGML_CUDA_TURBO_SLICE", true);
    return env ? std::max(atoi(env) / FATTN_KQ_STRIDE, 2) * FATTN_KQ_STRIDE : 0;
}

// Bytes of the cache that all multiprocessors share; 0: not known.
static int64_t turbo_cache_bytes(const int device) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    GGML_UNUSED(device);
    return 0;
#else
    int bytes = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
    return bytes;
#endif  // defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
}

// Keys of a slice, all of the same length but for the last. What needs no scratch is one slice.
static int64_t turbo_slice_keys(const int device, const int64_t n_q, const ggml_tensor * K, const ggml_tensor * V) {
    if (K->type == GGML_TYPE_F16 && V->type == GGML_TYPE_F16) {
        return K->ne[1];
    }
    static const int64_t fixed = turbo_slice_keys_wanted();
    if (fixed > 0) {
        return fixed;
    }
    const int64_t bytes  = (K->ne[0] + V->ne[0]) * K->ne[2] * K->ne[3] * sizeof(half);  // of a key
    const int64_t wanted = turbo_slice_bytes(n_q, turbo_cache_bytes(device));
    const int64_t keys   = std::max(wanted / bytes, TURBO_SLICE_MIN_KEYS);
    const int64_t n      = (K->ne[1] + keys - 1) / keys;
    return GGML_PAD((K->ne[1] + n - 1) / n, FATTN_KQ_STRIDE);
}
