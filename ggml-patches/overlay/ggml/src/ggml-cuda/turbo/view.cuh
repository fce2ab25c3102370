#pragma once

// Where the blocks of a tensor are, and how values are read and written there.

#include "ggml-cuda/common.cuh"

//
// places
//

// Block i0 of row i1 of matrix i2, i3.
struct turbo_place {
    uint32_t i0, i1, i2, i3;
};

// A tensor in blocks of as many values as a block of the turbo type has. value: distance of two values of a block in bytes, if they are floats.
struct turbo_view {
    uint3   ne0, ne1, ne2;  // for fast_div_modulo
    int64_t nb0, nb1, nb2, nb3;
    int64_t value;

    __device__ __forceinline__ turbo_place place(uint32_t i_block) const {
        const uint2 row    = fast_div_modulo(i_block, ne0);
        const uint2 matrix = fast_div_modulo(row.x, ne1);
        const uint2 outer  = fast_div_modulo(matrix.x, ne2);
        return { row.y, matrix.y, outer.y, outer.x };
    }

    __device__ __forceinline__ int64_t offset(const turbo_place & p) const {
        return p.i0 * nb0 + p.i1 * nb1 + p.i2 * nb2 + p.i3 * nb3;
    }
};

// Rows by index. The tensor of indices is repeated over dimensions 2 and 3.
struct turbo_by_index {
    const char * indices;
    bool         is_i64;
    uint3        ne1, ne2;
    int64_t      nb0, nb1, nb2;

    __device__ __forceinline__ turbo_place place(const turbo_view &, uint32_t, const turbo_place & p) const {
        const char * index = indices + p.i1 * nb0 + fastmodulo(p.i2, ne1) * nb1 + fastmodulo(p.i3, ne2) * nb2;
        return { p.i0, is_i64 ? (uint32_t) * (const int64_t *) index : *(const uint32_t *) index, p.i2, p.i3 };
    }
};

// The same block, counted in the other shape.
struct turbo_in_order {
    __device__ __forceinline__ turbo_place place(const turbo_view & other,
                                                 uint32_t           i_block,
                                                 const turbo_place &) const {
        return other.place(i_block);
    }
};

//
// floats
//

static __device__ __forceinline__ float turbo_read(const float * x) {
    return *x;
}

static __device__ __forceinline__ float turbo_read(const half * x) {
    return __half2float(*x);
}

static __device__ __forceinline__ float turbo_read(const nv_bfloat16 * x) {
    return __bfloat162float(*x);
}

static __device__ __forceinline__ void turbo_write(float * y, float x) {
    *y = x;
}

static __device__ __forceinline__ void turbo_write(half * y, float x) {
    *y = __float2half(x);
}

static __device__ __forceinline__ void turbo_write(nv_bfloat16 * y, float x) {
    *y = __float2bfloat16(x);
}

template <typename T> struct alignas(4 * sizeof(T)) turbo_four {
    T v[4];
};

// Four values, value bytes apart, or as one where they are neighbours and aligned.
template <typename T>
static __device__ __forceinline__ void turbo_write4(char * y, int64_t value, bool as_one, const float x[4]) {
    turbo_four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        turbo_write(four.v + i, x[i]);
    }
    if (as_one) {
        *(turbo_four<T> *) y = four;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        *(T *) (y + i * value) = four.v[i];
    }
}
