// turbo/prefill-tiles.cuh for Python: see test_lanes_prefill_tiles.py.

#include "lanes_library.h"
#include "turbo/prefill-tiles.cuh"

// tile: head sizes of K and V, queries and heads; all 0 if there is none
LANES_EXPORT const char * lanes_choose_tile(int64_t   DK,
                                            int64_t   DV,
                                            int64_t   n_q,
                                            int64_t   gqa_ratio,
                                            bool      softcap,
                                            int64_t   max_columns,
                                            int64_t   max_head,
                                            int64_t * tile) {
    return lanes::guarded([&] {
        const turbo_mma_tile chosen =
            turbo_mma_choose({ int(DK), int(DV), int(n_q), int(gqa_ratio), softcap, int(max_columns), int(max_head) });
        const int64_t fields[] = { chosen.DK, chosen.DV, chosen.ncols1, chosen.ncols2 };
        std::copy(std::begin(fields), std::end(fields), tile);
    });
}
