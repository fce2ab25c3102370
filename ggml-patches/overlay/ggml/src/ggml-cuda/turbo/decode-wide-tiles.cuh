#pragma once

// What decode kernels for wide heads with AMD's matrix instructions do with a tile of keys: warps (decode-wmma-wide.cuh), and CDNA3's waves
// (decode-mfma-wide.cuh).

#include "decode-tiles.cuh"
#include "decode-wide-scores.cuh"
#include "decode-wide.cuh"

#ifdef TURBO_WMMA

// As turbo_steps; all units of a block have each tile together.
template <bool full, typename warp_t> struct turbo_wide_steps {
    using shape = typename warp_t::shape;
    using mask  = typename warp_t::mask;

    static constexpr bool V_apart = shape::V_at > 0;  // rows of V have room beside scores, and rows of K

    warp_t &                         warp;
    const turbo_attn_args &          a;
    const typename warp_t::columns & cols;
    const turbo_wide_unit &          unit;

    typename shape::template stream_K<full> K      = { a, unit.K, a.nbk1, unit.rows };
    typename shape::template stream_V<full> V      = { a, unit.V, a.nbv1, unit.rows + shape::V_at };
    typename shape::stream_rest             K_rest = { a, unit.K_rest, a.nbk1, unit.rest };

    __device__ __forceinline__ bool has_rest(const int key0) const {
        return shape::parts::has_rest(unit.number, key0 / shape::tile);
    }

    // The same in all units.
    __device__ __forceinline__ mask load_mask(const int key0) const {
        return warp.template load_mask<full>(a, cols, key0);
    }

    __device__ __forceinline__ void put_K(const int key0) {
        K.put(key0);
        if (has_rest(key0)) {
            K_rest.put(key0);
        }
    }

    __device__ __forceinline__ void score(const mask & m, const int key0) {
        turbo_wide_clear_scores(warp.s);
        warp.template multiply_keys<0>(K.at(key0), unit.Q, unit.Q_d);
        if (has_rest(key0)) {
            typename warp_t::rest rest;
            turbo_wide_copy_scores(rest.s, warp.s);
            rest.template multiply_keys<0>(K_rest.at(key0), unit.Q_rest, unit.Q_d_rest);
            turbo_wide_copy_scores(warp.s, rest.s);
        }
        warp.sync();
        shape::scores::write(unit.scores, warp.s, unit.number, warp.lane());
        if constexpr (V_apart) {
            V.put(key0);
        }
        __syncthreads();
        warp.template read_scores<full>(a, cols, m, key0, unit.scores);
        if constexpr (!V_apart) {
            __syncthreads();
            V.put(key0);
        }
    }

    __device__ __forceinline__ bool softmax() {
        const bool any = warp.softmax(unit.rows + shape::prob_at);
        if constexpr (V_apart) {
            __syncthreads();
        } else {
            warp.sync();
        }
        return any;
    }

    __device__ __forceinline__ void add_values(const int key0) {
        warp.add_values(V.at(key0), unit.rows + shape::prob_at, unit.rows);
    }
};

#endif  // TURBO_WMMA
