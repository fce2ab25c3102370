#include "attn.h"
#include "entry.h"
#include "fwht.h"
#include "ggml-cpu-impl.h"

#include <algorithm>

//
// GET_ROWS
//

// Rows of a turbo tensor as f32, [n, n_idxs, ...], one index at a time, split over the threads.
static void ggml_turbo_get_rows(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];  // I32

    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(ne0 == ne00);
    GGML_ASSERT(nb0 == sizeof(float));

    const ggml_to_float_t to_float = ggml_get_type_traits(src0->type)->to_float;

    const int64_t nr  = ggml_nelements(src1);
    const int64_t dr  = (nr + params->nth - 1) / params->nth;
    const int64_t ir0 = dr * params->ith;
    const int64_t ir1 = std::min(ir0 + dr, nr);

    for (int64_t ir = ir0; ir < ir1; ++ir) {
        const int64_t i12 = ir / (ne11 * ne10);
        const int64_t i11 = (ir - i12 * ne11 * ne10) / ne10;
        const int64_t i10 = ir - i12 * ne11 * ne10 - i11 * ne10;
        const int64_t i01 = *(const int32_t *) ((const char *) src1->data + i10 * nb10 + i11 * nb11 + i12 * nb12);

        GGML_ASSERT(i01 >= 0 && i01 < ne01);

        to_float((const char *) src0->data + i01 * nb01 + i11 * nb02 + i12 * nb03,
                 (float *) ((char *) dst->data + i10 * nb1 + i11 * nb2 + i12 * nb3), ne00);
    }
}

bool ggml_turbo_cpu_compute_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (dst->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            return ggml_turbo_cpu_attn(params, dst);
        case GGML_OP_MUL_MAT:
            return ggml_turbo_cpu_fwht(params, dst);
        case GGML_OP_GET_ROWS:
            if (ggml_is_turbo(dst->src[0]->type)) {
                ggml_turbo_get_rows(params, dst);
                return true;
            }
            return false;
        default:
            return false;
    }
}

//
// supported ops
//

static bool is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

bool ggml_turbo_cpu_supports_op(const ggml_tensor * op) {
    if (ggml_turbo_flash_attn_has_segment(op)) {
        return ggml_turbo_cpu_attn_supported(op);
    }

    bool has_turbo = ggml_is_turbo(op->type);
    for (const ggml_tensor * src : op->src) {
        has_turbo = has_turbo || (src && ggml_is_turbo(src->type));
    }
    if (!has_turbo) {
        return true;
    }

    const ggml_type type_src = op->src[0] ? op->src[0]->type : GGML_TYPE_COUNT;

    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_SET_ROWS:
            return type_src == GGML_TYPE_F32 || type_src == GGML_TYPE_F16;
        case GGML_OP_GET_ROWS:
            return op->type == GGML_TYPE_F32;
        case GGML_OP_DUP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            return op->type == type_src || (ggml_is_turbo(op->type) ? is_float(type_src) : op->type == GGML_TYPE_F32);
        case GGML_OP_MUL_MAT:
            return ggml_is_turbo(type_src) && op->src[1]->type == GGML_TYPE_F32;
        case GGML_OP_FLASH_ATTN_EXT:
            return op->src[0]->type == GGML_TYPE_F32;
        case GGML_OP_MAP_CUSTOM1:
            return ggml_turbo_is_decay(op);
        default:
            return false;
    }
}

bool ggml_turbo_cpu_ops(void) {
    return true;
}
