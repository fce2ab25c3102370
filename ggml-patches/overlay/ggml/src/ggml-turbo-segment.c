// Attention over two segments of keys, as an operation of a graph.

#include "ggml-impl.h"
#include "ggml-turbo.h"

enum { SRC_K = 5, SRC_V = 6, SRC_MASK = 7 };

void ggml_turbo_flash_attn_add_segment(struct ggml_tensor * a,
                                       struct ggml_tensor * k,
                                       struct ggml_tensor * v,
                                       struct ggml_tensor * mask) {
    GGML_ASSERT(a->op == GGML_OP_FLASH_ATTN_EXT);
    GGML_ASSERT(a->src[3] && !a->src[SRC_K] && !a->src[SRC_V] && !a->src[SRC_MASK]);

    const struct ggml_tensor * first_k = a->src[1];
    const struct ggml_tensor * first_v = a->src[2];
    GGML_ASSERT(k->ne[0] == first_k->ne[0] && k->ne[2] == first_k->ne[2] && k->ne[3] == first_k->ne[3]);
    GGML_ASSERT(v->ne[0] == first_v->ne[0] && v->ne[2] == first_v->ne[2] && v->ne[3] == first_v->ne[3]);
    GGML_ASSERT(k->ne[1] == v->ne[1] && k->ne[1] == mask->ne[0]);

    const struct ggml_tensor * q = a->src[0];
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && ggml_is_contiguous(mask));
    GGML_ASSERT(mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 && q->ne[3] % mask->ne[3] == 0);

    a->src[SRC_K]    = k;
    a->src[SRC_V]    = v;
    a->src[SRC_MASK] = mask;
}

bool ggml_turbo_flash_attn_has_segment(const struct ggml_tensor * op) {
    return op->op == GGML_OP_FLASH_ATTN_EXT && op->src[SRC_K] != NULL;
}
