// Kernels with mistakes that a GPU does not report: see test_lanes_misuse.py.

#include "ggml-cuda/common.cuh"
#include "lanes_library.h"

thread_local int dynamic_shared[256];

// Values must go through the memory of the block, sums through shuffles, votes through the wave.
static __global__ void correct(int * out) {
    __shared__ int        fixed[96];
    extern __shared__ int dynamic_shared[];
    const int             i = static_cast<int>(threadIdx.x);

    fixed[i] = i;
    __syncthreads();
    dynamic_shared[i] = fixed[95 - i];
    __syncthreads();
    const int sum  = warp_reduce_sum(dynamic_shared[95 - i]);
    const int up   = __shfl_up_sync(0xffffffff, i, 3, 8);
    const int any  = __any_sync(0xffffffff, i == 70);
    const int all  = __all_sync(0xffffffff, i < 64);
    const int lane = __shfl_sync(0xffffffff, i, 5);
    out[i]         = sum + 10000 * up + 1000000 * any + 2000000 * all + 10000000 * (lane % 32);
}

static __global__ void barrier_in_a_branch(int *) {
    if (threadIdx.x < 32) {
        __syncthreads();
    }
}

static __global__ void two_barriers(int *) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

static __global__ void shuffle_in_a_branch(int * out) {
    if (threadIdx.x % 2) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 2);
    }
}

static __global__ void early_end(int * out) {
    if (threadIdx.x == 7) {
        return;
    }
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
}

static __global__ void two_shuffles(int * out) {
    if (threadIdx.x % 2) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 2);
    } else {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 2, 2);
    }
}

static __global__ void some_lanes(int * out) {
    out[threadIdx.x] = __shfl_xor_sync(0xff, 1, 2);
}

// Right for waves of 32, and for 64 as well where a shuffle does it.
static __global__ void vote_of_half_a_wave(int * out) {
    if (threadIdx.x / 32 == 0) {
        out[threadIdx.x] = __any_sync(0xffffffff, 1);
    }
}

static __global__ void shuffle_of_half_a_wave(int * out) {
    if (threadIdx.x / 32 == 0) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
    }
}

// Each thread reads what its neighbour wrote, without waiting for it.
static __global__ void no_barrier(int * out) {
    __shared__ int values[96];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x]    = values[(threadIdx.x + 1) % 96];
    __syncthreads();
    values[threadIdx.x] = -1;
}

LANES_EXPORT const char * lanes_misuse(const char * name, int * out) {
    return lanes::guarded([&] {
        const std::string kernel = name;
        for (const auto & [known, function] : std::initializer_list<std::pair<const char *, void (*)(int *)>>{
                 { "correct",                correct                },
                 { "barrier_in_a_branch",    barrier_in_a_branch    },
                 { "two_barriers",           two_barriers           },
                 { "shuffle_in_a_branch",    shuffle_in_a_branch    },
                 { "early_end",              early_end              },
                 { "two_shuffles",           two_shuffles           },
                 { "some_lanes",             some_lanes             },
                 { "vote_of_half_a_wave",    vote_of_half_a_wave    },
                 { "shuffle_of_half_a_wave", shuffle_of_half_a_wave },
                 { "no_barrier",             no_barrier             },
        }) {
            if (kernel == known) {
                return lanes::launch(function, dim3(2), dim3(96), out);
            }
        }
        throw std::invalid_argument(kernel);
    });
}
