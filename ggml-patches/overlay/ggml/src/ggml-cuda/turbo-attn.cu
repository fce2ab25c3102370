// Flash attention with a turbo type as K, as V, or as both, or over two segments of keys: what is supported.

#include "convert.cuh"
#include "turbo/attn-host.cuh"
#include "turbo/attn-ways.cuh"
#include "turbo/list.h"
#include "turbo/turbo.cuh"

static bool turbo_is_head_size(const int64_t DK, const int64_t DV) {
#define TURBO_IS_HEAD_SIZE(K, V) || (DK == K && DV == V)
    return false GGML_TURBO_HEAD_SIZES_X(TURBO_IS_HEAD_SIZE);
#undef TURBO_IS_HEAD_SIZE
}

static bool turbo_has_whole_blocks(const ggml_tensor * t) {
    return t->ne[0] % ggml_blck_size(t->type) == 0;
}

static bool turbo_to_f16_supported(const ggml_type type) {
    return ggml_is_turbo(type) || type == GGML_TYPE_F16 || ggml_get_to_fp16_nc_cuda(type) != nullptr;
}

// f16 rows, aligned for the widest loads, with the shape of the first segment's.
static bool turbo_is_second(const ggml_tensor * second, const ggml_tensor * first) {
    return second && second->type == GGML_TYPE_F16 && second->nb[0] == sizeof(half) && second->ne[0] == first->ne[0] &&
           second->ne[1] > 0 && second->ne[2] == first->ne[2] && second->ne[3] == first->ne[3] &&
           second->nb[1] % 16 == 0 && second->nb[2] % 16 == 0 && second->nb[3] % 16 == 0;
}

static bool turbo_second_kv_supported(const ggml_tensor * dst) {
    const ggml_tensor * Q    = dst->src[0];
    const turbo_kv      kv   = turbo_second_kv(dst);
    const ggml_tensor * mask = kv.mask;

    return dst->src[3] && turbo_is_second(kv.K, dst->src[1]) && turbo_is_second(kv.V, dst->src[2]) &&
           kv.V->ne[1] == kv.K->ne[1] && mask && mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(half) &&
           mask->ne[0] == kv.K->ne[1] && mask->ne[1] >= Q->ne[1] && mask->ne[2] == 1 && Q->ne[3] % mask->ne[3] == 0;
}

bool ggml_cuda_turbo_flash_attn_supported(const int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);
#ifdef FLASH_ATTN_AVAILABLE
    const ggml_tensor * Q    = dst->src[0];
    const ggml_tensor * K    = dst->src[1];
    const ggml_tensor * V    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    // upstream's kernels have the soft cap for some head sizes only
    const float softcap = turbo_attn_params_of(dst).softcap;

    return Q->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && turbo_is_head_size(K->ne[0], V->ne[0]) &&
           turbo_has_whole_blocks(K) && turbo_has_whole_blocks(V) && turbo_to_f16_supported(K->type) &&
           turbo_to_f16_supported(V->type) && Q->nb[0] == sizeof(float) && K->nb[0] == ggml_type_size(K->type) &&
           V->nb[0] == ggml_type_size(V->type) && Q->ne[2] % K->ne[2] == 0 && K->ne[2] == V->ne[2] &&
           K->ne[3] == Q->ne[3] && V->ne[3] == Q->ne[3] &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1)) && (softcap == 0.0f || V->ne[0] >= 128) &&
           (!ggml_turbo_flash_attn_has_segment(dst) || turbo_second_kv_supported(dst));
#else
    GGML_UNUSED(dst);
    return false;
#endif  // FLASH_ATTN_AVAILABLE
}

void ggml_cuda_turbo_flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    ggml_cuda_set_device(ctx.device);
    if (!ggml_cuda_turbo_decode(ctx, dst)) {
        ggml_cuda_turbo_prefill(ctx, dst);
    }
}
