#pragma once

// Copying rows of f16 from one place to another: what stands beside unpacked rows for attention of many queries.

#include "ggml-cuda/common.cuh"

static constexpr int TURBO_ROWS_THREADS = 256;
static constexpr int TURBO_ROWS_BYTES   = 16;  // of a thread

// Rows of two tensors of the same shape, in pieces of 16 bytes. Strides in bytes; no stride: repeated.
struct turbo_rows {
    const char * src;
    char *       dst;
    int64_t      src_nb[3], dst_nb[3];  // of rows, matrices, and sequences
    uint3        ne0, ne1, ne2;         // pieces, rows and matrices, for fast_div_modulo
    uint32_t     n;                     // of all pieces
};

// Grid: pieces of the longer copy; a or b.
static __global__ void __launch_bounds__(TURBO_ROWS_THREADS) turbo_copy_rows(const turbo_rows a, const turbo_rows b) {
    ggml_cuda_pdl_sync();
    const turbo_rows r = blockIdx.y == 0 ? a : b;  // a reference would put both into local memory
    const uint32_t   i = blockIdx.x * TURBO_ROWS_THREADS + threadIdx.x;
    if (i >= r.n) {
        return;
    }
    const uint2 row    = fast_div_modulo(i, r.ne0);
    const uint2 matrix = fast_div_modulo(row.x, r.ne1);
    const uint2 outer  = fast_div_modulo(matrix.x, r.ne2);

    const int64_t from = matrix.y * r.src_nb[0] + outer.y * r.src_nb[1] + outer.x * r.src_nb[2];
    const int64_t to   = matrix.y * r.dst_nb[0] + outer.y * r.dst_nb[1] + outer.x * r.dst_nb[2];

    __align__(16) uint32_t piece[4];
    ggml_cuda_memcpy_1<16>(piece, r.src + from + (int64_t) row.y * TURBO_ROWS_BYTES);
    ggml_cuda_memcpy_1<16>(r.dst + to + (int64_t) row.y * TURBO_ROWS_BYTES, piece);
}
