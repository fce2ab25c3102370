#pragma once

// The loop over tiles of keys in decode kernels with AMD's matrix instructions: of warps (decode-wmma.cuh), of CDNA3's waves (decode-mfma.cuh),
// and of both with wide heads (decode-wide-tiles.cuh).

#include "wmma-stream.cuh"

#ifdef TURBO_WMMA

// Of the tiles it, it + step, .. < n_tiles those with a key that a query sees.
//
//     steps    what is done with one: turbo_steps by a warp or a wave, turbo_wide_steps by all of a block
template <typename steps_t>
static __device__ __forceinline__ void turbo_tiles(steps_t & steps, int it, const int step, const int n_tiles) {
    using shape = typename steps_t::shape;
    using mask  = typename steps_t::mask;

    const auto load_mask = [&](const int i) {
        return steps.load_mask(min(i, n_tiles - 1) * shape::tile);
    };
    // From tile i on, with its mask. Tiles of which no query sees a key are passed over before anything of them is loaded.
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
    steps.warp.sync();
    steps.K.start(it * shape::tile);
    steps.put_K(it * shape::tile);
    steps.V.start(it * shape::tile);
    while (it < n_tiles) {
        const int key0 = it * shape::tile;

        const mask next = load_mask(it + step);
        steps.warp.sync();
        steps.score(m, key0);

        m                   = next;
        it                  = to_visible(it + step, m);
        // behind the last tile it is loaded again in vain
        const int next_key0 = it < n_tiles ? it * shape::tile : key0;
        steps.K.start(next_key0);

        if (steps.softmax()) {
            steps.add_values(key0);
        }
        steps.warp.sync();
        steps.put_K(next_key0);
        steps.V.start(next_key0);
    }
}

// Of the tiles it, it + step, .. all: whole ones first, then the last, if it is not whole. Other arguments: what steps are made of.
template <template <bool, typename> class steps_t, typename warp_t, typename cols_t, typename unit_t>
static __device__ __forceinline__ void turbo_all_tiles(warp_t &                warp,
                                                       const turbo_attn_args & a,
                                                       const cols_t &          cols,
                                                       const unit_t &          unit,
                                                       const int               it,
                                                       const int               step) {
    using shape = typename warp_t::shape;

    const int n_full  = shape::aligned && a.aligned ? a.n_kv / shape::tile : 0;
    const int n_tiles = (a.n_kv + shape::tile - 1) / shape::tile;

    if constexpr (shape::aligned) {
        steps_t<true, warp_t> steps = { warp, a, cols, unit };
        turbo_tiles(steps, it, step, n_full);
    }
    if (n_full < n_tiles) {
        steps_t<false, warp_t> steps   = { warp, a, cols, unit };
        const int              it_rest = it >= n_full ? it : it + (n_full - it + step - 1) / step * step;
        turbo_tiles(steps, it_rest, step, n_tiles);
    }
}

// What a warp or a wave works on that has tiles of its own: all channels of a head.
struct turbo_unit {
    const char *     K;     // rows
    const char *     V;
    const uint32_t * Q;     // as turbo_columns_load_queries leaves it
    const float *    Q_d;
    uint32_t *       rows;  // shared memory
};

// What it does with a tile. full: all keys are there, and rows suit vectors.
template <bool full, typename warp_t> struct turbo_steps {
    using shape = typename warp_t::shape;
    using mask  = typename warp_t::mask;

    warp_t &                         warp;
    const turbo_attn_args &          a;
    const typename warp_t::columns & cols;
    const turbo_unit &               unit;

    typename shape::template stream_K<full> K = { a, unit.K, a.nbk1, unit.rows };
    typename shape::template stream_V<full> V = { a, unit.V, a.nbv1, unit.rows + shape::V_at };

    __device__ __forceinline__ mask load_mask(const int key0) const {
        return warp.template load_mask<full>(a, cols, key0);
    }

    __device__ __forceinline__ void put_K(const int key0) { K.put(key0); }

    __device__ __forceinline__ void score(const mask & m, const int key0) {
        warp.template score<full>(K.at(key0), a, cols, unit.Q, unit.Q_d, m, key0);
        if constexpr (shape::V_at == 0) {
            warp.sync();  // rows of V come where those of K were
        }
        V.put(key0);
    }

    __device__ __forceinline__ bool softmax() {
        const bool any = warp.softmax(unit.rows + shape::prob_at);
        warp.sync();
        return any;
    }

    __device__ __forceinline__ void add_values(const int key0) {
        warp.add_values(V.at(key0), unit.rows + shape::prob_at, unit.rows);
    }
};

#endif  // TURBO_WMMA
