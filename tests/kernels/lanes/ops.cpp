// turbo.cu, turbo-ops.cu, turbo-unpack.cu and turbo-write.cu for Python: see test_lanes_ops.py and test_lanes_write.py.

#include "lanes_library.h"
#include "turbo-ops.cu"
#include "turbo-unpack.cu"
#include "turbo-write.cu"
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
            ggml_cuda_turbo_to_f16(x->type, data, static_cast<half *>(y), x->ne, x->nb, x->ne[1], nullptr);
        } else {
            ggml_cuda_turbo_to_f32(x->type, data, static_cast<float *>(y), x->ne, x->nb, nullptr);
        }
    });
}

// is_slice: whether x is a slice of a KV cache. Only then y is written.
LANES_EXPORT const char * lanes_unpack_slice(const ggml_tensor * x, void * y, int64_t * is_slice) {
    return lanes::guarded([&] {
        const char * data = static_cast<const char *>(x->data);
        *is_slice = ggml_cuda_turbo_unpack(x->type, data, static_cast<half *>(y), x->ne, x->nb, x->ne[1], nullptr);
    });
}

// y: n_rows rows for each head, of which those of x are written.
LANES_EXPORT const char * lanes_to_f16_rows(const ggml_tensor * x, void * y, int64_t n_rows) {
    return lanes::guarded([&] {
        const char * data = static_cast<const char *>(x->data);
        ggml_cuda_turbo_to_f16(x->type, data, static_cast<half *>(y), x->ne, x->nb, n_rows, nullptr);
    });
}

// is_aligned: only then rows are copied.
LANES_EXPORT const char * lanes_copy_rows(const ggml_tensor * src,
                                          const ggml_tensor * dst,
                                          const ggml_tensor * src2,
                                          const ggml_tensor * dst2,
                                          int64_t *           is_aligned) {
    return lanes::guarded([&] { *is_aligned = ggml_cuda_turbo_copy_rows({ { src, dst }, { src2, dst2 } }, nullptr); });
}

// As upstream's loop over the nodes of a graph does it. A copy of floats stands for any op that isn't ours.
//   n_sm:       multiprocessors: up to three blocks of threads on each, rows are few
//   concurrent: upstream runs parts of the graph on several streams
//   launches:   of our kernels
LANES_EXPORT const char * lanes_run_graph(ggml_tensor ** nodes,
                                          int64_t        n,
                                          int64_t        n_sm,
                                          bool           concurrent,
                                          int64_t *      launches) {
    return lanes::guarded([&] {
        lanes::device.info.devices[0].nsm = static_cast<int>(n_sm);
        const int64_t             before  = lanes::launches;
        const ggml_cgraph         graph   = { static_cast<int>(n), nodes };
        ggml_backend_cuda_context ctx;
        if (concurrent) {
            ctx.stream_context().concurrent_events[nodes[0]] = 1;
        }
        for (int i = 0; i < graph.n_nodes; ++i) {
            ggml_tensor * node = nodes[i];
            if (turbo_computes_nothing(node) || !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                continue;
            }
            if (const int n_next = ggml_cuda_turbo_fuse(ctx, &graph, i)) {
                i += n_next;
                continue;
            }
            if (!ggml_cuda_turbo_compute_forward(ctx, node)) {
                memcpy(node->data, node->src[0]->data, ggml_nbytes(node));
            }
        }
        *launches                         = lanes::launches - before;
        lanes::device.info.devices[0].nsm = 132;
    });
}
