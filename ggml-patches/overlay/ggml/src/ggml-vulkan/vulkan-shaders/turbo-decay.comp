#version 450
#extension GL_GOOGLE_include_directive : require

// Decay of the blocks of a contiguous tensor, in place: ggml_turbo_decay_row of turbo/scalar.c, bit for bit.

#include "turbo-rows.glsl"
#include "turbo-scalar.glsl"

uint turbo_byte(uint block, uint i) {
    return uint(dst16[(block + 2 + i) / 2]) >> 8 * (i % 2) & 0xffu;
}

// Indices of the lane's values, a byte for each
uint turbo_load_indices(uint block, uint lane) {
    if (OF_TYPE(_BITS) == 4) {
        const uint even = turbo_byte(block, lane);  // values l and l + 16
        const uint odd  = turbo_byte(block, lane + LANES);
        return (even & 15u) | (odd & 15u) << 8 | (even >> 4) << 16 | (odd >> 4) << 24;
    }
    const uint low  = turbo_byte(block, lane);
    const uint high = turbo_byte(block, LANES + lane % 4) >> lane / 4;
    return (low & 3u) | (low & 0x0cu) << 6 | (low & 0x30u) << 12 | (low & 0xc0u) << 18 |
           ((high & 1u) | (high & 4u) << 6 | (high & 16u) << 12 | (high & 64u) << 18) << 2;
}

// The magnitude of an index: of n, the m-th has index n + m, or n - 1 - m where negative.
int turbo_magnitude(uint index) {
    return turbo_magnitudes[index >= TURBO_N_MAGNITUDES ? index - TURBO_N_MAGNITUDES : TURBO_N_MAGNITUDES - 1 - index];
}

void main() {
    const uint lane    = turbo_lane();
    const uint i_block = turbo_block_number();
    const bool is_ours = i_block < p.n_blocks;
    const uint block   = p.dst.offset + i_block * OF_TYPE(_BLOCK_BYTES);

    const uint indices = is_ours ? turbo_load_indices(block, lane) : 0;
    const uint d       = is_ours ? uint(dst16[block / 2]) : 0;
    const uint is_high = indices >> (OF_TYPE(_BITS) - 1) & 0x01010101u;
    const uint kept    = (indices & 0xfefefefeu) | is_high;

    int tc = 0;
    int cc = 0;
    int tt = 0;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        const int t = turbo_magnitude(indices >> 8 * i & 0xffu);
        const int c = turbo_magnitude(kept >> 8 * i & 0xffu);
        tc += t * c;
        cc += c * c;
        tt += t * t;
    }
    memoryBarrierBuffer();  // all lanes have read what is written below
    tc = int(turbo_sum(uint(tc)));
    cc = int(turbo_sum(uint(cc)));
    tt = int(turbo_sum(uint(tt)));

    const float unit      = uintBitsToFloat(turbo_half_to_float(d));
    const bool  is_finite = (d & 0x7c00u) != 0x7c00u;
    turbo_store(block, turbo_fitted_scale(tc, cc, tt, unit), kept, is_ours && is_finite);
}
