// Turbo types as K and V of upstream's attention shaders, included behind flash_attn_dequant.glsl: from here on, what those shaders ask about a type
// is asked of functions that know ours, and turn to upstream's for all others.

#include "turbo-tables.glsl"

#define TURBO_IS_SCALAR(TYPE) ((TYPE) == TURBO2_0_ID || (TYPE) == TURBO3_0_ID || (TYPE) == TURBO4_0_ID)
#define TURBO_IS_TRELLIS(TYPE) ((TYPE) == TURBO2_T_ID || (TYPE) == TURBO3_T_ID || (TYPE) == TURBO4_T_ID)

//
// words of a block
//

// Blocks lie at even bytes. Positions count 16 bits.
layout (binding = 1) readonly buffer K_TURBO { uint16_t k_turbo[]; };
layout (binding = 2) readonly buffer V_TURBO { uint16_t v_turbo[]; };

#define TURBO_BLOCK uvec2  // position of its first two bytes, binding

TURBO_BLOCK turbo_block(uint i, uint binding) {
    return uvec2(i * ((binding == BINDING_IDX_K ? FaBlockBytesK : FaBlockBytesV) / 2), binding);
}

uint turbo_u16(uint at, uint binding) {
    return binding == BINDING_IDX_K ? uint(k_turbo[at]) : uint(v_turbo[at]);
}

uint turbo_block_head(TURBO_BLOCK block) {
    return turbo_u16(block.x, block.y);
}

uint turbo_block_word(TURBO_BLOCK block, uint i) {
    const uint at = block.x + 1 + 2 * i;
    return turbo_u16(at, block.y) | turbo_u16(at + 1, block.y) << 16;
}

#include "turbo-levels.glsl"

//
// scalar types
//
// Which level an index means is chosen by logic on words of four values: GPUs make a choice in one instruction (bit-field insert, logic of three
// inputs), so four values take 3, 7 or 15 of them.

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

// Levels of values 4j .. 4j + 3, as a word of int8.
uint turbo_scalar_levels(uint type, TURBO_BLOCK block, uint j) {
    const uint bits = type == TURBO2_0_ID ? TURBO2_0_BITS : type == TURBO3_0_ID ? TURBO3_0_BITS : TURBO4_0_BITS;
    const uint four = turbo_four_of_scalar(bits, block, j);
    const uint m0   = turbo_mask(four, 0);
    const uint m1   = turbo_mask(four, 1);
    const uint m2   = turbo_mask(four, 2);
    if (type == TURBO2_0_ID) {
        return TURBO_CHOOSE4(turbo2_levels, 0);
    }
    if (type == TURBO3_0_ID) {
        return TURBO_CHOOSE8(turbo3_levels, 0);
    }
    return turbo_choose(turbo_mask(four, 3), TURBO_CHOOSE8(turbo4_levels, 8), TURBO_CHOOSE8(turbo4_levels, 0));
}

float turbo_scalar_scale(TURBO_BLOCK block) {
    return unpackHalf2x16(turbo_block_head(block)).x;
}

//
// trellis types
//
// They have too many levels for that: a table in shared memory has those of all of them, in units of d.

const uint TURBO2_T_FIRST = 0;
const uint TURBO3_T_FIRST = TURBO2_T_LEVELS;
const uint TURBO4_T_FIRST = TURBO2_T_LEVELS + TURBO3_T_LEVELS;
const uint TURBO_T_LEVELS = TURBO2_T_LEVELS + TURBO3_T_LEVELS + TURBO4_T_LEVELS;

const int turbo_trellis_levels[TURBO_T_LEVELS] =
    int[](TURBO2_T_FINE, TURBO2_T_COARSE, TURBO3_T_FINE, TURBO3_T_COARSE, TURBO4_T_FINE, TURBO4_T_COARSE);

// The size is not made with ||, whose operands shaderc's optimizer loses.
#define TURBO_TABLE_SIZE(TYPE, OTHER)                                                                        \
    ((TYPE) == TURBO2_T_ID ? TURBO_T_LEVELS : (TYPE) == TURBO3_T_ID ? TURBO_T_LEVELS : (TYPE) == TURBO4_T_ID ? \
                                                                      TURBO_T_LEVELS :                       \
                                                                      (OTHER))
shared FLOAT_TYPE turbo_table[TURBO_TABLE_SIZE(FaTypeK, TURBO_TABLE_SIZE(FaTypeV, 1))];

void turbo_init_shmem(uvec3 wgsize) {
    if (TURBO_IS_TRELLIS(FaTypeK) || TURBO_IS_TRELLIS(FaTypeV)) {
        for (uint i = gl_LocalInvocationIndex; i < TURBO_T_LEVELS; i += wgsize.x) {
            turbo_table[i] = FLOAT_TYPE(turbo_trellis_levels[i]) / FLOAT_TYPE(TRELLIS_LEVEL_STEPS);
        }
    }
#if defined(NEEDS_INIT_IQ_SHMEM)
    init_iq_shmem(wgsize);
#endif
    barrier();
}

// Values 4j .. 4j + 3
FLOAT_TYPEV4 turbo_trellis_values(uint type, TURBO_BLOCK block, uint j) {
    const uint bits  = type == TURBO2_T_ID ? TURBO2_T_BITS : type == TURBO3_T_ID ? TURBO3_T_BITS : TURBO4_T_BITS;
    const uint first = type == TURBO2_T_ID ? TURBO2_T_FIRST : type == TURBO3_T_ID ? TURBO3_T_FIRST : TURBO4_T_FIRST;
    const uint head  = turbo_block_head(block);
    const uint four  = turbo_four_of_trellis(bits, block, head >> 8, j);

    const FLOAT_TYPE d = FLOAT_TYPE(unpackHalf2x16((head & 0xff) << 7).x);
    return d * FLOAT_TYPEV4(turbo_table[first + (four & 0xff)], turbo_table[first + (four >> 8 & 0xff)],
                            turbo_table[first + (four >> 16 & 0xff)], turbo_table[first + (four >> 24)]);
}

//
// what the shaders ask
//

uint turbo_block_elems(uint type) {
    return TURBO_IS_TRELLIS(type) ? QK_TRELLIS : TURBO_IS_SCALAR(type) ? QK_SCALAR : fa_block_elems(type);
}

FLOAT_TYPEV4 turbo_dequantize4(uint ib, uint iqs, uint a_offset, uint binding) {
    const uint        type  = binding == BINDING_IDX_K ? FaTypeK : FaTypeV;
    const TURBO_BLOCK block = turbo_block(a_offset + ib, binding);
    if (TURBO_IS_SCALAR(type)) {
        const i8vec4 levels = unpack8(int32_t(turbo_scalar_levels(type, block, iqs / 4)));
        return FLOAT_TYPE(turbo_scalar_scale(block)) * FLOAT_TYPEV4(levels);
    }
    return TURBO_IS_TRELLIS(type) ? turbo_trellis_values(type, block, iqs / 4) : dequantize4(ib, iqs, a_offset, binding);
}

#define dequantize4 turbo_dequantize4
#define init_iq_shmem turbo_init_shmem
#define fa_type_needs_shmem(TYPE) (TURBO_IS_TRELLIS(TYPE) || fa_type_needs_shmem(TYPE))
#if !defined(NEEDS_INIT_IQ_SHMEM)
#define NEEDS_INIT_IQ_SHMEM
#endif

#undef BLOCK_SIZE_K
#undef BLOCK_SIZE_V
#define BLOCK_SIZE_K turbo_block_elems(FaTypeK)
#define BLOCK_SIZE_V turbo_block_elems(FaTypeV)
