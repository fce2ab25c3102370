// Stands in for upstream's ggml-cuda/common.cuh: what our kernels use of it.

#pragma once

#include "ggml-common.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "mfma.h"
#include "mma.h"
#include "wmma.h"

#include <map>

#define WARP_SIZE 32

#define FP16_AVAILABLE
#define FAST_FP16_AVAILABLE

typedef void * cudaStream_t;

//
// what the host asks of a device, which a test sets
//

#define GGML_CUDA_CC_PASCAL        600
#define GGML_CUDA_CC_OFFSET_AMD    0x1000000
#define GGML_CUDA_CC_IS_AMD(cc)    ((cc) >= GGML_CUDA_CC_OFFSET_AMD)
#define GGML_CUDA_CC_IS_NVIDIA(cc) (!GGML_CUDA_CC_IS_AMD(cc))
#define GGML_CUDA_CC_IS_CDNA3(cc)  ((cc) == GGML_CUDA_CC_OFFSET_AMD + 0x942)
#define GGML_CUDA_CC_IS_RDNA(cc)   ((cc) >= GGML_CUDA_CC_OFFSET_AMD + 0x1010)
#define GGML_CUDA_CC_IS_RDNA3(cc)  ((cc) >= GGML_CUDA_CC_OFFSET_AMD + 0x1100 && !GGML_CUDA_CC_IS_RDNA4(cc))
#define GGML_CUDA_CC_IS_RDNA4(cc)  ((cc) >= GGML_CUDA_CC_OFFSET_AMD + 0x1200)

struct ggml_cuda_device_info {
    struct {
        int cc  = 900;
        int nsm = 132;
    } devices[1];
};

namespace lanes {

// n_active, n_registers and n_shared are of every kernel. n_cache: bytes of the cache of all multiprocessors
struct Device {
    ggml_cuda_device_info info;
    int                   n_active    = 2;  // blocks on a multiprocessor, as the driver says
    int                   n_registers = 168;
    int                   n_shared    = 26368;
    int                   n_cache     = 0;
};

inline Device device;

}  // namespace lanes

inline const ggml_cuda_device_info & ggml_cuda_info() {
    return lanes::device.info;
}

inline int ggml_cuda_get_device() {
    return 0;
}

inline void ggml_cuda_set_device(int) {}

#define CUDA_CHECK(call) GGML_ASSERT((call) == 0)

template <typename Kernel> int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int * n, Kernel, int, size_t) {
    *n = lanes::device.n_active;
    return 0;
}

enum cudaDeviceAttr { cudaDevAttrL2CacheSize };

inline int cudaDeviceGetAttribute(int * value, cudaDeviceAttr, int) {
    *value = lanes::device.n_cache;
    return 0;
}

#ifdef GGML_USE_HIP
struct hipFuncAttributes {
    int    numRegs;
    size_t sharedSizeBytes;
};

inline int hipFuncGetAttributes(hipFuncAttributes * attributes, const void *) {
    *attributes = { lanes::device.n_registers, static_cast<size_t>(lanes::device.n_shared) };
    return 0;
}
#endif  // GGML_USE_HIP

inline bool fast_fp16_hardware_available(int cc) {
    return GGML_CUDA_CC_IS_AMD(cc) || (cc >= GGML_CUDA_CC_PASCAL && cc != 610);
}

static inline bool ampere_mma_available(const int cc) {
    return GGML_CUDA_CC_IS_NVIDIA(cc) && cc >= 800;
}

static inline bool amd_wmma_available(const int cc) {
    return GGML_CUDA_CC_IS_RDNA3(cc) || GGML_CUDA_CC_IS_RDNA4(cc);
}

struct ggml_cuda_pool {};

// Upstream's knows which nodes of a graph run on which stream; here it is only whether some do.
struct ggml_cuda_stream_context {
    std::map<const ggml_tensor *, int> concurrent_events;
};

struct ggml_backend_cuda_context {
    int                      device = 0;
    ggml_cuda_pool           memory;
    ggml_cuda_stream_context streams;

    cudaStream_t stream() { return nullptr; }

    ggml_cuda_pool & pool() { return memory; }

    ggml_cuda_stream_context & stream_context() { return streams; }
};

template <typename T> struct ggml_cuda_pool_alloc {
    std::vector<T> values;
    T *            ptr = nullptr;

    ggml_cuda_pool_alloc(ggml_cuda_pool &) {}

    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) { alloc(n); }

    T * alloc(size_t n) {
        values.resize(n);
        return ptr = values.data();
    }
};

namespace lanes {
inline int64_t launches = 0;  // so far
}

// Ours, in place of turbo/launch.cuh's.
#ifndef LANES_OWN_LAUNCH
template <typename... Params, typename... Args>
void turbo_launch(void (*kernel)(Params...),
                  dim3 grid,
                  dim3 block,
                  size_t /*shared*/,
                  cudaStream_t /*stream*/,
                  Args... args) {
    ++lanes::launches;
    lanes::launch(kernel, grid, block, args...);
}
#endif  // LANES_OWN_LAUNCH

constexpr int ggml_cuda_get_physical_warp_size() {
    return lanes::wave;
}

constexpr int ggml_cuda_get_max_cpy_bytes() {
    return 16;
}

// Upstream's is empty on HIP, where a wave runs in lockstep.
inline void ggml_cuda_syncwarp(LANES_HERE) {
    lanes::meet(lanes::my_warp(), { "ggml_cuda_syncwarp", file, line });
}

inline void ggml_cuda_pdl_sync() {}

inline void ggml_cuda_pdl_lc() {}

namespace lanes {
inline int64_t dot_products = 0;  // calls of ggml_cuda_dp4a so far
}

inline int ggml_cuda_dp4a(int a, int b, int c) {
    ++lanes::dot_products;
    return __dp4a(a, b, c);
}

template <int width = WARP_SIZE, typename T> T warp_reduce_sum(T x, LANES_HERE) {
    for (int offset = width / 2; offset > 0; offset >>= 1) {
        x = x + __shfl_xor_sync(0xffffffff, x, offset, width, file, line);
    }
    return x;
}

template <int width = WARP_SIZE> float2 warp_reduce_sum(float2 a, LANES_HERE) {
    return { warp_reduce_sum<width>(a.x, file, line), warp_reduce_sum<width>(a.y, file, line) };
}

template <int width = WARP_SIZE> float warp_reduce_max(float x, LANES_HERE) {
    for (int offset = width / 2; offset > 0; offset >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset, width, file, line));
    }
    return x;
}

template <int nbytes, int alignment = 0> void ggml_cuda_memcpy_1(void * dst, const void * src) {
    constexpr int step = alignment == 0 ? nbytes : alignment;
    static_assert(nbytes <= ggml_cuda_get_max_cpy_bytes() || alignment == 0, "more than one instruction copies");
    if (reinterpret_cast<uintptr_t>(dst) % step || reinterpret_cast<uintptr_t>(src) % step) {
        lanes::fail("ggml_cuda_memcpy_1: not aligned to " + std::to_string(step));
    }
    memcpy(dst, src, nbytes);
}

//
// division by a constant
//

// Upstream's third word is the divisor, too.
inline uint3 init_fastdiv_values(uint64_t d) {
    return { 0, 0, static_cast<unsigned>(d) };
}

inline uint32_t fastdiv(uint32_t n, uint3 d) {
    return n / d.z;
}

inline uint32_t fastmodulo(uint32_t n, uint3 d) {
    return n % d.z;
}

inline uint2 fast_div_modulo(uint32_t n, uint3 d) {
    return { n / d.z, n % d.z };
}
