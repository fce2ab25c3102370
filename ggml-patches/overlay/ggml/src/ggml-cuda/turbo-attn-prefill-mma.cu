// Slices on matrix cores: which tile serves one, and the instances for heads up to 128.

#include "turbo/prefill-mma.cuh"

TURBO_MMA_SMALL_TILES_X(TURBO_MMA_INSTANCE)

// The instances of turbo-attn-prefill-mma-large.cu.
void ggml_cuda_turbo_prefill_mma_large(ggml_backend_cuda_context & ctx,
                                       turbo_slice &               slice,
                                       const turbo_mma_tile &      tile);

// Upstream's conditions for heads that share a tile.
static bool turbo_mma_shares_heads(const turbo_slice & slice) {
    const ggml_tensor * mask = slice.src[3];
    return mask && turbo_attn_params_of(&slice).max_bias == 0.0f && slice.src[1]->ne[1] % FATTN_KQ_STRIDE == 0 &&
           mask->nb[1] % 16 == 0;
}

static turbo_mma_tile turbo_mma_tile_of(const int device, const turbo_slice & slice) {
    const int cc = ggml_cuda_info().devices[device].cc;

    turbo_mma_need need;
    need.DK          = slice.src[0]->ne[0];
    need.DV          = slice.ne[0];
    need.n_q         = slice.src[0]->ne[1];
    need.gqa_ratio   = turbo_mma_shares_heads(slice) ? slice.src[0]->ne[2] / slice.src[1]->ne[2] : 1;
    need.softcap     = turbo_attn_params_of(&slice).softcap != 0.0f;
    need.max_columns = 64;
    need.max_head    = 512;
#ifdef GGML_USE_HIP
    if (amd_wmma_available(cc)) {
        need.max_head = 256;
    } else if (!amd_mfma_available(cc)) {
        return {};
    }
#else
    if (ggml_cuda_highest_compiled_arch(cc) == GGML_CUDA_CC_TURING) {
        need.max_columns = 32;
    }
    if (!volta_mma_available(cc) && !turing_mma_available(cc)) {
        return {};
    }
#endif  // GGML_USE_HIP
    return turbo_mma_choose(need);
}

bool ggml_cuda_turbo_prefill_mma_supported(const int device, const turbo_slice & slice) {
    // parts need two steps over the keys, of at most so many each
    if (slice.src[1]->ne[1] <= FATTN_KQ_STRIDE && !(slice.first && slice.last)) {
        return false;
    }
    return turbo_mma_tile_of(device, slice).DK != 0;
}

void ggml_cuda_turbo_prefill_mma(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    const turbo_mma_tile tile = turbo_mma_tile_of(ctx.device, slice);
    TURBO_MMA_SMALL_TILES_X(TURBO_MMA_CALL)
    ggml_cuda_turbo_prefill_mma_large(ctx, slice, tile);
}
