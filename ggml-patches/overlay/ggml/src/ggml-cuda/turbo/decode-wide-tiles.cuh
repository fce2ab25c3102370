#pragma once

// The loop over tiles of keys in decode kernels for wide heads with AMD's matrix instructions: of warps (decode-wmma-wide.cuh), and of CDNA3's
// waves (decode-mfma-wide.cuh).

#include "decode-wide-scores.cuh"
#include "decode-wide.cuh"

#ifdef TURBO_WMMA

// Of the tiles it, it + step, .. < n_tiles those with a key that a query sees, by all units of a block.
//
//     warp    state of the unit: turbo_wmma_wide_warp, or turbo_mfma_wide_wave
//     cols    what its load_mask and read_scores know of columns
//     full    all keys of the tiles are there, and rows suit vectors
template <bool full, typename warp_t, typename cols_t>
static __device__ __forceinline__ void turbo_wide_tiles(warp_t &                warp,
                                                        const turbo_attn_args & a,
                                                        const cols_t &          cols,
                                                        const turbo_wide_unit & unit,
                                                        int                     it,
                                                        const int               step,
                                                        const int               n_tiles) {
    using shape = typename warp_t::shape;
    using mask  = typename warp_t::mask;

    constexpr bool V_apart = shape::V_at > 0;  // rows of V have room beside scores, and rows of K

    typename shape::template stream_K<full> stream_K(a, unit.K, a.nbk1, unit.rows);
    typename shape::template stream_V<full> stream_V(a, unit.V, a.nbv1, unit.rows + shape::V_at);
    typename shape::stream_rest             stream_rest(a, unit.K_rest, a.nbk1, unit.rest);

    const auto put_K = [&](const int key0) {
        stream_K.put(key0);
        if (shape::parts::has_rest(unit.number, key0 / shape::tile)) {
            stream_rest.put(key0);
        }
    };

    const auto load_mask = [&](const int i) {
        return warp.template load_mask<full>(a, cols, min(i, n_tiles - 1) * shape::tile);
    };
    // From tile i on, with its mask: the same in all units.
    const auto to_visible = [&](int i, mask & m) {
        while (i < n_tiles && !__any_sync(0xffffffff, m.visible)) {
            i += step;
            m = load_mask(i);
        }
        return i;
    };

    if (it >= n_tiles) {
        return;
    }
    mask m = load_mask(it);
    it     = to_visible(it, m);
    if (it >= n_tiles) {
        return;
    }
    warp.sync();
    stream_K.start(it * shape::tile);
    put_K(it * shape::tile);
    stream_V.start(it * shape::tile);
    while (it < n_tiles) {
        const int key0 = it * shape::tile;

        const mask next = load_mask(it + step);
        warp.sync();
        turbo_wide_clear_scores(warp.s);
        warp.template multiply_keys<0>(stream_K.at(key0), unit.Q, unit.Q_d);
        if (shape::parts::has_rest(unit.number, it)) {
            typename warp_t::rest rest;
            turbo_wide_copy_scores(rest.s, warp.s);
            rest.template multiply_keys<0>(stream_rest.at(key0), unit.Q_rest, unit.Q_d_rest);
            turbo_wide_copy_scores(warp.s, rest.s);
        }
        warp.sync();
        shape::scores::write(unit.scores, warp.s, unit.number, warp.lane());
        if constexpr (V_apart) {
            stream_V.put(key0);
        }
        __syncthreads();
        warp.template read_scores<full>(a, cols, m, key0, unit.scores);
        if constexpr (!V_apart) {
            __syncthreads();
            stream_V.put(key0);
        }

        m                   = next;
        it                  = to_visible(it + step, m);
        // behind the last tile it is loaded again in vain
        const int next_key0 = it < n_tiles ? it * shape::tile : key0;
        stream_K.start(next_key0);

        const bool any = warp.softmax(unit);
        if constexpr (V_apart) {
            __syncthreads();
        } else {
            warp.sync();
        }
        if (any) {
            warp.add_values(stream_V.at(key0), unit);
        }
        warp.sync();
        put_K(next_key0);
        stream_V.start(next_key0);
    }
}

// All tiles of a block: whole ones first, then the last, if it is not whole.
template <typename warp_t, typename cols_t>
static __device__ __forceinline__ void turbo_wide_all_tiles(warp_t &                warp,
                                                            const turbo_attn_args & a,
                                                            const cols_t &          cols,
                                                            const turbo_wide_unit & unit) {
    using shape = typename warp_t::shape;

    const int it      = blockIdx.y;
    const int step    = gridDim.y;
    const int n_full  = shape::parts::aligned && a.aligned ? a.n_kv / shape::tile : 0;
    const int n_tiles = (a.n_kv + shape::tile - 1) / shape::tile;

    if constexpr (shape::parts::aligned) {
        turbo_wide_tiles<true>(warp, a, cols, unit, it, step, n_full);
    }
    if (n_full < n_tiles) {
        const int it_rest = it >= n_full ? it : it + (n_full - it + step - 1) / step * step;
        turbo_wide_tiles<false>(warp, a, cols, unit, it_rest, step, n_tiles);
    }
}

#endif  // TURBO_WMMA
