// Unpacking slices of a cache to f16.

#include "turbo/launch.cuh"
#include "turbo/ops-host.cuh"
#include "turbo/turbo.cuh"
#include "turbo/unpack.cuh"

bool ggml_cuda_turbo_unpack(ggml_type     type,
                            const char *  x,
                            half *        y,
                            const int64_t ne[4],
                            const size_t  nb[4],
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
    a.n_keys     = (int) ne[1];
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
