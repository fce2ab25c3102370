// What turbo/wmma.cuh has for AMD's RDNA3 and RDNA4 (LANES_GFX is 11 or 12), lane by lane after AMD's ISA manuals: v_wmma_i32_16x16x16_iu8,
// v_wmma_f32_16x16x16_f16, v_permlanex16_b32.

#pragma once

#include "device.h"

#include <array>

namespace lanes {

inline int wmma_byte(uint32_t x, int i) {
    return static_cast<int8_t>(x >> 8 * i);
}

inline double wmma_half(uint32_t x, int i) {
    return static_cast<float>(lanes_bits<half>(static_cast<uint16_t>(x >> 16 * i)));
}

}  // namespace lanes

#if LANES_GFX == 11 || LANES_GFX == 12
#    if LANES_GFX == 11
#        define RDNA3
#    else
#        define RDNA4
#    endif

namespace lanes {

constexpr int wmma_copies = LANES_GFX == 11 ? 2 : 1;

// Operand A or B of all lanes: [line][k]. Registers hold several elements, as get takes them out of one. RDNA3: the other half has to have
// the same.
template <typename T, typename Get, size_t n>
std::array<std::array<T, 16>, 16> gather_operand(const uint32_t (&own)[n], Get get, Site site) {
    constexpr int per_register = 16 / (2 * n / wmma_copies);

    std::array<std::array<T, 16>, 16> all;
    for (size_t r = 0; r < n; ++r) {
        const Exchange<uint32_t> exchange(my_warp(), site, own[r]);
        for (int lane = 0; lane < warp; ++lane) {
            const uint32_t x = exchange.of(lane);
            if (wmma_copies == 2 && x != exchange.of(lane ^ 16)) {
                fail(std::string(site.what) + ": lanes " + std::to_string(lane) + " and " + std::to_string(lane ^ 16) +
                     " have not the same operand");
            }
            const int k0 = wmma_copies == 2 ? 0 : lane / 16 * 8;
            for (int i = 0; i < per_register; ++i) {
                all[lane % 16][k0 + int(r) * per_register + i] = get(x, i);
            }
        }
    }
    return all;
}

// Element i of D: of RDNA3, rows are those of both halves of the wave in turns.
inline int wmma_row(int i) {
    const int half = rank() % warp / 16;
    return LANES_GFX == 11 ? 2 * i + half : i + 8 * half;
}

}  // namespace lanes

template <size_t n> void turbo_wmma_s8(int32_t (&d)[8], const uint32_t (&a)[n], const uint32_t (&b)[n], LANES_HERE) {
    const auto all_a = lanes::gather_operand<int>(a, lanes::wmma_byte, { "turbo_wmma_s8", file, line });
    const auto all_b = lanes::gather_operand<int>(b, lanes::wmma_byte, { "turbo_wmma_s8", file, line });
    for (int i = 0; i < 8; ++i) {
        for (int k = 0; k < 16; ++k) {
            d[i] += all_a[lanes::wmma_row(i)][k] * all_b[lanes::rank() % 16][k];
        }
    }
}

template <size_t n> void turbo_wmma_f16(float (&d)[8], const uint32_t (&a)[n], const uint32_t (&b)[n], LANES_HERE) {
    const auto all_a = lanes::gather_operand<double>(a, lanes::wmma_half, { "turbo_wmma_f16", file, line });
    const auto all_b = lanes::gather_operand<double>(b, lanes::wmma_half, { "turbo_wmma_f16", file, line });
    for (int i = 0; i < 8; ++i) {
        double sum = d[i];
        for (int k = 0; k < 16; ++k) {
            sum += all_a[lanes::wmma_row(i)][k] * all_b[lanes::rank() % 16][k];
        }
        d[i] = static_cast<float>(sum);
    }
}

inline uint32_t turbo_wmma_other_half(uint32_t x, LANES_HERE) {
    return lanes::shuffle(x, lanes::rank() % 32 ^ 16, 32, { "turbo_wmma_other_half", file, line });
}
#endif  // LANES_GFX == 11 || LANES_GFX == 12

inline uint32_t turbo_wmma_pack(float a, float b) {
    return half(a).bits | static_cast<uint32_t>(half(b).bits) << 16;
}

inline uint32_t turbo_wmma_scaled(uint32_t x, uint32_t d) {
    const half2 y = (lanes_bits<half2>(x) + half2(-1152, -1152)) * lanes_bits<half2>(d);
    return lanes_bits<uint32_t>(y);
}

template <typename T> T turbo_wmma_opaque(T x) {
    return x;
}

template <bool, typename T> T turbo_wmma_here(T x) {
    return x;
}

inline float turbo_wmma_exp2(float x) {
    return exp2f(x);
}
