#pragma once

// What both families of turbo types share on a GPU: sizes of blocks, the order of unpacked values, byte permutes.
//
// Unpacking works on the words of a block in registers, without tables in memory: an index selects a byte of the codebook in a byte
// permute. NVIDIA's PRMT takes four selectors of 4 bits from the low half of a word, AMD's v_perm_b32 four of 8 bits, so the order in which
// 32 values cost the fewest instructions differs. It is the same for all types: turbo_value_order.
//
// Of common.cuh these headers need types and shuffles only: they compile with nvcc, with clang for HIP, and as plain C++
// (tests/kernels/lanes).

#include "ggml-cuda/common.cuh"
#include "turbo/list.h"
#include "turbo/scalar.h"
#include "turbo/trellis.h"

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIP__) || defined(GGML_USE_MUSA)
#    define TURBO_HOST_DEVICE __host__ __device__ __forceinline__
#    define TURBO_DEVICE      __device__ __forceinline__
#else
#    define TURBO_HOST_DEVICE inline
#    define TURBO_DEVICE      inline
#endif

// bits of a selector of the byte permute
#if defined(GGML_USE_HIP)
#    define TURBO_SELECTOR_BITS 8
#else
#    define TURBO_SELECTOR_BITS 4
#endif

//
// types
//

// 4 bytes as a word, byte 0 lowest
static constexpr TURBO_HOST_DEVICE uint32_t turbo_pack4(int b0, int b1, int b2, int b3) {
    return (b0 & 0xffu) | (b1 & 0xffu) << 8 | (b2 & 0xffu) << 16 | (b3 & 0xffu) << 24;
}

#define TURBO_IS_TYPE(ENUM, NAME, C_NAME, FAMILY, BITS) || type == GGML_TYPE_##ENUM

// ggml_is_turbo and ggml_turbo_is_trellis for constants
static constexpr TURBO_HOST_DEVICE bool turbo_is_turbo(ggml_type type) {
    return false GGML_TURBO_TYPES_X(TURBO_IS_TYPE);
}

static constexpr TURBO_HOST_DEVICE bool turbo_is_of_trellis(ggml_type type) {
    return false GGML_TURBO_TRELLIS_TYPES_X(TURBO_IS_TYPE);
}

#undef TURBO_IS_TYPE

// Values of a block
static constexpr TURBO_HOST_DEVICE int turbo_block_values(ggml_type type) {
    return turbo_is_of_trellis(type) ? QK_TRELLIS : QK_SCALAR;
}

template <ggml_type type> static constexpr bool turbo_is_trellis = turbo_is_of_trellis(type);

// What is known of a type at compile time: scalar.cuh, trellis.cuh.
template <ggml_type type> struct turbo_traits;

//
// order of unpacked values
//

// Which value of the block, 0 .. 31, stands at a byte, 0 .. 3, of a word, 0 .. 7.
static constexpr TURBO_HOST_DEVICE int turbo_value_order(int word, int byte) {
    return TURBO_SELECTOR_BITS == 4 ? 2 * word + (byte >> 1) + 16 * (byte & 1) : 4 * word + byte;
}

// A quarter of a block, 0 .. 3, is what one word of nibbles unpacks to: values 4q .. 4q+3 and 16+4q .. 16+4q+3.
// Its two words among the 8 of the block:
static constexpr TURBO_HOST_DEVICE int turbo_quarter_word(int quarter, int half) {
    return TURBO_SELECTOR_BITS == 4 ? 2 * quarter + half : quarter + 4 * half;
}

//
// byte permutes
//

// 4 of the 8 bytes of hi:lo, by selectors 0 .. 7: 4 nibbles in the low half of sel (CUDA), or its 4 bytes (HIP).
// In a nibble, bit 3 asks for the sign bit of the byte, 8 times.
static TURBO_DEVICE uint32_t turbo_permute(uint32_t lo, uint32_t hi, uint32_t sel) {
#if defined(GGML_USE_HIP) && defined(__HIP_DEVICE_COMPILE__)
    return __builtin_amdgcn_perm(hi, lo, sel);
#elif defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)  // MUSA defines __CUDA_ARCH__, too
    uint32_t r;  // __byte_perm() would first clear bit 3 of the selectors
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(lo), "r"(hi), "r"(sel));
    return r;
#else
    const uint64_t bytes = (uint64_t) hi << 32 | lo;
    uint32_t       r     = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t s    = sel >> TURBO_SELECTOR_BITS * i & (TURBO_SELECTOR_BITS == 4 ? 15 : 255);
        const uint32_t byte = bytes >> 8 * (s & 7) & 0xff;
        r |= (s & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
    }
    return r;
#endif
}

// What turbo_permute needs for both words of a quarter: the bits of mask of each nibble.
static TURBO_DEVICE void turbo_selectors(uint32_t nibbles, uint32_t mask, uint32_t & sel0, uint32_t & sel1) {
#if TURBO_SELECTOR_BITS == 4
    sel0 = nibbles & mask * 0x11111111u;
    sel1 = sel0 >> 16;
#else
    sel0 = nibbles & mask * 0x01010101u;
    sel1 = nibbles >> 4 & mask * 0x01010101u;
#endif
}

// What turbo_merge needs for both words of a quarter: where bit 3 of the nibbles is set.
static TURBO_DEVICE void turbo_high_bits(uint32_t nibbles, uint32_t & high0, uint32_t & high1) {
#if TURBO_SELECTOR_BITS == 4
    high0 = turbo_permute(nibbles << 4, nibbles, 0xd9c8);  // sign bits of bytes 0 and 1 of both, as bytes
    high1 = turbo_permute(nibbles << 4, nibbles, 0xfbea);  // of bytes 2 and 3
#else
    turbo_selectors(nibbles >> 1, 4, high0, high1);
#endif
}

// The bytes of b where the high bit is set, else those of a.
static TURBO_DEVICE uint32_t turbo_merge(uint32_t a, uint32_t b, uint32_t high) {
#if TURBO_SELECTOR_BITS == 4
    return (a & ~high) | (b & high);
#else
    return turbo_permute(a, b, high | 0x03020100u);
#endif
}

//
// lanes
//

// 32 lanes see what they have stored in shared memory so far.
static TURBO_DEVICE void turbo_syncwarp() {
#if defined(__HIP_DEVICE_COMPILE__)
    // lanes run in step, only the compiler must not move shared memory accesses
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
#elif !defined(__HIP__)
    __syncwarp();
#endif  // defined(__HIP_DEVICE_COMPILE__)
}

// Over eight neighbouring lanes.
static TURBO_DEVICE int32_t turbo_sum8(int32_t x) {
#pragma unroll
    for (int mask = 4; mask > 0; mask >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, mask, 32);
    }
    return x;
}

//
// arithmetic
//

// Correctly rounded: HIP's __fsqrt_rn is the hardware's approximation, CUDA's sqrtf is one with -use_fast_math.
static TURBO_DEVICE float turbo_sqrt(float x) {
#if defined(GGML_USE_HIP)
    return sqrtf(x);
#else
    return __fsqrt_rn(x);
#endif
}
