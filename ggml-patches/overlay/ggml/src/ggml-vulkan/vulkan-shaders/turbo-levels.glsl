// Indices of the levels of a block, four values at a time, as bytes of a word: byte b belongs to value 4j + b. Formats: turbo/scalar.h,
// turbo/trellis.h.
//
// Who includes this defines TURBO_BLOCK, the type of what a block is known by, and turbo_block_word(block, i), its word i after its first two
// bytes.

#include "turbo-tables.glsl"

const uint TURBO_ONES = 0x01010101u;

uint turbo_four_of_scalar(uint bits, TURBO_BLOCK block, uint j) {
    if (bits == 4) {
        return turbo_block_word(block, j % 4) >> 4 * (j / 4) & 0x0f0f0f0fu;
    }
    uint four = turbo_block_word(block, j % 2) >> 2 * (j / 2) & 0x03030303u;
    if (bits == 3) {
        four |= (turbo_block_word(block, 2) >> j & TURBO_ONES) << 2;
    }
    return four;
}

// A half of the 64-bit word of coded bits, rotated to the left
uint turbo_rotated(uint own, uint other, uint n) {
    return own << n | other >> (32 - n);
}

// Among the levels of both codebooks. selectors: the second byte of the block
uint turbo_four_of_trellis(uint bits, TURBO_BLOCK block, uint selectors, uint j) {
    const uint half_block = j / 8;
    const uint shift      = j % 8;

    const uint own   = turbo_block_word(block, half_block);
    const uint other = turbo_block_word(block, 1 - half_block);
    const uint z0    = turbo_rotated(own, other, 2);
    const uint z1    = own ^ turbo_rotated(own, other, 1) ^ turbo_rotated(own, other, 3);

    uint four = (z0 >> shift & TURBO_ONES) | (z1 >> shift & TURBO_ONES) << 1;
    if (bits >= 3) {
        four |= (turbo_block_word(block, 2 + 2 * half_block + shift % 2) >> 2 * (shift / 2) & 0x03030303u) << 2;
    }
    if (bits != 3) {
        four |= (turbo_block_word(block, 2 * bits - 2 + half_block) >> shift & TURBO_ONES) << bits;
    }
    const uint coarse = (selectors >> 4 * half_block & 15u) * 0x00204081u & TURBO_ONES;  // bit b goes to byte b
    return four | coarse << (bits + 1);
}
