// Scalar turbo types: eight neighbouring invocations have a block, number l of them values l, l + 8, l + 16 and l + 24. They share sums in
// shared memory, so that the size of a subgroup does not matter. Contract: turbo/scalar.h, reference: turbo/scalar.c.

const uint LANES = 8;

#include "turbo-arithmetic.glsl"
#include "turbo-lanes.glsl"

const int  turbo_magnitudes[] = { OF_TYPE(_MAGNITUDES) };
const uint TURBO_N_MAGNITUDES = OF_TYPE(_LEVELS) / 2;

const uint RULE_LEAST_SQUARES = 0;  // enum ggml_turbo_scale
const uint RULE_MATCHED_NORM  = 1;
const uint RULE_INNER_PRODUCT = 2;

shared uint turbo_shared_codes[GROUP];

// d of a block as bits of fp16, as scalar_block_scale (turbo/scalar-impl.h) has it
uint turbo_fitted_scale(int tc, int cc, int tt, float unit) {
    const float   num   = float(p.scale_rule == RULE_LEAST_SQUARES ? tc : tt);
    const float   den   = float(p.scale_rule == RULE_INNER_PRODUCT ? tc : cc);
    const float   ratio = turbo_divide(num, den);
    precise float d     = (p.scale_rule == RULE_MATCHED_NORM ? turbo_sqrt(ratio) : ratio) * unit;
    return turbo_float_to_half(floatBitsToUint(min(d, SCALAR_HALF_MAX)));
}

// The byte of qs with two bits of each of the four indices of a lane, which stand in the bytes of code
uint turbo_low_bits(uint code) {
    const uint low = code & 0x03030303u;
    return (low | low >> 6 | low >> 12 | low >> 18) & 0xffu;
}

// Bit 2 of the four indices of a lane, at bits 0, 2, 4, 6
uint turbo_high_bits(uint code) {
    const uint high = code >> 2 & 0x01010101u;
    return (high | high >> 6 | high >> 12 | high >> 18) & 0x55u;
}

// Byte i of a block after d. first: number of the block's first invocation
uint turbo_packed_byte(uint first, uint i) {
    if (OF_TYPE(_BITS) == 4) {  // values l and l + 16, or l + 8 and l + 24
        const uint code = turbo_shared_codes[first + i % LANES] >> 8 * (i / LANES);
        return (code & 15u) | (code >> 12 & 0xf0u);
    }
    if (i < LANES) {
        return turbo_low_bits(turbo_shared_codes[first + i]);
    }
    const uint k = i - LANES;
    return turbo_high_bits(turbo_shared_codes[first + k]) | turbo_high_bits(turbo_shared_codes[first + k + 4]) << 1;
}

// code: indices of the lane's values, a byte for each. block: where it is in dst. All invocations of the workgroup take part.
void turbo_store(uint block, uint d, uint code, bool store) {
    turbo_shared_codes[gl_LocalInvocationID.x] = code;
    barrier();
    if (!store) {
        return;
    }
    const uint lane  = turbo_lane();
    const uint first = turbo_first_lane();
    if (lane == 0) {
        dst16[block / 2] = uint16_t(d);
    }
    if (lane < OF_TYPE(_BLOCK_BYTES) / 2 - 1) {
        const uint word = turbo_packed_byte(first, 2 * lane) | turbo_packed_byte(first, 2 * lane + 1) << 8;
        dst16[block / 2 + 1 + lane] = uint16_t(word);
    }
}
