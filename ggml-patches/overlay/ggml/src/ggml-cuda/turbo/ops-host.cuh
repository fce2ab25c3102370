#pragma once

// What the host tells kernels about tensors that they write or read: turbo-ops.cu, turbo-write.cu.

#include "base.cuh"
#include "view.cuh"

#define TURBO_OPS_THREADS 128

// What a kernel copies from where to where.
struct turbo_transfer {
    const char * src;
    char *       dst;
    turbo_view   src_view;
    turbo_view   dst_view;
    uint32_t     n_blocks;
    cudaStream_t stream;
};

// values: of a block
static inline turbo_view turbo_make_view(ggml_type type, const int64_t ne[4], const size_t nb[4], int64_t values) {
    turbo_view view;
    view.ne0   = init_fastdiv_values((uint64_t) (ne[0] / values));
    view.ne1   = init_fastdiv_values((uint64_t) ne[1]);
    view.ne2   = init_fastdiv_values((uint64_t) ne[2]);
    view.nb0   = (int64_t) nb[0] * (ggml_is_turbo(type) ? 1 : values);
    view.nb1   = (int64_t) nb[1];
    view.nb2   = (int64_t) nb[2];
    view.nb3   = (int64_t) nb[3];
    view.value = (int64_t) nb[0];
    return view;
}

static inline uint32_t turbo_count_blocks(const int64_t ne[4], int64_t values) {
    return (uint32_t) (ne[0] / values * ne[1] * ne[2] * ne[3]);
}

static inline turbo_transfer turbo_make_transfer(const ggml_tensor * src,
                                                 const ggml_tensor * dst,
                                                 const int64_t       counted[4],
                                                 cudaStream_t        stream) {
    const int64_t  values = turbo_block_values(ggml_is_turbo(src->type) ? src->type : dst->type);
    turbo_transfer t;
    t.n_blocks = turbo_count_blocks(counted, values);
    t.stream   = stream;
    if (t.n_blocks > 0) {
        t.src      = (const char *) src->data;
        t.dst      = (char *) dst->data;
        t.src_view = turbo_make_view(src->type, src->ne, src->nb, values);
        t.dst_view = turbo_make_view(dst->type, dst->ne, dst->nb, values);
    }
    return t;
}

static inline dim3 turbo_grid(uint64_t lanes) {
    return dim3((unsigned) ((lanes + TURBO_OPS_THREADS - 1) / TURBO_OPS_THREADS));
}

static inline turbo_by_index turbo_make_index(const ggml_tensor * indices) {
    turbo_by_index by_index;
    by_index.indices = (const char *) indices->data;
    by_index.is_i64  = indices->type == GGML_TYPE_I64;
    by_index.ne1     = init_fastdiv_values((uint64_t) indices->ne[1]);
    by_index.ne2     = init_fastdiv_values((uint64_t) indices->ne[2]);
    by_index.nb0     = (int64_t) indices->nb[0];
    by_index.nb1     = (int64_t) indices->nb[1];
    by_index.nb2     = (int64_t) indices->nb[2];
    return by_index;
}

// Calls function with the turbo type as a constant.
template <typename F> static void turbo_with_type(ggml_type type, F function) {
    switch (type) {
#define TURBO_CALL(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                           \
        return function(std::integral_constant<ggml_type, GGML_TYPE_##ENUM>());
        GGML_TURBO_TYPES_X(TURBO_CALL)
#undef TURBO_CALL
        default:
            GGML_ABORT("not a turbo type: %d", (int) type);
    }
}
