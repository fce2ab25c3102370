// What the shaders that read and write rows of turbo types share: tensors, places of blocks, floats as bits.
//
// A shader counts the blocks of one tensor and finds the place of each in both: either indices name the rows of the other one (SET_ROWS,
// GET_ROWS), or it has as many blocks in the same order (CPY). Blocks begin at even bytes, so they are read and written as 16-bit words.

#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_16bit_storage : require

#include "turbo-tables.glsl"

layout (local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

// type of the tensor of floats
layout (constant_id = 1) const uint FLOATS = 0;
const uint FLOATS_F32  = 0;
const uint FLOATS_F16  = 1;
const uint FLOATS_BF16 = 2;

// whether indices name the rows of the tensor that is not counted
layout (constant_id = 2) const bool BY_INDEX = false;

#define TURBO_PASTE2(a, b) a##b
#define TURBO_PASTE(a, b) TURBO_PASTE2(a, b)
// A constant of the type that the shader is compiled for
#define OF_TYPE(NAME) TURBO_PASTE(TYPE, NAME)

//
// tensors
//

// In blocks of as many values as a block of the turbo type has; distances in bytes. value: distance of two values of a block of floats
struct turbo_view {
    uint offset;
    uint ne0, ne1, ne2;
    uint nb0, nb1, nb2, nb3;
    uint value;
};

layout (push_constant) uniform parameter {
    turbo_view src;
    turbo_view dst;
    uint       index_offset;
    uint       index_ne1, index_ne2;
    uint       index_nb0, index_nb1, index_nb2;
    uint       n_blocks;
    uint       scale_rule;
} p;

layout (binding = 0) readonly buffer SRC16 { uint16_t src16[]; };
layout (binding = 0) readonly buffer SRC32 { uint src32[]; };
layout (binding = 1) buffer DST16 { uint16_t dst16[]; };
layout (binding = 1) buffer DST32 { uint dst32[]; };
layout (binding = 2) readonly buffer INDICES { uint indices[]; };

uint turbo_workgroup() {
    return gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
}

//
// places: block x of row y of matrix z, w
//

uvec4 turbo_place(turbo_view v, uint i_block) {
    const uint row    = i_block / v.ne0;
    const uint matrix = row / v.ne1;
    const uint outer  = matrix / v.ne2;
    return uvec4(i_block - row * v.ne0, row - matrix * v.ne1, matrix - outer * v.ne2, outer);
}

uint turbo_offset(turbo_view v, uvec4 place) {
    return v.offset + place.x * v.nb0 + place.y * v.nb1 + place.z * v.nb2 + place.w * v.nb3;
}

// Where the block at place of the counted tensor is in the other one. Of 64-bit indices the low words are read; indices are repeated over
// dimensions 2 and 3.
uint turbo_other_offset(turbo_view other, uint i_block, uvec4 place) {
    if (!BY_INDEX) {
        return turbo_offset(other, turbo_place(other, i_block));
    }
    const uint at = p.index_offset + place.y * p.index_nb0 + place.z % p.index_ne1 * p.index_nb1 +
                    place.w % p.index_ne2 * p.index_nb2;
    return turbo_offset(other, uvec4(place.x, indices[at / 4], place.zw));
}

//
// floats as bits, converted in integers: devices may flush what is small, and round as they like
//

uint turbo_half_to_float(uint half_bits) {
    const uint sign      = (half_bits & 0x8000u) << 16;
    const uint magnitude = half_bits & 0x7fffu;
    if (magnitude < 0x0400u) {  // in units of 2^-24
        return sign | floatBitsToUint(float(magnitude) * 5.9604644775390625e-8f);
    }
    return sign | ((magnitude << 13) + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u));
}

// To the nearest, ties to even
uint turbo_float_to_half(uint float_bits) {
    const uint sign      = float_bits >> 16 & 0x8000u;
    const uint magnitude = float_bits & 0x7fffffffu;
    if (magnitude > TURBO_INFINITY_BITS) {
        return sign | SCALAR_HALF_NAN;
    }
    if (magnitude >= 0x477ff000u) {  // 65520
        return sign | 0x7c00u;
    }
    if (magnitude < 0x38800000u) {  // 2^-14
        return sign | uint(roundEven(uintBitsToFloat(magnitude) * 16777216.0f));
    }
    const uint rebased = magnitude - 0x38000000u;
    return sign | (rebased + 0x0fffu + (rebased >> 13 & 1u)) >> 13;
}

uint turbo_float_to_bf16(uint float_bits) {
    const bool is_nan = (float_bits & 0x7fffffffu) > TURBO_INFINITY_BITS;
    return is_nan ? float_bits >> 16 | 64u : (float_bits + 0x7fffu + (float_bits >> 16 & 1u)) >> 16;
}

uint turbo_read_float(uint offset) {
    switch (FLOATS) {
        case FLOATS_F16:  return turbo_half_to_float(uint(src16[offset / 2]));
        case FLOATS_BF16: return uint(src16[offset / 2]) << 16;
        default:          return src32[offset / 4];
    }
}

void turbo_write_float(uint offset, uint float_bits) {
    switch (FLOATS) {
        case FLOATS_F16:  dst16[offset / 2] = uint16_t(turbo_float_to_half(float_bits)); break;
        case FLOATS_BF16: dst16[offset / 2] = uint16_t(turbo_float_to_bf16(float_bits)); break;
        default:          dst32[offset / 4] = float_bits;
    }
}
