// turbo.cu and turbo-ops.cu for Python: see test_lanes_ops.py.

#include "lanes_library.h"
#include "turbo-ops.cu"
#include "turbo.cu"

// of the reference encoder, which is not part of this library
static ggml_turbo_scale scale_rule = GGML_TURBO_SCALE_MATCHED_NORM;

ggml_turbo_scale ggml_turbo_get_scale(void) {
    return scale_rule;
}

#include "type_size.h"

// Upstream's op_params hold a function; those here a flag.
bool ggml_turbo_is_decay(const ggml_tensor * op) {
    return op->op == GGML_OP_MAP_CUSTOM1 && op->op_params[0] != 0;
}

// Flash attention has tests of its own.
bool ggml_turbo_flash_attn_has_segment(const ggml_tensor *) {
    return false;
}

bool ggml_cuda_turbo_flash_attn_supported(int, const ggml_tensor *) {
    return false;
}

void ggml_cuda_turbo_flash_attn(ggml_backend_cuda_context &, ggml_tensor *) {}

LANES_EXPORT const char * lanes_compute(int64_t op, ggml_tensor * dst, int64_t rule) {
    return lanes::guarded([&] {
        dst->op    = static_cast<ggml_op>(op);
        scale_rule = static_cast<ggml_turbo_scale>(rule);
        if (!ggml_cuda_turbo_supports_op(0, dst)) {
            throw std::invalid_argument("not supported");
        }
        ggml_backend_cuda_context ctx;
        if (!ggml_cuda_turbo_compute_forward(ctx, dst)) {
            throw std::invalid_argument("not computed");
        }
    });
}

LANES_EXPORT const char * lanes_to_floats(int64_t type, const ggml_tensor * x, void * y) {
    return lanes::guarded([&] {
        const char * data = static_cast<const char *>(x->data);
        if (type == GGML_TYPE_F16) {
            ggml_cuda_turbo_to_f16(x->type, data, static_cast<half *>(y), x->ne, x->nb, nullptr);
        } else {
            ggml_cuda_turbo_to_f32(x->type, data, static_cast<float *>(y), x->ne, x->nb, nullptr);
        }
    });
}
