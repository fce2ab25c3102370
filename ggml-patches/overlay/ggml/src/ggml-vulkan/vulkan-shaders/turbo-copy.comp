#version 450
#extension GL_GOOGLE_include_directive : require

// CPY of blocks as they are, for all turbo types: an invocation for each 16-bit word.

#include "turbo-rows.glsl"

void main() {
    const uint words   = p.src.nb0 / 2;
    const uint i       = turbo_workgroup() * gl_WorkGroupSize.x + gl_LocalInvocationID.x;
    const uint i_block = i / words;
    if (i_block >= p.n_blocks) {
        return;
    }
    const uint from = turbo_offset(p.src, turbo_place(p.src, i_block)) / 2;
    const uint to   = turbo_offset(p.dst, turbo_place(p.dst, i_block)) / 2;
    dst16[to + i % words] = src16[from + i % words];
}
