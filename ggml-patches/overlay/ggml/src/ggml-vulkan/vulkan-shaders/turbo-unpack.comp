#version 450
#extension GL_GOOGLE_include_directive : require

// GET_ROWS and CPY from a turbo type: an invocation for each four values, blocks counted in dst.

#include "turbo-rows.glsl"

uint turbo_block_word(uint block, uint i) {
    const uint at = block / 2 + 1 + 2 * i;
    return uint(src16[at]) | uint(src16[at + 1]) << 16;
}

#include "turbo-levels.glsl"

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

    const uint  head   = uint(src16[block / 2]);
    const float d      = turbo_block_scale(head);
    const ivec4 levels = turbo_levels(turbo_four_indices(block, head, j));
    [[unroll]] for (uint k = 0; k < 4; ++k) {
        turbo_write_float(first + k * p.dst.value, floatBitsToUint(d * float(levels[k])));
    }
}
