// Turbo types as K and V of upstream's attention shaders, included behind flash_attn_dequant.glsl: from here on, what those shaders ask about a type
// is asked of functions that know ours, and turn to upstream's for all others.

#include "turbo-tables.glsl"

// Functions, because shaderc's optimizer loses operands of || and ! on specialization constants.
bool turbo_is_scalar(uint type) {
    return type == TURBO2_0_ID || type == TURBO3_0_ID || type == TURBO4_0_ID;
}

bool turbo_is_trellis(uint type) {
    return type == TURBO2_T_ID || type == TURBO3_T_ID || type == TURBO4_T_ID;
}

bool turbo_is(uint type) {
    return turbo_is_scalar(type) || turbo_is_trellis(type);
}

uint turbo_bits(uint type) {
    switch (type) {
        case TURBO2_0_ID: return TURBO2_0_BITS;
        case TURBO3_0_ID: return TURBO3_0_BITS;
        case TURBO4_0_ID: return TURBO4_0_BITS;
        case TURBO2_T_ID: return TURBO2_T_BITS;
        case TURBO3_T_ID: return TURBO3_T_BITS;
        default:          return TURBO4_T_BITS;
    }
}

//
// words of a block
//

// Blocks lie at even bytes. Positions count 16 bits.
layout (binding = 1) readonly buffer K_TURBO { uint16_t k_turbo[]; };
layout (binding = 2) readonly buffer V_TURBO { uint16_t v_turbo[]; };

#define TURBO_BLOCK uvec2  // position of its first two bytes, binding

// i times the 16-bit words of a block, by shifts: a product of 32 bits takes four times as long on many GPUs.
uint turbo_times_words(uint i, uint words) {
    uint product = (words & 1) != 0 ? i : 0;
    product += (words & 2) != 0 ? i << 1 : 0;
    product += (words & 4) != 0 ? i << 2 : 0;
    product += (words & 8) != 0 ? i << 3 : 0;
    product += (words & 16) != 0 ? i << 4 : 0;
    return product;
}

TURBO_BLOCK turbo_block(uint i, uint binding) {
    return uvec2(turbo_times_words(i, (binding == BINDING_IDX_K ? FaBlockBytesK : FaBlockBytesV) / 2), binding);
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

// Indices of values 4j .. 4j + 3 among the levels of their type, a byte each
uint turbo_four(uint type, TURBO_BLOCK block, uint j) {
    return turbo_is_trellis(type) ? turbo_four_of_trellis(turbo_bits(type), block, turbo_block_head(block) >> 8, j) :
                                    turbo_four_of_scalar(turbo_bits(type), block, j);
}

float turbo_scale(uint type, TURBO_BLOCK block) {
    const uint head = turbo_block_head(block);
    return unpackHalf2x16(turbo_is_trellis(type) ? (head & 0xff) << 7 : head).x;
}

//
// levels: a table in shared memory, in units of the block's scale
//
// Logic on words of four values, a bit-field insert for each choice, takes more by Mesa's estimate (docs/lab/0019-vulkan.md).

const uint TURBO3_0_FIRST = TURBO2_0_LEVELS;
const uint TURBO4_0_FIRST = TURBO3_0_FIRST + TURBO3_0_LEVELS;
const uint TURBO2_T_FIRST = TURBO4_0_FIRST + TURBO4_0_LEVELS;
const uint TURBO3_T_FIRST = TURBO2_T_FIRST + TURBO2_T_LEVELS;
const uint TURBO4_T_FIRST = TURBO3_T_FIRST + TURBO3_T_LEVELS;
const uint TURBO_N_LEVELS = TURBO4_T_FIRST + TURBO4_T_LEVELS;

const uint turbo_level_words[TURBO_N_LEVELS / 4] =
    uint[](TURBO2_0_WORDS, TURBO3_0_WORDS, TURBO4_0_WORDS, TURBO2_T_WORDS, TURBO3_T_WORDS, TURBO4_T_WORDS);

shared FLOAT_TYPE turbo_table[TURBO_N_LEVELS];
#if defined(MMQ)
shared uint turbo_bytes[TURBO_N_LEVELS];  // the same as int8
#endif

uint turbo_first(uint type) {
    switch (type) {
        case TURBO2_0_ID: return 0;
        case TURBO3_0_ID: return TURBO3_0_FIRST;
        case TURBO4_0_ID: return TURBO4_0_FIRST;
        case TURBO2_T_ID: return TURBO2_T_FIRST;
        case TURBO3_T_ID: return TURBO3_T_FIRST;
        default:          return TURBO4_T_FIRST;
    }
}

void turbo_init_shmem(uvec3 wgsize) {
    if (turbo_is(FaTypeK) || turbo_is(FaTypeV)) {
        for (uint i = gl_LocalInvocationIndex; i < TURBO_N_LEVELS; i += wgsize.x) {
            const int level = bitfieldExtract(int(turbo_level_words[i / 4]), int(8 * (i % 4)), 8);
            turbo_table[i]  = FLOAT_TYPE(level) / FLOAT_TYPE(i < TURBO2_T_FIRST ? 1 : TRELLIS_LEVEL_STEPS);
#if defined(MMQ)
            turbo_bytes[i] = uint(level & 0xff);
#endif
        }
    }
#if defined(NEEDS_INIT_IQ_SHMEM)
    init_iq_shmem(wgsize);
#endif
    barrier();
}

//
// what the shaders ask
//

uint turbo_block_elems(uint type) {
    return turbo_is_trellis(type) ? QK_TRELLIS : turbo_is_scalar(type) ? QK_SCALAR : fa_block_elems(type);
}

FLOAT_TYPEV4 turbo_dequantize4(uint ib, uint iqs, uint a_offset, uint binding) {
    const uint type = binding == BINDING_IDX_K ? FaTypeK : FaTypeV;
    if (!turbo_is(type)) {
        return dequantize4(ib, iqs, a_offset, binding);
    }
    const TURBO_BLOCK block = turbo_block(a_offset + ib, binding);
    const uint        first = turbo_first(type);
    const uint        four  = turbo_four(type, block, iqs / 4);
    return FLOAT_TYPE(turbo_scale(type, block)) *
           FLOAT_TYPEV4(turbo_table[first + (four & 0xff)], turbo_table[first + (four >> 8 & 0xff)],
                        turbo_table[first + (four >> 16 & 0xff)], turbo_table[first + (four >> 24)]);
}

#define dequantize4 turbo_dequantize4
#define init_iq_shmem turbo_init_shmem
#define fa_type_needs_shmem(TYPE) (turbo_is(TYPE) || fa_type_needs_shmem(TYPE))
#if !defined(NEEDS_INIT_IQ_SHMEM)
#define NEEDS_INIT_IQ_SHMEM
#endif

#undef BLOCK_SIZE_K
#undef BLOCK_SIZE_V
#define BLOCK_SIZE_K turbo_block_elems(FaTypeK)
#define BLOCK_SIZE_V turbo_block_elems(FaTypeV)
