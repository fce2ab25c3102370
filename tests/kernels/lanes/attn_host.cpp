// turbo-attn.cu, turbo-attn-decode.cu and turbo-attn-prefill.cu for Python: which kernels an op takes, and how they are launched. See
// test_lanes_attn_host.py.

#define LANES_OWN_LAUNCH
#define FLASH_ATTN_AVAILABLE

#include "attn.h"
#include "lanes_library.h"
#include "turbo/attn-args.cuh"

// What was launched, or called in place of files that are not part of this library.
struct Calls {
    int64_t decode;        // launches of a decode kernel
    int64_t decode_mma;    // those of them with matrix instructions
    int64_t decode_wide;   // and those with such instructions for wide heads
    int64_t decode_grid;   // blocks of the first of them
    int64_t decode_split;  // splits of the keys of the first of them
    int64_t merge;
    int64_t merge_exact;   // with a segment of exact keys
    int64_t unpack;        // tensors that became f16
    int64_t upstream;      // slices through each way
    int64_t mma;
    int64_t tile;
    int64_t copy;  // launches for masks and exact keys that are put behind those of a slice
};

static Calls calls;
static bool  has_mma;

static void fake_decode(turbo_attn_args) {}

static void fake_decode_mma(turbo_attn_args) {}

static void fake_decode_wide(turbo_attn_args) {}

static void fake_merge(const float *, const float2 *, float *, int) {}

template <typename kernel_t, typename fake_t> static bool is_same(kernel_t kernel, fake_t fake) {
    return reinterpret_cast<void *>(kernel) == reinterpret_cast<void *>(fake);
}

template <typename... Params, typename... Args>
static void turbo_launch(void (*kernel)(Params...), dim3 grid, dim3, size_t, cudaStream_t, Args...) {
    if (is_same(kernel, fake_decode) || is_same(kernel, fake_decode_mma) || is_same(kernel, fake_decode_wide)) {
        calls.decode_mma += is_same(kernel, fake_decode_mma);
        calls.decode_wide += is_same(kernel, fake_decode_wide);
        if (calls.decode++ == 0) {
            calls.decode_grid  = int64_t(grid.x) * grid.y * grid.z;
            calls.decode_split = grid.y;
        }
    } else if (is_same(kernel, fake_merge)) {
        ++calls.merge;
    } else {
        ++calls.merge_exact;
    }
}

#include "turbo-attn-decode.cu"
#include "turbo-attn-merge-exact.cu"
#include "turbo-attn-prefill.cu"
#include "turbo-attn.cu"

template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_pair(int DK, int DV, int n_columns) {
    const bool is_large = DK > 256 || DV > 256;
    return { fake_decode, fake_merge, n_columns <= 2 ? 2 : n_columns <= 4 || is_large ? 4 : 8, nullptr };
}

template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_mma_pair(int DK, int DV, int n_columns) {
    GGML_ASSERT(turbo_is_decode_mma(type_K, type_V, DK, DV));
    return { fake_decode_mma, fake_merge, n_columns <= 8 ? 8 : 16, fake_decode_mma };
}

template <ggml_type type_K, ggml_type type_V>
turbo_decode_kernels ggml_cuda_turbo_decode_wide_pair(int DK, int DV, int n_columns) {
    GGML_ASSERT(turbo_is_decode_wide(type_K, type_V, DK, DV));
    return { fake_decode_wide, fake_merge, n_columns <= 8 ? 8 : 16, fake_decode_wide };
}

bool ggml_turbo_flash_attn_has_segment(const ggml_tensor * op) {
    return op->src[5] != nullptr;
}

int64_t ggml_blck_size(ggml_type type) {
    return ggml_is_turbo(type) ? turbo_block_values(type) : type == GGML_TYPE_Q8_0 ? QK8_0 : 1;
}

#include "type_size.h"

const char * ggml_type_name(ggml_type) {
    return "";
}

void ggml_cuda_turbo_to_f16(ggml_type,
                            const char *,
                            half *,
                            const int64_t[4],
                            const size_t[4],
                            int64_t,
                            cudaStream_t) {
    ++calls.unpack;
}

// Rows of 19 queries are not aligned here.
bool ggml_cuda_turbo_copy_rows(const turbo_copied (&copies)[2], cudaStream_t) {
    ++calls.copy;
    return copies[0].src->ne[1] != 19;
}

to_fp16_nc_cuda_t ggml_get_to_fp16_nc_cuda(ggml_type) {
    return [](const void *, half *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, cudaStream_t) {
        ++calls.unpack;
    };
}

bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor *) {
    return true;
}

void ggml_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) {
    ++calls.upstream;
}

bool ggml_cuda_turbo_prefill_mma_supported(int, const turbo_slice &) {
    return has_mma;
}

void ggml_cuda_turbo_prefill_mma(ggml_backend_cuda_context &, turbo_slice &) {
    ++calls.mma;
}

void ggml_cuda_turbo_prefill_tile(ggml_backend_cuda_context &, turbo_slice &) {
    ++calls.tile;
}

static ggml_tensor tensor(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    ggml_tensor t = {};
    t.type        = type;
    t.ne[0]       = ne0;
    t.ne[1]       = ne1;
    t.ne[2]       = ne2;
    t.ne[3]       = 1;
    t.nb[0]       = ggml_type_size(type);
    t.nb[1]       = ne0 / ggml_blck_size(type) * t.nb[0];
    t.nb[2]       = t.nb[1] * ne1;
    t.nb[3]       = t.nb[2] * ne2;
    return t;
}

// An op without memory on a device of compute capability cc with nsm multiprocessors, each of which runs n_active blocks at once, says
// the driver. n_exact: keys of a second segment. row_gap: bytes between rows of K. mma: whether slices have a kernel for matrix cores.
LANES_EXPORT const char * lanes_attend(int64_t cc,
                                       int64_t nsm,
                                       int64_t n_active,
                                       int64_t n_registers,
                                       int64_t n_shared,
                                       int64_t n_cache,
                                       bool    mma,
                                       int64_t type_k,
                                       int64_t type_v,
                                       int64_t DK,
                                       int64_t DV,
                                       int64_t n_q,
                                       int64_t n_head_kv,
                                       int64_t gqa_ratio,
                                       int64_t n_kv,
                                       int64_t n_exact,
                                       int64_t row_gap,
                                       Calls * out) {
    return lanes::guarded([&] {
        lanes::device.info.devices[0].cc  = cc;
        lanes::device.info.devices[0].nsm = nsm;
        lanes::device.n_active            = n_active;
        lanes::device.n_registers         = n_registers;
        lanes::device.n_shared            = n_shared;
        lanes::device.n_cache             = n_cache;
        has_mma                           = mma;
        calls                             = {};

        ggml_tensor Q = tensor(GGML_TYPE_F32, DK, n_q, n_head_kv * gqa_ratio);
        ggml_tensor K = tensor(ggml_type(type_k), DK, n_kv, n_head_kv);
        ggml_tensor V = tensor(ggml_type(type_v), DV, n_kv, n_head_kv);
        K.nb[1] += row_gap;
        K.nb[2] += row_gap * n_kv;
        ggml_tensor mask = tensor(GGML_TYPE_F16, n_kv, n_q, 1);
        ggml_tensor K2   = tensor(GGML_TYPE_F16, DK, n_exact, n_head_kv);
        ggml_tensor V2   = tensor(GGML_TYPE_F16, DV, n_exact, n_head_kv);
        ggml_tensor seen = tensor(GGML_TYPE_F16, n_exact, n_q, 1);
        ggml_tensor dst  = tensor(GGML_TYPE_F32, DV, n_head_kv * gqa_ratio, n_q);
        dst.op           = GGML_OP_FLASH_ATTN_EXT;
        dst.src[0]       = &Q;
        dst.src[1]       = &K;
        dst.src[2]       = &V;
        dst.src[3]       = &mask;
        V.data           = &V;  // else it would be a view of K
        if (n_exact > 0) {
            V2.data    = (void *) 1024;
            dst.src[5] = &K2;
            dst.src[6] = &V2;
            dst.src[7] = &seen;
        }
        if (!ggml_cuda_turbo_flash_attn_supported(0, &dst)) {
            throw std::invalid_argument("not supported");
        }
        ggml_backend_cuda_context ctx;
        ggml_cuda_turbo_flash_attn(ctx, &dst);
        *out = calls;
    });
}
