// Levels of four neighbouring values of a block, as a word of int8. Formats: turbo/scalar.h, turbo/trellis.h. Words are little-endian; byte b of
// one belongs to the b-th of the four values.
//
// Which level of a scalar type an index means is chosen by logic on whole words: GPUs make a choice in one instruction (bit-field insert, logic of
// three inputs), so four values take 3, 7 or 15 of them. The trellis types have too many levels for that; they are looked up.

#if !defined(TURBO_ATTN_LEVELS_GLSL)
#define TURBO_ATTN_LEVELS_GLSL

#include "turbo-tables.glsl"

bool turbo_is_scalar(uint type) {
    return type == TURBO2_0_ID || type == TURBO3_0_ID || type == TURBO4_0_ID;
}

bool turbo_is_trellis(uint type) {
    return type == TURBO2_T_ID || type == TURBO3_T_ID || type == TURBO4_T_ID;
}

bool turbo_is(uint type) {
    return turbo_is_scalar(type) || turbo_is_trellis(type);
}

const uint TURBO_ONES = 0x01010101u;

//
// scalar types
//

const int turbo2_levels[TURBO2_0_LEVELS] = int[](TURBO2_0_CODEBOOK);
const int turbo3_levels[TURBO3_0_LEVELS] = int[](TURBO3_0_CODEBOOK);
const int turbo4_levels[TURBO4_0_LEVELS] = int[](TURBO4_0_CODEBOOK);

// Bit n of each byte, to all bits of the byte.
uint turbo_mask(uint bytes, uint n) {
    const uint bits = (bytes >> n) & TURBO_ONES;
    return (bits << 8) - bits;
}

uint turbo_choose(uint mask, uint set, uint clear) {
    return (set & mask) | (clear & ~mask);
}

#define TURBO_LEVEL(LEVELS, I) (uint((LEVELS)[I] & 0xff) * TURBO_ONES)
#define TURBO_CHOOSE2(LEVELS, I) turbo_choose(m0, TURBO_LEVEL(LEVELS, (I) + 1), TURBO_LEVEL(LEVELS, I))
#define TURBO_CHOOSE4(LEVELS, I) turbo_choose(m1, TURBO_CHOOSE2(LEVELS, (I) + 2), TURBO_CHOOSE2(LEVELS, I))
#define TURBO_CHOOSE8(LEVELS, I) turbo_choose(m2, TURBO_CHOOSE4(LEVELS, (I) + 4), TURBO_CHOOSE4(LEVELS, I))

// indices: of four values, a byte each
uint turbo_scalar_levels(uint type, uint indices) {
    const uint m0 = turbo_mask(indices, 0);
    const uint m1 = turbo_mask(indices, 1);
    const uint m2 = turbo_mask(indices, 2);
    if (type == TURBO2_0_ID) {
        return TURBO_CHOOSE4(turbo2_levels, 0);
    }
    if (type == TURBO3_0_ID) {
        return TURBO_CHOOSE8(turbo3_levels, 0);
    }
    return turbo_choose(turbo_mask(indices, 3), TURBO_CHOOSE8(turbo4_levels, 8), TURBO_CHOOSE8(turbo4_levels, 0));
}

//
// trellis types
//

// All levels, for a table in shared memory.
#define TURBO_TRELLIS_LEVELS (TURBO2_T_LEVELS + TURBO3_T_LEVELS + TURBO4_T_LEVELS)

const int turbo_trellis_levels[TURBO_TRELLIS_LEVELS] =
    int[](TURBO2_T_FINE, TURBO2_T_COARSE, TURBO3_T_FINE, TURBO3_T_COARSE, TURBO4_T_FINE, TURBO4_T_COARSE);

// Where the levels of a codebook begin. coarse: 0 or 1
uint turbo_codebook(uint type, uint coarse) {
    return type == TURBO2_T_ID ? coarse * (TURBO2_T_LEVELS / 2) :
           type == TURBO3_T_ID ? coarse * (TURBO3_T_LEVELS / 2) + TURBO2_T_LEVELS :
                                 coarse * (TURBO4_T_LEVELS / 2) + TURBO2_T_LEVELS + TURBO3_T_LEVELS;
}

// A half of the 64-bit word of coded bits, rotated to the left.
uint turbo_rotate_coded(uint own, uint other, uint n) {
    return own << n | other >> (32 - n);
}

// Indices of four values in their codebook, a byte each. own, other: the words of coded bits of this half of the block and of the other one. low,
// high: words of plain bits; 0 where the type has none. j: which four of the half
uint turbo_trellis_indices(uint type, uint own, uint other, uint low, uint high, uint j) {
    const uint z0   = turbo_rotate_coded(own, other, 2);
    const uint z1   = own ^ turbo_rotate_coded(own, other, 1) ^ turbo_rotate_coded(own, other, 3);
    const uint step = type == TURBO2_T_ID ? 2 : 4;
    return (z0 >> j & TURBO_ONES) | (z1 >> j & TURBO_ONES) << 1 | (low >> 2 * (j / 2) & 0x03030303u) << 2 |
           (high >> j & TURBO_ONES) << step;
}

#endif  // !defined(TURBO_ATTN_LEVELS_GLSL)
