// Stands in for upstream's header of the same name: what our GPU sources and their tests need of it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define GGML_API        extern
#define GGML_RESTRICT   __restrict__
#define GGML_MAX_DIMS   4
#define GGML_UNUSED(x)  (void) (x)
#define GGML_PAD(x, n)  (((x) + (n) - 1) / (n) * (n))
#define MIN(a, b)       ((a) < (b) ? (a) : (b))
#define MAX(a, b)       ((a) > (b) ? (a) : (b))
#define GGML_ABORT(...) (fprintf(stderr, __VA_ARGS__), abort())
#define GGML_ASSERT(x)                                                             \
    do {                                                                           \
        if (!(x)) {                                                                \
            GGML_ABORT("%s:%d: GGML_ASSERT(%s) failed\n", __FILE__, __LINE__, #x); \
        }                                                                          \
    } while (0)

template <typename... Args> void lanes_unused(const Args &...) {}

#define GGML_UNUSED_VARS(...) lanes_unused(__VA_ARGS__)

enum ggml_type {

#include "ggml-turbo-enum.inc"
    GGML_TYPE_F32  = 0,
    GGML_TYPE_F16  = 1,
    GGML_TYPE_Q4_0 = 2,
    GGML_TYPE_Q4_1 = 3,
    GGML_TYPE_Q5_0 = 6,
    GGML_TYPE_Q5_1 = 7,
    GGML_TYPE_Q8_0 = 8,
    GGML_TYPE_I32  = 26,
    GGML_TYPE_I64  = 27,
    GGML_TYPE_BF16 = 30,
};
#include "ggml-turbo-types.h"

typedef uint16_t ggml_fp16_t;

enum ggml_op {
    GGML_OP_NONE,
    GGML_OP_DUP,
    GGML_OP_CPY,
    GGML_OP_CONT,
    GGML_OP_RESHAPE,
    GGML_OP_VIEW,
    GGML_OP_PERMUTE,
    GGML_OP_TRANSPOSE,
    GGML_OP_GET_ROWS,
    GGML_OP_SET_ROWS,
    GGML_OP_MUL_MAT,
    GGML_OP_FLASH_ATTN_EXT,
    GGML_OP_MAP_CUSTOM1,
};

#define GGML_MAX_SRC 10

struct ggml_tensor {
    ggml_type     type;
    int64_t       ne[GGML_MAX_DIMS];
    size_t        nb[GGML_MAX_DIMS];
    ggml_op       op;
    int32_t       op_params[16];
    ggml_tensor * src[GGML_MAX_SRC];
    void *        data;
    ggml_tensor * view_src;
    int32_t       flags;
};

#define GGML_TENSOR_FLAG_COMPUTE 16

inline int64_t ggml_nrows(const ggml_tensor * t) {
    return t->ne[1] * t->ne[2] * t->ne[3];
}

inline void ggml_set_op_params_i32(ggml_tensor * t, int i, int32_t value) {
    t->op_params[i] = value;
}

inline int64_t ggml_nelements(const ggml_tensor * t) {
    return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
}

inline bool ggml_is_empty(const ggml_tensor * t) {
    return ggml_nelements(t) == 0;
}

size_t ggml_nbytes(const ggml_tensor * t);

// of a block, or of one value
size_t       ggml_type_size(ggml_type type);
int64_t      ggml_blck_size(ggml_type type);
const char * ggml_type_name(ggml_type type);
