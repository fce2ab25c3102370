// Operations of a graph: decay, and a second segment of attention.

#include "ggml-impl.h"
#include "turbo/scalar.h"

#include <string.h>

//
// decay
//

// For the CPU backend. A share of the blocks for each task: the tensor is contiguous, so its rows are decayed as one.
static void decay_task(struct ggml_tensor * dst, const struct ggml_tensor * a, int ith, int nth, void * userdata) {
    const int64_t n_blocks = ggml_nelements(dst) / QK_SCALAR;
    const int64_t first    = n_blocks * ith / nth;
    const int64_t end      = n_blocks * (ith + 1) / nth;
    ggml_turbo_decay_row(dst->type, ggml_turbo_get_scale(), (char *) dst->data + first * (int64_t) dst->nb[0],
                         (end - first) * QK_SCALAR);

    GGML_UNUSED(a);  // the memory of dst
    GGML_UNUSED(userdata);
}

struct ggml_tensor * ggml_turbo_decay(struct ggml_context * ctx, struct ggml_tensor * a) {
    GGML_ASSERT(ggml_turbo_decays(a->type));
    GGML_ASSERT(ggml_is_contiguous(a));

    return ggml_map_custom1_inplace(ctx, a, decay_task, GGML_N_TASKS_MAX, NULL);
}

bool ggml_turbo_is_decay(const struct ggml_tensor * op) {
    if (op->op != GGML_OP_MAP_CUSTOM1) {
        return false;
    }
    struct ggml_map_custom1_op_params params;
    memcpy(&params, op->op_params, sizeof(params));
    return params.fun == decay_task;
}

//
// attention over two segments of keys
//

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
