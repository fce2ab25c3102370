#pragma once

// Costs of two states at once, for the laps of trellis-encode.cuh: 16 bits each, in one word, where a GPU has minima of such pairs. Those are
// AMD's, and NVIDIA's from sm_90 on. Elsewhere a pair is two words: what moves halves costs nothing then.
//
// No sum may reach 2^16.

#include "base.cuh"

#if defined(__HIP_DEVICE_COMPILE__)

typedef unsigned short turbo_pair __attribute__((ext_vector_type(2)));

static TURBO_DEVICE turbo_pair turbo_make_pair(uint32_t bits) {
    return __builtin_bit_cast(turbo_pair, bits);
}

static TURBO_DEVICE uint32_t turbo_pair_bits(turbo_pair a) {
    return __builtin_bit_cast(uint32_t, a);
}

static TURBO_DEVICE turbo_pair turbo_low_halves(turbo_pair a, turbo_pair b) {
    return turbo_make_pair(turbo_permute(turbo_pair_bits(a), turbo_pair_bits(b), 0x05040100));
}

static TURBO_DEVICE turbo_pair turbo_high_halves(turbo_pair a, turbo_pair b) {
    return turbo_make_pair(turbo_permute(turbo_pair_bits(a), turbo_pair_bits(b), 0x07060302));
}

static TURBO_DEVICE turbo_pair turbo_swap_halves(turbo_pair a) {
    return __builtin_shufflevector(a, a, 1, 0);
}

static TURBO_DEVICE turbo_pair turbo_minima(turbo_pair a, turbo_pair b) {
    return __builtin_elementwise_min(a, b);
}

static TURBO_DEVICE turbo_pair turbo_differences(turbo_pair a, turbo_pair b) {
    return a - b;
}

// The smaller ones of a + b and c + d.
static TURBO_DEVICE turbo_pair turbo_minima_of_sums(turbo_pair a, turbo_pair b, turbo_pair c, turbo_pair d) {
    return __builtin_elementwise_min(a + b, c + d);
}

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12000 && !defined(GGML_USE_MUSA)

struct turbo_pair {
    uint32_t bits;
};

static TURBO_DEVICE turbo_pair turbo_make_pair(uint32_t bits) {
    return { bits };
}

static TURBO_DEVICE uint32_t turbo_pair_bits(turbo_pair a) {
    return a.bits;
}

static TURBO_DEVICE turbo_pair turbo_low_halves(turbo_pair a, turbo_pair b) {
    return { turbo_permute(a.bits, b.bits, 0x5410) };
}

static TURBO_DEVICE turbo_pair turbo_high_halves(turbo_pair a, turbo_pair b) {
    return { turbo_permute(a.bits, b.bits, 0x7632) };
}

static TURBO_DEVICE turbo_pair turbo_swap_halves(turbo_pair a) {
    return { turbo_permute(a.bits, a.bits, 0x1032) };
}

static TURBO_DEVICE turbo_pair turbo_minima(turbo_pair a, turbo_pair b) {
    return { __vminu2(a.bits, b.bits) };
}

static TURBO_DEVICE turbo_pair turbo_differences(turbo_pair a, turbo_pair b) {
    return { a.bits - b.bits };
}

static TURBO_DEVICE turbo_pair turbo_minima_of_sums(turbo_pair a, turbo_pair b, turbo_pair c, turbo_pair d) {
    return { __viaddmin_u16x2(a.bits, b.bits, c.bits + d.bits) };
}

#else

// The lane tests have 16 bits for HIP, so that a sum that is too large shows.
#    if defined(GGML_USE_HIP)
using turbo_half_of_pair = uint16_t;
#    else
using turbo_half_of_pair = uint32_t;
#    endif

struct turbo_pair {
    turbo_half_of_pair low, high;
};

static TURBO_DEVICE turbo_pair turbo_make_pair(uint32_t bits) {
    return { (turbo_half_of_pair) (bits & 0xffff), (turbo_half_of_pair) (bits >> 16) };
}

static TURBO_DEVICE uint32_t turbo_pair_bits(turbo_pair a) {
    return a.low | (uint32_t) a.high << 16;
}

static TURBO_DEVICE turbo_pair turbo_low_halves(turbo_pair a, turbo_pair b) {
    return { a.low, b.low };
}

static TURBO_DEVICE turbo_pair turbo_high_halves(turbo_pair a, turbo_pair b) {
    return { a.high, b.high };
}

static TURBO_DEVICE turbo_pair turbo_swap_halves(turbo_pair a) {
    return { a.high, a.low };
}

static TURBO_DEVICE turbo_pair turbo_minima(turbo_pair a, turbo_pair b) {
    return { min(a.low, b.low), min(a.high, b.high) };
}

static TURBO_DEVICE turbo_pair turbo_differences(turbo_pair a, turbo_pair b) {
    return { (turbo_half_of_pair) (a.low - b.low), (turbo_half_of_pair) (a.high - b.high) };
}

static TURBO_DEVICE turbo_pair turbo_minima_of_sums(turbo_pair a, turbo_pair b, turbo_pair c, turbo_pair d) {
    const turbo_pair ab = { (turbo_half_of_pair) (a.low + b.low), (turbo_half_of_pair) (a.high + b.high) };
    const turbo_pair cd = { (turbo_half_of_pair) (c.low + d.low), (turbo_half_of_pair) (c.high + d.high) };
    return turbo_minima(ab, cd);
}

#endif
