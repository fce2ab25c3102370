// Decay as an operation of a graph: what needs more of ggml than the codecs in ggml-turbo.c do.

#include "ggml-impl.h"
#include "ggml-turbo.h"

#include <string.h>

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
