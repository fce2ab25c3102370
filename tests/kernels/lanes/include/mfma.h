// What turbo/mfma.cuh has for AMD's CDNA3 (LANES_GFX is 942), lane by lane after AMD's matrix instruction calculator:
// v_mfma_i32_16x16x32_i8, v_mfma_f32_16x16x16_f16. Lanes meet as waves of 64.

#pragma once

#include "wmma.h"

#if LANES_GFX == 942
#    define CDNA3
#endif

namespace lanes {

constexpr int mfma_lanes = 64;

// Lane of the wave.
inline int mfma_lane() {
    return rank() % mfma_lanes;
}

// Operand A or B of all lanes: [line][k]. Registers hold several elements, as get takes them out of one.
template <typename T, int per_register, typename Get>
std::array<std::array<T, 8 * per_register>, 16> gather_mfma(const uint32_t (&own)[2], Get get, Site site) {
    std::array<std::array<T, 8 * per_register>, 16> all;
    for (int r = 0; r < 2; ++r) {
        const Exchange<uint32_t> exchange(my_wave(), site, own[r]);
        for (int lane = 0; lane < mfma_lanes; ++lane) {
            for (int i = 0; i < per_register; ++i) {
                all[lane % 16][lane / 16 * 2 * per_register + r * per_register + i] = get(exchange.of(lane), i);
            }
        }
    }
    return all;
}

// Of all lanes: row i of D has elements i % 4 of those of part i / 4.
template <int per_register, typename Acc, typename Get>
void mfma(Acc (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2], Get get, Site site) {
    typedef decltype(get(0u, 0)) element;

    const auto all_a = gather_mfma<element, per_register>(a, get, site);
    const auto all_b = gather_mfma<element, per_register>(b, get, site);
    for (int r = 0; r < 4; ++r) {
        element sum = d[r];
        for (int k = 0; k < 8 * per_register; ++k) {
            sum += all_a[mfma_lane() / 16 * 4 + r][k] * all_b[mfma_lane() % 16][k];
        }
        d[r] = static_cast<Acc>(sum);
    }
}

}  // namespace lanes

inline void turbo_mfma_s8(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2], LANES_HERE) {
    lanes::mfma<4>(d, a, b, lanes::wmma_byte, { "turbo_mfma_s8", file, line });
}

inline void turbo_mfma_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2], LANES_HERE) {
    lanes::mfma<2>(d, a, b, lanes::wmma_half, { "turbo_mfma_f16", file, line });
}

inline float turbo_mfma_shuffle_xor(float x, int lanes, LANES_HERE) {
    const lanes::Exchange<float> exchange(lanes::my_wave(), { "turbo_mfma_shuffle_xor", file, line }, x);
    return exchange.of(lanes::mfma_lane() ^ lanes);
}

inline void turbo_mfma_syncwave(LANES_HERE) {
    lanes::meet(lanes::my_wave(), { "turbo_mfma_syncwave", file, line });
}

inline int turbo_mfma_uniform(int x) {
    return x;
}

template <typename Choose> uint32_t lanes_each_u16(uint32_t x, uint32_t y, Choose choose) {
    return choose(x & 0xffff, y & 0xffff) | choose(x >> 16, y >> 16) << 16;
}

inline uint32_t turbo_mfma_max_u16(uint32_t x, uint32_t y) {
    return lanes_each_u16(x, y, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}

inline uint32_t turbo_mfma_min_u16(uint32_t x, uint32_t y) {
    return lanes_each_u16(x, y, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}

inline void turbo_mfma_read_halves(const half * x, uint32_t (&y)[2]) {
    memcpy(y, x, sizeof(y));
}

inline void turbo_mfma_here(float (&)[4]) {}
