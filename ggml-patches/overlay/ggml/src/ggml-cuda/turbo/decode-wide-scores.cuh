#pragma once

// How the units of a block for wide heads, warps or waves, put their parts of the scores of a tile together. A lane has them in an array of two
// or three dimensions, of which only the order of its elements counts here. All loops are unrolled: it stays in registers.

#include "decode-warp.cuh"

#include <type_traits>

// Element i of an array, as if it had one dimension.
template <typename T> static __device__ __forceinline__ auto & turbo_wide_score(T & s, const int i) {
    if constexpr (std::is_array_v<T>) {
        constexpr int n = sizeof(s[0]) / sizeof(float);
        return turbo_wide_score(s[i / n], i % n);
    } else {
        GGML_UNUSED(i);
        return s;
    }
}

template <typename T> static __device__ __forceinline__ void turbo_wide_clear_scores(T & s) {
#pragma unroll
    for (int i = 0; i < (int) (sizeof(s) / sizeof(float)); ++i) {
        turbo_wide_score(s, i) = 0.0f;
    }
}

template <typename T> static __device__ __forceinline__ void turbo_wide_copy_scores(T & dst, const T & src) {
#pragma unroll
    for (int i = 0; i < (int) (sizeof(dst) / sizeof(float)); ++i) {
        turbo_wide_score(dst, i) = turbo_wide_score(src, i);
    }
}

// Scores of a tile in shared memory: [unit][four of a lane's][lane].
//
//     n_units    units of a block
//     n_lanes    lanes of a unit
//     n_words    from one unit to the next
template <int n_units, int n_lanes, int n_words> struct turbo_wide_scores {
    static __device__ __forceinline__ int place(const int unit, const int i, const int lane) {
        return unit * n_words + (i * n_lanes + lane) * 4;
    }

    // What a lane of a unit has of them.
    template <typename T>
    static __device__ __forceinline__ void write(float * scores, const T & s, const int unit, const int lane) {
#pragma unroll
        for (int i = 0; i < (int) (sizeof(s) / 16); ++i) {
            __align__(16) float x[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[j] = turbo_wide_score(s, 4 * i + j);
            }
            turbo_copy<sizeof(x)>(scores + place(unit, i, lane), x);
        }
    }

    // Sums of what all units have written, in one order.
    template <typename T> static __device__ __forceinline__ void read(T & s, const float * scores, const int lane) {
#pragma unroll
        for (int i = 0; i < (int) (sizeof(s) / 16); ++i) {
            __align__(16) float sum[4];
            turbo_copy<sizeof(sum)>(sum, scores + place(0, i, lane));
#pragma unroll
            for (int u = 1; u < n_units; ++u) {
                __align__(16) float x[4];
                turbo_copy<sizeof(x)>(x, scores + place(u, i, lane));
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sum[j] += x[j];
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                turbo_wide_score(s, 4 * i + j) = sum[j];
            }
        }
    }
};
