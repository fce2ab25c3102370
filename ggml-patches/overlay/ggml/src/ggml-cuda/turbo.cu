#include "turbo/base.cuh"
#include "turbo/ops.cuh"
#include "turbo/turbo.cuh"

bool ggml_cuda_turbo_ops(void) {
    return true;
}

bool ggml_cuda_turbo_is_operand(const ggml_tensor * op) {
    bool is_operand = ggml_is_turbo(op->type) || ggml_turbo_flash_attn_has_segment(op);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        is_operand = is_operand || (op->src[i] && ggml_is_turbo(op->src[i]->type));
    }
    return is_operand;
}

//
// supported ops
//

static bool turbo_is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// The kernels count blocks in 31 bits and want whole blocks in each row. Blocks of a row that are not neighbours: a view that nothing makes.
// type: of the blocks
static bool turbo_has_rows_of_blocks(const ggml_tensor * t, ggml_type type) {
    const int64_t values = turbo_block_values(type);
    return t->ne[0] % values == 0 && ggml_nelements(t) / values <= INT32_MAX &&
           (!ggml_is_turbo(t->type) || t->nb[0] == ggml_type_size(t->type));
}

static bool turbo_supports_set_rows(const ggml_tensor * dst) {
    const ggml_tensor * src     = dst->src[0];
    const ggml_tensor * indices = dst->src[1];
    return ggml_is_turbo(dst->type) && (src->type == GGML_TYPE_F32 || src->type == GGML_TYPE_F16) &&
           (indices->type == GGML_TYPE_I32 || indices->type == GGML_TYPE_I64) &&
           turbo_has_rows_of_blocks(src, dst->type) && turbo_has_rows_of_blocks(dst, dst->type);
}

static bool turbo_supports_get_rows(const ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    return ggml_is_turbo(src->type) && dst->type == GGML_TYPE_F32 && dst->src[1]->type == GGML_TYPE_I32 &&
           turbo_has_rows_of_blocks(src, src->type) && turbo_has_rows_of_blocks(dst, src->type);
}

static bool turbo_supports_copy(const ggml_tensor * src, const ggml_tensor * dst) {
    const bool types =
        src->type == dst->type || (ggml_is_turbo(dst->type) ? turbo_is_float(src->type) : turbo_is_float(dst->type));
    const ggml_type type = ggml_is_turbo(dst->type) ? dst->type : src->type;
    return types && turbo_has_rows_of_blocks(src, type) && turbo_has_rows_of_blocks(dst, type);
}

bool ggml_cuda_turbo_supports_op(int device, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_SET_ROWS:
            return turbo_supports_set_rows(op);
        case GGML_OP_GET_ROWS:
            return turbo_supports_get_rows(op);
        case GGML_OP_DUP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            return turbo_supports_copy(op->src[0], op);
        case GGML_OP_MAP_CUSTOM1:
            return ggml_turbo_is_decay(op) && turbo_has_rows_of_blocks(op, op->type);
        case GGML_OP_FLASH_ATTN_EXT:
            return ggml_cuda_turbo_flash_attn_supported(device, op);
        default:
            return false;
    }
}

//
// dispatch
//

bool ggml_cuda_turbo_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!ggml_cuda_turbo_is_operand(dst)) {
        return false;
    }
    switch (dst->op) {
        case GGML_OP_SET_ROWS:
            ggml_cuda_turbo_set_rows(ctx, dst);
            return true;
        case GGML_OP_GET_ROWS:
            ggml_cuda_turbo_get_rows(ctx, dst);
            return true;
        case GGML_OP_DUP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            ggml_cuda_turbo_copy(ctx, dst->src[0], dst);
            return true;
        case GGML_OP_MAP_CUSTOM1:
            ggml_cuda_turbo_decay(ctx, dst);
            return true;
        case GGML_OP_FLASH_ATTN_EXT:
            ggml_cuda_turbo_flash_attn(ctx, dst);
            return true;
        default:
            return false;
    }
}
