// Turbo types as K and V of upstream's attention shaders, included behind flash_attn_dequant.glsl: from here on, what those shaders ask about a type
// is asked of functions that know ours, and turn to upstream's for all others.

#include "turbo-attn-levels.glsl"

// Blocks lie at even bytes. Positions here count 16 bits.
layout (binding = 1) readonly buffer K_TURBO { uint16_t k_turbo[]; };
layout (binding = 2) readonly buffer V_TURBO { uint16_t v_turbo[]; };

// Levels of the trellis types, in units of d. The size is not made with || because shaderc's optimizer loses the operands of that.
#define TURBO_TABLE_SIZE(TYPE, OTHER) \
    ((TYPE) == TURBO2_T_ID ? TURBO_TRELLIS_LEVELS : (TYPE) == TURBO3_T_ID ? TURBO_TRELLIS_LEVELS : \
     (TYPE) == TURBO4_T_ID ? TURBO_TRELLIS_LEVELS : (OTHER))
shared FLOAT_TYPE turbo_table[TURBO_TABLE_SIZE(FaTypeK, TURBO_TABLE_SIZE(FaTypeV, 1))];

void turbo_init_shmem(uvec3 wgsize) {
    if (turbo_is_trellis(FaTypeK) || turbo_is_trellis(FaTypeV)) {
        for (uint i = gl_LocalInvocationIndex; i < TURBO_TRELLIS_LEVELS; i += wgsize.x) {
            turbo_table[i] = FLOAT_TYPE(turbo_trellis_levels[i]) / FLOAT_TYPE(TRELLIS_LEVEL_STEPS);
        }
    }
#if defined(NEEDS_INIT_IQ_SHMEM)
    init_iq_shmem(wgsize);
#endif
    barrier();
}

uint turbo_type(uint binding) {
    return binding == BINDING_IDX_K ? FaTypeK : FaTypeV;
}

// Where a block begins
uint turbo_block_at(uint block, uint binding) {
    return block * ((binding == BINDING_IDX_K ? FaBlockBytesK : FaBlockBytesV) / 2);
}

uint turbo_u16(uint at, uint binding) {
    return binding == BINDING_IDX_K ? uint(k_turbo[at]) : uint(v_turbo[at]);
}

uint turbo_u32(uint at, uint binding) {
    return turbo_u16(at, binding) | turbo_u16(at + 1, binding) << 16;
}

// Scale of the block at `at`
FLOAT_TYPE turbo_d(uint at, uint binding) {
    const uint first = turbo_u16(at, binding);
    return FLOAT_TYPE(unpackHalf2x16(turbo_is_trellis(turbo_type(binding)) ? (first & 0xff) << 7 : first).x);
}

// Levels of the four values from `value` on of a block of a scalar type, as a word of int8.
uint turbo_scalar_word(uint at, uint value, uint binding) {
    const uint type = turbo_type(binding);
    uint       indices;
    if (type == TURBO4_0_ID) {
        indices = turbo_u32(at + 1 + value % 16 / 2, binding) >> 4 * (value / 16) & 0x0f0f0f0fu;
    } else {
        indices = turbo_u32(at + 1 + value % 8 / 2, binding) >> 2 * (value / 8) & 0x03030303u;
    }
    if (type == TURBO3_0_ID) {
        indices |= (turbo_u32(at + 5, binding) >> (2 * (value / 8) + value % 8 / 4) & TURBO_ONES) << 2;
    }
    return turbo_scalar_levels(type, indices);
}

// The same of a trellis type, in units of d.
FLOAT_TYPEV4 turbo_trellis_values(uint at, uint value, uint binding) {
    const uint type   = turbo_type(binding);
    const uint part   = value / 32;  // half of the block
    const uint j      = value % 32 / 4;
    const uint own    = turbo_u32(at + 1 + 2 * part, binding);
    const uint other  = turbo_u32(at + 3 - 2 * part, binding);
    const uint coarse = turbo_u16(at, binding) >> (8 + 4 * part);

    uint low  = 0;
    uint high = 0;
    if (type != TURBO2_T_ID) {
        low = turbo_u32(at + 5 + 4 * part + 2 * (j % 2), binding);
    }
    if (type != TURBO3_T_ID) {
        high = turbo_u32(at + (type == TURBO2_T_ID ? 5 : 13) + 2 * part, binding);
    }
    const uint indices = turbo_trellis_indices(type, own, other, low, high, j);
    return FLOAT_TYPEV4(turbo_table[turbo_codebook(type, coarse & 1) + (indices & 0xff)],
                        turbo_table[turbo_codebook(type, coarse >> 1 & 1) + (indices >> 8 & 0xff)],
                        turbo_table[turbo_codebook(type, coarse >> 2 & 1) + (indices >> 16 & 0xff)],
                        turbo_table[turbo_codebook(type, coarse >> 3 & 1) + (indices >> 24)]);
}

//
// what the shaders ask
//

uint turbo_block_elems(uint type) {
    return turbo_is_trellis(type) ? QK_TRELLIS : turbo_is_scalar(type) ? QK_SCALAR : fa_block_elems(type);
}

FLOAT_TYPEV4 turbo_dequantize4(uint ib, uint iqs, uint a_offset, uint binding) {
    const uint type = turbo_type(binding);
    const uint at   = turbo_block_at(a_offset + ib, binding);
    if (turbo_is_scalar(type)) {
        return turbo_d(at, binding) * FLOAT_TYPEV4(unpack8(int32_t(turbo_scalar_word(at, iqs, binding))));
    }
    if (turbo_is_trellis(type)) {
        return turbo_d(at, binding) * turbo_trellis_values(at, iqs, binding);
    }
    return dequantize4(ib, iqs, a_offset, binding);
}

#define dequantize4 turbo_dequantize4
#define init_iq_shmem turbo_init_shmem
#define fa_type_needs_shmem(TYPE) (turbo_is_trellis(TYPE) || fa_type_needs_shmem(TYPE))
#if !defined(NEEDS_INIT_IQ_SHMEM)
#define NEEDS_INIT_IQ_SHMEM
#endif

#undef BLOCK_SIZE_K
#undef BLOCK_SIZE_V
#define BLOCK_SIZE_K turbo_block_elems(FaTypeK)
#define BLOCK_SIZE_V turbo_block_elems(FaTypeV)
