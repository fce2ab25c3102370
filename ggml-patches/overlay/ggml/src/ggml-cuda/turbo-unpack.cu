// Unpacking slices of a cache to f16, and what is copied beside them.

#include "turbo/copy-rows.cuh"
#include "turbo/launch.cuh"
#include "turbo/ops-host.cuh"
#include "turbo/turbo.cuh"
#include "turbo/unpack.cuh"

bool ggml_cuda_turbo_unpack(ggml_type     type,
                            const char *  x,
                            half *        y,
                            const int64_t ne[4],
                            const size_t  nb[4],
                            int64_t       n_rows,
                            cudaStream_t  stream) {
    constexpr int keys = TURBO_UNPACK_WARPS * TURBO_UNPACK_KEYS;

    const int64_t row_blocks = ne[0] / turbo_block_values(type);

    turbo_unpack_args a;
    a.x          = x;
    a.y          = y;
    a.nb1        = (int64_t) nb[1];
    a.nb3        = (int64_t) nb[3];
    a.row_blocks = init_fastdiv_values((uint64_t) row_blocks);
    a.n_blocks   = (int) (row_blocks * ne[2]);
    a.n_heads    = (int) ne[2];
    a.n_rows     = (int) n_rows;
    a.D          = (int) ne[0];

    const bool neighbours = ne[2] == 1 || nb[2] == row_blocks * nb[0];
    const bool aligned    = ((uintptr_t) x | nb[1] | nb[3]) % sizeof(uint32_t) == 0;
    if (!neighbours || !aligned || a.n_blocks % 2 != 0 || ne[1] % keys != 0 || ne[1] / keys > 65535 || ne[3] > 65535) {
        return false;
    }
    turbo_with_type(type, [&](auto t) {
        const unsigned lanes = a.n_blocks / 2 * (turbo_block_values(t) / 16);
        turbo_launch(turbo_unpack_keys<decltype(t)::value>,
                     dim3((lanes + 31) / 32, (unsigned) (ne[1] / keys), (unsigned) ne[3]), dim3(32, TURBO_UNPACK_WARPS),
                     0, stream, a);
    });
    return true;
}

static turbo_rows turbo_rows_of(const turbo_copied & copied) {
    const ggml_tensor & src = *copied.src;
    const ggml_tensor & dst = *copied.dst;

    const uint32_t n_pieces = (uint32_t) (dst.ne[0] * sizeof(half) / TURBO_ROWS_BYTES);

    turbo_rows r;
    r.src = (const char *) src.data;
    r.dst = (char *) dst.data;
    for (int i = 0; i < 3; ++i) {
        r.src_nb[i] = src.ne[i + 1] == 1 ? 0 : (int64_t) src.nb[i + 1];
        r.dst_nb[i] = (int64_t) dst.nb[i + 1];
    }
    r.ne0 = init_fastdiv_values(n_pieces);
    r.ne1 = init_fastdiv_values((uint64_t) dst.ne[1]);
    r.ne2 = init_fastdiv_values((uint64_t) dst.ne[2]);
    r.n   = n_pieces * (uint32_t) (dst.ne[1] * dst.ne[2] * dst.ne[3]);
    return r;
}

static bool turbo_is_aligned_rows(const ggml_tensor & t) {
    return ((uintptr_t) t.data | t.ne[0] * t.nb[0] | t.nb[1] | t.nb[2] | t.nb[3]) % TURBO_ROWS_BYTES == 0;
}

bool ggml_cuda_turbo_copy_rows(const turbo_copied (&copies)[2], cudaStream_t stream) {
    for (const turbo_copied & copied : copies) {
        const ggml_tensor & src = *copied.src;
        const ggml_tensor & dst = *copied.dst;

        const bool repeated = src.ne[3] == 1 || src.ne[3] == dst.ne[3];
        if (!repeated || !turbo_is_aligned_rows(src) || !turbo_is_aligned_rows(dst)) {
            return false;
        }
    }
    const turbo_rows a        = turbo_rows_of(copies[0]);
    const turbo_rows b        = turbo_rows_of(copies[1]);
    const uint32_t   n_blocks = (std::max(a.n, b.n) + TURBO_ROWS_THREADS - 1) / TURBO_ROWS_THREADS;
    turbo_launch(turbo_copy_rows, dim3(n_blocks, 2), dim3(TURBO_ROWS_THREADS), 0, stream, a, b);
    return true;
}
