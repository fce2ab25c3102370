// Slices on matrix cores: the instances for heads above 128.

#include "turbo/prefill-mma.cuh"

void ggml_cuda_turbo_prefill_mma_large(ggml_backend_cuda_context & ctx,
                                       turbo_slice &               slice,
                                       const turbo_mma_tile &      tile);

TURBO_MMA_LARGE_TILES_X(TURBO_MMA_INSTANCE)

void ggml_cuda_turbo_prefill_mma_large(ggml_backend_cuda_context & ctx,
                                       turbo_slice &               slice,
                                       const turbo_mma_tile &      tile) {
    TURBO_MMA_LARGE_TILES_X(TURBO_MMA_CALL)
    GGML_ABORT("no tile for this slice");
}
