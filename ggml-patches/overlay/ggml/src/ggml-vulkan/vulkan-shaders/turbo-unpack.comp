#version 450
#extension GL_GOOGLE_include_directive : require

// GET_ROWS and CPY from a turbo type: an invocation for each four values, blocks counted in dst.

#include "turbo-rows.glsl"

#define TURBO_BLOCK uint  // offset

uint turbo_block_word(uint block, uint i) {
    const uint at = block / 2 + 1 + 2 * i;
    return uint(src16[at]) | uint(src16[at + 1]) << 16;
}

#include "turbo-levels.glsl"

const uint turbo_level_words[] = { OF_TYPE(_WORDS) };

int turbo_level(uint i) {
    return bitfieldExtract(int(turbo_level_words[i >> 2]), int(8 * (i & 3u)), 8);
}

const bool turbo_is_trellis = OF_TYPE(_BLOCK) == QK_TRELLIS;

// Indices of values 4j .. 4j + 3, a byte for each. head: the first two bytes of the block
uint turbo_four_indices(uint block, uint head, uint j) {
    return turbo_is_trellis ? turbo_four_of_trellis(OF_TYPE(_BITS), block, head >> 8, j) :
                              turbo_four_of_scalar(OF_TYPE(_BITS), block, j);
}

// What a level is in units of, in binary32
float turbo_block_scale(uint head) {
    return turbo_is_trellis ? uintBitsToFloat(turbo_half_to_float((head & 0xffu) << 7)) * (1.0f / TRELLIS_LEVEL_STEPS) :
                              uintBitsToFloat(turbo_half_to_float(head));
}

void main() {
    const uint per_block = OF_TYPE(_BLOCK) / 4;
    const uint i         = turbo_workgroup() * gl_WorkGroupSize.x + gl_LocalInvocationID.x;
    const uint i_block   = i / per_block;
    const uint j         = i % per_block;
    if (i_block >= p.n_blocks) {
        return;
    }
    const uvec4 place = turbo_place(p.dst, i_block);
    const uint  block = turbo_other_offset(p.src, i_block, place);
    const uint  first = turbo_offset(p.dst, place) + 4 * j * p.dst.value;

    const uint  head = uint(src16[block / 2]);
    const float d    = turbo_block_scale(head);
    const uint  four = turbo_four_indices(block, head, j);
    [[unroll]] for (uint k = 0; k < 4; ++k) {
        const int level = turbo_level(four >> 8 * k & 0xffu);
        turbo_write_float(first + k * p.dst.value, floatBitsToUint(d * float(level)));
    }
}
