// Levels of a block of turbo type TYPE, four at a time; formats: turbo/scalar.h, turbo/trellis.h.
//
// turbo_block_word(block, i), which the shader defines first, is word i of a block after its first two bytes.

const uint turbo_level_words[] = { OF_TYPE(_WORDS) };

int turbo_level(uint i) {
    return bitfieldExtract(int(turbo_level_words[i >> 2]), int(8 * (i & 3u)), 8);
}

ivec4 turbo_levels(uint four) {
    return ivec4(turbo_level(four & 0xffu), turbo_level(four >> 8 & 0xffu), turbo_level(four >> 16 & 0xffu),
                 turbo_level(four >> 24));
}

uint turbo_four_of_scalar(uint block, uint j) {
    if (OF_TYPE(_BITS) == 4) {
        return turbo_block_word(block, j % 4) >> 4 * (j / 4) & 0x0f0f0f0fu;
    }
    uint four = turbo_block_word(block, j % 2) >> 2 * (j / 2) & 0x03030303u;
    if (OF_TYPE(_BITS) == 3) {
        four |= (turbo_block_word(block, 2) >> j & 0x01010101u) << 2;
    }
    return four;
}

// A half of the 64-bit word of coded bits, rotated to the left
uint turbo_rotated(uint own, uint other, uint n) {
    return own << n | other >> (32 - n);
}

// Indices among the levels of both codebooks
uint turbo_four_of_trellis(uint block, uint selectors, uint j) {
    const uint half_block = j / 8;
    const uint shift      = j % 8;

    const uint own   = turbo_block_word(block, half_block);
    const uint other = turbo_block_word(block, 1 - half_block);
    const uint z0    = turbo_rotated(own, other, 2);
    const uint z1    = own ^ turbo_rotated(own, other, 1) ^ turbo_rotated(own, other, 3);

    uint four = (z0 >> shift & 0x01010101u) | (z1 >> shift & 0x01010101u) << 1;
    if (OF_TYPE(_BITS) >= 3) {
        four |= (turbo_block_word(block, 2 + 2 * half_block + shift % 2) >> 2 * (shift / 2) & 0x03030303u) << 2;
    }
    if (OF_TYPE(_BITS) != 3) {
        const uint high = turbo_block_word(block, 2 * OF_TYPE(_BITS) - 2 + half_block) >> shift & 0x01010101u;
        four |= high << OF_TYPE(_BITS);
    }
    const uint books = (selectors >> 4 * half_block & 15u) * 0x00204081u & 0x01010101u;  // bit b goes to byte b
    return four | books * (OF_TYPE(_LEVELS) / 2);
}

const bool turbo_is_trellis = OF_TYPE(_BLOCK) == QK_TRELLIS;

// Indices of values 4j .. 4j + 3, a byte for each. head: the first two bytes of the block
uint turbo_four_indices(uint block, uint head, uint j) {
    return turbo_is_trellis ? turbo_four_of_trellis(block, head >> 8, j) : turbo_four_of_scalar(block, j);
}

// What a level is in units of, in binary32
float turbo_block_scale(uint head) {
    return turbo_is_trellis ? uintBitsToFloat(turbo_half_to_float((head & 0xffu) << 7)) / TRELLIS_LEVEL_STEPS :
                              uintBitsToFloat(turbo_half_to_float(head));
}
