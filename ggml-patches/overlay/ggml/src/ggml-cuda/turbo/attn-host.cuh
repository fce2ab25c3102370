#pragma once

// What the host's part of decode and of prefill shares.

#include "attn-args.cuh"

// Parameters of a GGML_OP_FLASH_ATTN_EXT as kernels take them.
struct turbo_attn_params {
    float    scale;     // of the scores; divided by the soft cap already
    float    softcap;   // no cap: 0
    float    max_bias;  // ALiBi; none: 0
    float    m0, m1;    // slopes of the first n_head_log2 heads, and of the others, are powers of these
    uint32_t n_head_log2;
};

static inline turbo_attn_params turbo_attn_params_of(const ggml_tensor * dst) {
    turbo_attn_params p;
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    if (p.softcap != 0.0f) {
        p.scale /= p.softcap;
    }
    const uint32_t n_head = dst->src[0]->ne[2];

    p.n_head_log2 = 1u << (uint32_t) floorf(log2f((float) n_head));
    p.m0          = powf(2.0f, -p.max_bias / p.n_head_log2);
    p.m1          = powf(2.0f, -p.max_bias / 2.0f / p.n_head_log2);
    return p;
}

// AMD's RDNA runs a block on a workgroup processor: four SIMDs of 1,024 vector registers or more for 32 lanes, and 128 KiB of shared memory.
// HIP counts such processors, but before a fix of 2026 it divides 64 KiB among blocks. So a kernel that is held back by shared memory gets
// half of its blocks, and every SIMD half of its waves. n_active: what HIP says
static inline int turbo_rdna_blocks(const int    n_active,
                                    const int    n_threads,
                                    const int    n_registers,
                                    const size_t shared) {
    const int n_waves  = (n_threads + 31) / 32;
    const int by_regs  = 4 * (1024 / std::max(n_registers, 64)) / n_waves;
    const int by_bytes = shared > 0 ? (int) (128 * 1024 / shared) : by_regs;
    return std::max(n_active, std::min(by_regs, by_bytes));
}

// Thread blocks of a kernel that the device runs at once. shared: bytes of dynamic shared memory
template <typename kernel_t>
static int turbo_blocks_at_once(const kernel_t kernel, const int n_threads, const size_t shared) {
    const auto & device = ggml_cuda_info().devices[ggml_cuda_get_device()];

    int n_active = 1;  // on one multiprocessor
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_active, kernel, n_threads, shared));
#ifdef GGML_USE_HIP
    if (GGML_CUDA_CC_IS_RDNA(device.cc)) {
        hipFuncAttributes kernel_takes;
        CUDA_CHECK(hipFuncGetAttributes(&kernel_takes, (const void *) kernel));
        n_active = turbo_rdna_blocks(n_active, n_threads, kernel_takes.numRegs, kernel_takes.sharedSizeBytes + shared);
    }
#endif  // GGML_USE_HIP
    return n_active * device.nsm;
}

// Whether the kernel below takes a segment of exact keys: a short one.
bool ggml_cuda_turbo_merges_exact(const turbo_attn_args & a);

// Attends a segment of exact keys, and merges it with the parts of decode attention over the first segment: n_rows rows of the result.
// a: of the segment; dst and meta are those of the first one, which left part0 of n_parts parts for each row
void ggml_cuda_turbo_merge_exact(const turbo_attn_args & a,
                                 int                     DK,
                                 int                     DV,
                                 int                     n_rows,
                                 float *                 dst,
                                 cudaStream_t            stream);
