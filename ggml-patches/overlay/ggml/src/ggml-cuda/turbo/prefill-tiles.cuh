#pragma once

// Slices on matrix cores: for which tiles upstream's kernel is compiled, and which of them serves a slice. Few, since each takes some
// seconds to compile; a slice that none serves goes to the tile kernel. Of 576/512 there is none: upstream's kernel takes V from K there, and
// models with such a cache are refused.

// A tile: head sizes of K and V, queries, and query heads, which share a KV head. 64 columns; 32 for few queries, for Turing, whose
// kernel has no more, and for large heads on AMD, whose kernel needs a group of heads.
#ifdef GGML_USE_HIP
#    define TURBO_MMA_SMALL_TILES_X(X) \
        X(64, 64, 16, 4)               \
        X(64, 64, 32, 2)               \
        X(96, 96, 16, 4)               \
        X(96, 96, 32, 2)               \
        X(128, 128, 16, 4)             \
        X(128, 128, 32, 2)
#    define TURBO_MMA_LARGE_TILES_X(X) \
        X(192, 128, 8, 8)              \
        X(256, 256, 16, 4)             \
        X(256, 256, 32, 2)             \
        X(512, 512, 8, 4)
#else
#    define TURBO_MMA_SMALL_TILES_X(X) \
        X(64, 64, 8, 4)                \
        X(64, 64, 16, 4)               \
        X(64, 64, 64, 1)               \
        X(96, 96, 8, 4)                \
        X(96, 96, 16, 4)               \
        X(96, 96, 64, 1)               \
        X(128, 128, 8, 4)              \
        X(128, 128, 16, 4)             \
        X(128, 128, 64, 1)
#    define TURBO_MMA_LARGE_TILES_X(X) \
        X(192, 128, 4, 8)              \
        X(192, 128, 8, 8)              \
        X(256, 256, 8, 4)              \
        X(256, 256, 16, 4)             \
        X(256, 256, 64, 1)             \
        X(512, 512, 8, 4)              \
        X(512, 512, 16, 4)
#endif  // GGML_USE_HIP

struct turbo_mma_tile {
    int DK, DV, ncols1, ncols2;  // no tile: 0

    constexpr bool is(const turbo_mma_tile & other) const {
        return DK == other.DK && DV == other.DV && ncols1 == other.ncols1 && ncols2 == other.ncols2;
    }
};

// What decides about the tile of a slice.
struct turbo_mma_need {
    int  DK, DV, n_q;
    int  gqa_ratio;    // 1: heads cannot share a tile
    bool softcap;      // upstream compiles it for some head sizes
    int  max_columns;  // of a tile, on this device
    int  max_head;     // values of a head of K, on this device
};

static constexpr bool turbo_mma_serves(const turbo_mma_tile & tile, const turbo_mma_need & need) {
    const bool softcap = need.DK == 128 || need.DK == 256 || need.DK == 512;
    return tile.DK == need.DK && tile.DV == need.DV && need.gqa_ratio % tile.ncols2 == 0 &&
           tile.ncols1 * tile.ncols2 <= need.max_columns && need.DK <= need.max_head && (softcap || !need.softcap);
}

// More heads share what is read of K and V; then no more queries than there are, but all in one tile.
static constexpr bool turbo_mma_is_better(const turbo_mma_tile & a, const turbo_mma_tile & b, const int n_q) {
    if (a.ncols2 != b.ncols2) {
        return a.ncols2 > b.ncols2;
    }
    return a.ncols1 >= n_q && b.ncols1 >= n_q ? a.ncols1 < b.ncols1 : a.ncols1 > b.ncols1;
}

static inline turbo_mma_tile turbo_mma_choose(const turbo_mma_need & need) {
    constexpr turbo_mma_tile tiles[] = {
#define TURBO_MMA_TILE(DK, DV, ncols1, ncols2) { DK, DV, ncols1, ncols2 },
        TURBO_MMA_SMALL_TILES_X(TURBO_MMA_TILE) TURBO_MMA_LARGE_TILES_X(TURBO_MMA_TILE)
#undef TURBO_MMA_TILE
    };
    turbo_mma_tile best = {};
    for (const turbo_mma_tile & tile : tiles) {
        if (turbo_mma_serves(tile, need) && (best.DK == 0 || turbo_mma_is_better(tile, best, need.n_q))) {
            best = tile;
        }
    }
    return best;
}
