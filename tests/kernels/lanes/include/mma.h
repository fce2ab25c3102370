// What turbo/mma.cuh has for NVIDIA's sm_80 and later, lane by lane after the PTX manual: mma.m16n8k32, mma.m16n8k16, movmatrix, cp.async.
//
// A copy arrives when it is started, or as late as its lane allows, as lanes::order says. So a wait that is missing shows in one of both
// orders, and a copy that starts before its place is free shows in the other.

#pragma once

#include "device.h"

#include <array>

namespace lanes {

// Registers of all 32 lanes.
template <size_t n> using Registers = std::array<std::array<uint32_t, n>, warp>;

template <size_t n> Registers<n> gather(const uint32_t (&own)[n], Site site) {
    std::array<uint32_t, n> mine;
    std::copy(own, own + n, mine.begin());
    const Exchange<std::array<uint32_t, n>> exchange(my_warp(), site, mine);
    Registers<n>                            all;
    for (int lane = 0; lane < warp; ++lane) {
        all[lane] = exchange.of(lane);
    }
    return all;
}

inline int byte_of(uint32_t word, int i) {
    return static_cast<int8_t>(word >> 8 * i);
}

inline double half_of(uint32_t word, int i) {
    return static_cast<float>(lanes_bits<half>(static_cast<uint16_t>(word >> 16 * i)));
}

// Elements of the operands; lane l has row l/4 and part l%4.
inline int a_of_s8(const Registers<4> & a, int row, int k) {
    return byte_of(a[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], k % 4);
}

inline int b_of_s8(const Registers<2> & b, int k, int column) {
    return byte_of(b[column * 4 + k % 16 / 4][k / 16], k % 4);
}

inline double a_of_f16(const Registers<4> & a, int row, int k) {
    return half_of(a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
}

inline double b_of_f16(const Registers<2> & b, int k, int column) {
    return half_of(b[column * 4 + k % 8 / 2][k / 8], k % 2);
}

inline void perform(const Fiber::Copies & copies) {
    for (const Fiber::Copy & copy : copies) {
        memcpy(copy.dst, copy.src, copy.bytes);
    }
}

}  // namespace lanes

inline void turbo_mma_s8(int32_t (&d)[4],
                         const uint32_t (&a)[4],
                         const uint32_t (&b)[2],
                         const int32_t (&c)[4],
                         LANES_HERE) {
    const auto all_a = lanes::gather(a, { "turbo_mma_s8", file, line });
    const auto all_b = lanes::gather(b, { "turbo_mma_s8", file, line });
    for (int i = 0; i < 4; ++i) {
        const int row    = lanes::rank() % 32 / 4 + i / 2 * 8;
        const int column = lanes::rank() % 4 * 2 + i % 2;
        d[i]             = c[i];
        for (int k = 0; k < 32; ++k) {
            d[i] += lanes::a_of_s8(all_a, row, k) * lanes::b_of_s8(all_b, k, column);
        }
    }
}

inline void turbo_mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LANES_HERE) {
    const auto all_a = lanes::gather(a, { "turbo_mma_f16", file, line });
    const auto all_b = lanes::gather(b, { "turbo_mma_f16", file, line });
    for (int i = 0; i < 4; ++i) {
        const int row    = lanes::rank() % 32 / 4 + i / 2 * 8;
        const int column = lanes::rank() % 4 * 2 + i % 2;
        double    sum    = c[i];
        for (int k = 0; k < 16; ++k) {
            sum += lanes::a_of_f16(all_a, row, k) * lanes::b_of_f16(all_b, k, column);
        }
        c[i] = static_cast<float>(sum);
    }
}

inline uint32_t turbo_mma_transpose(uint32_t x, LANES_HERE) {
    const uint32_t own[1] = { x };
    const auto     all    = lanes::gather(own, { "turbo_mma_transpose", file, line });
    const int      row    = lanes::rank() % 32 / 4;
    uint32_t       y      = 0;
    for (int i = 0; i < 2; ++i) {
        const int column = lanes::rank() % 4 * 2 + i;  // of the result, so a row of the source
        y |= (all[column * 4 + row / 2][0] >> row % 2 * 16 & 0xffff) << 16 * i;
    }
    return y;
}

template <int bytes> void turbo_async_copy(void * dst, const void * src) {
    if (reinterpret_cast<uintptr_t>(dst) % bytes || reinterpret_cast<uintptr_t>(src) % bytes) {
        lanes::fail("turbo_async_copy: not aligned to " + std::to_string(bytes));
    }
    lanes::Fiber & me = lanes::block->fibers[lanes::rank()];
    me.started.push_back({ dst, src, bytes });
    if (lanes::order == lanes::Order::ascending) {
        memcpy(dst, src, bytes);
    }
}

inline void turbo_async_commit() {
    lanes::Fiber & me = lanes::block->fibers[lanes::rank()];
    me.committed.push_back(std::move(me.started));
    me.started.clear();
}

template <int n> void turbo_async_wait() {
    lanes::Fiber & me = lanes::block->fibers[lanes::rank()];
    while (me.committed.size() > n) {
        if (lanes::order == lanes::Order::descending) {
            lanes::perform(me.committed.front());
        }
        me.committed.erase(me.committed.begin());
    }
}

template <uint32_t mask> uint32_t turbo_select(uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

template <int n> const char * turbo_row_at(const char * p, int stride) {
    return p + static_cast<int64_t>(n) * stride;
}
