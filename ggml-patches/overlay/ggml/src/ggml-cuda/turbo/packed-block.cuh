#pragma once

// A block of a packed row in shared memory, as kernels with matrix instructions read it, whosever they are.

#include "decode-rows.cuh"
#include "mma.cuh"
#include "wmma.cuh"

#if defined(TURBO_MMA) || defined(TURBO_WMMA)

// Block b of a row. Blocks are an odd number of 2-byte units, so they begin at a word and in the middle of one in turns.
// parity: of b where the compiler knows it, else -1: b may differ between lanes.
template <ggml_type type, int parity> struct turbo_packed_block {
    static_assert(turbo_block_bytes<type> % 4 == 2, "blocks begin in the middle of words in turns");

    const uint32_t * first;  // the word where it begins
    int              odd;

    __device__ __forceinline__ turbo_packed_block(const uint32_t * row, const int b) :
        first(row + b * turbo_block_bytes<type> / 4),
        odd(parity < 0 ? b % 2 : parity) {}

    // the 2 bytes before the words
    __device__ __forceinline__ uint32_t head() const { return ((const uint16_t *) first)[odd]; }

    __device__ __forceinline__ uint32_t word(const int i) const {
        if constexpr (parity == 1) {
            return first[i + 1];
        } else {
#    if TURBO_SELECTOR_BITS == 4
            return __funnelshift_rc(first[i], first[i + 1], 16 + odd * 16);
#    else
            return turbo_permute(first[i], first[i + 1], 0x05040302 + odd * 0x02020202);
#    endif
        }
    }
};

#endif  // defined(TURBO_MMA) || defined(TURBO_WMMA)
