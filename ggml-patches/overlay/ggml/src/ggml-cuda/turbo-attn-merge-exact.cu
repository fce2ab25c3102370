// Instances of the kernel that merges the parts of decode attention with a short segment of exact keys.

#include "turbo/attn-host.cuh"
#include "turbo/launch.cuh"
#include "turbo/list.h"
#include "turbo/merge-exact.cuh"

bool ggml_cuda_turbo_merges_exact(const turbo_attn_args & a) {
    return a.n_kv <= TURBO_MERGE_MAX_KEYS && a.aligned;
}

void ggml_cuda_turbo_merge_exact(const turbo_attn_args & a,
                                 const int               DK,
                                 const int               DV,
                                 const int               n_rows,
                                 float *                 dst,
                                 cudaStream_t            stream) {
#define TURBO_HEAD_SIZE(K, V)                                                                 \
    if (DK == K && DV == V) {                                                                 \
        turbo_launch(turbo_attn_merge_exact<K, V>, dim3(n_rows), dim3(V), 0, stream, a, dst); \
        return;                                                                               \
    }
    GGML_TURBO_HEAD_SIZES_X(TURBO_HEAD_SIZE)
#undef TURBO_HEAD_SIZE
    GGML_ABORT("head sizes %d/%d", DK, DV);
}
