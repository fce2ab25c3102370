#pragma once

// How rows of a cache come into shared memory, for kernels with AMD's matrix instructions: a tile of TURBO_TILE rows by TURBO_WARP lanes.

#include "wmma-rows.cuh"

#ifdef TURBO_WMMA

// The way of one side into the shared memory of a warp. full: all tiles are whole, and aligned for vectors; else rows are copied when needed.
template <ggml_type type, int D, bool full> struct turbo_wmma_stream {
    using tile   = turbo_wmma_tile<type, D>;
    using loader = typename tile::loader;

    static constexpr bool ahead = full && loader::prefetch;

    const turbo_attn_args & a;

    const char * x;
    int          stride;
    uint32_t *   rows;

    __align__(16) uint32_t regs[loader::n_regs];

    __device__ __forceinline__ turbo_wmma_stream(const turbo_attn_args & a,
                                                 const char *            x,
                                                 const int               stride,
                                                 uint32_t *              rows) :
        a(a),
        x(x),
        stride(stride),
        rows(rows) {}

    // Loads are under way.
    __device__ __forceinline__ void start(const int key0) {
        if constexpr (ahead) {
            loader::load(regs, x + (int64_t) key0 * stride, stride);
        }
    }

    // Rows are in shared memory for this lane.
    __device__ __forceinline__ void put(const int key0) {
        const char * src = x + (int64_t) key0 * stride;
        if constexpr (ahead) {
            loader::store(rows, regs);
        } else if constexpr (full && loader::width > 2) {
            loader::template copy<uint32_t, 4>(rows, src, stride, a.n_kv - key0);
        } else {
            loader::template copy<uint16_t, full ? 4 : 1>(rows, src, stride, a.n_kv - key0);
        }
    }

    __device__ __forceinline__ tile at(const int) const { return { rows }; }
};

template <int D, bool full> struct turbo_wmma_stream<GGML_TYPE_F16, D, full> {
    const turbo_attn_args & a;

    const char * x;
    int          stride;

    __device__ __forceinline__ turbo_wmma_stream(const turbo_attn_args & a,
                                                 const char *            x,
                                                 const int               stride,
                                                 uint32_t *) :
        a(a),
        x(x),
        stride(stride) {}

    __device__ __forceinline__ void start(const int) {}

    __device__ __forceinline__ void put(const int) {}

    __device__ __forceinline__ turbo_wmma_tile<GGML_TYPE_F16, D> at(const int key0) const {
        return { x + (int64_t) key0 * stride, stride, a.n_kv - key0 };
    }
};

#endif  // TURBO_WMMA
