// K of turbo types in upstream's integer dot products, included behind flash_attn_mmq_funcs.glsl; see turbo-attn.glsl. Levels are int8, so 32 values
// are a block of q8_0 once they are unpacked, and have the same place in shared memory.

int32_t turbo_k_qs(uint ib, uint iqs, uint a_offset) {
    if (!turbo_is(FaTypeK)) {
        return get_k_qs(ib, iqs, a_offset);
    }
    const uint first = turbo_first(FaTypeK);
    const uint four  = turbo_four(FaTypeK, turbo_block(a_offset + ib, BINDING_IDX_K), iqs / 4);
    return int32_t(turbo_bytes[first + (four & 0xff)] | turbo_bytes[first + (four >> 8 & 0xff)] << 8 |
                   turbo_bytes[first + (four >> 16 & 0xff)] << 16 | turbo_bytes[first + (four >> 24)] << 24);
}

FLOAT_TYPEV2 turbo_k_scale(uint ib, uint a_offset) {
    if (!turbo_is(FaTypeK)) {
        return get_k_scale(ib, a_offset);
    }
    const float steps = turbo_is_trellis(FaTypeK) ? TRELLIS_LEVEL_STEPS : 1;
    return FLOAT_TYPEV2(turbo_scale(FaTypeK, turbo_block(a_offset + ib, BINDING_IDX_K)) / steps, 0.0);
}

// The 32 values from iqs on
fa_k_qs_block8 turbo_k_qs_block8(uint ib, uint iqs, uint a_offset) {
    if (!turbo_is(FaTypeK)) {
        return get_k_qs_block8(ib, a_offset);
    }
    fa_k_qs_block8 r;
    [[unroll]] for (uint d = 0; d < 8; ++d) {
        r.qs[d] = turbo_k_qs(ib, iqs + 4 * d, a_offset);
    }
    return r;
}

// part: which 32 values of the row
void turbo_k_block_to_shmem(uint buf_ib, uint global_ib, uint part, uint iqs, uint a_offset) {
    if (!turbo_is(FaTypeK)) {
        k_block_to_shmem(buf_ib, global_ib, iqs, a_offset);
        return;
    }
    const uint per_block = BLOCK_SIZE_K / 32;
    const uint ib        = global_ib - part + part / per_block;

    kblocksh[buf_ib].qs[iqs] = turbo_k_qs(ib, 32 * (part % per_block) + 4 * iqs, a_offset);
    if (iqs == 0) {
        kblocksh[buf_ib].dm = turbo_k_scale(ib, a_offset);
    }
}

int32_t turbo_k_qs_shmem(uint buf_ib, uint pos) {
    return turbo_is(FaTypeK) ? kblocksh[buf_ib].qs[pos] : get_k_qs_shmem(buf_ib, pos);
}

#define get_k_qs turbo_k_qs
#define get_k_scale turbo_k_scale
#define get_k_qs_shmem turbo_k_qs_shmem
// Upstream counts 32 values as a block and leaves out where in it they begin; both are known where these are called.
#define get_k_qs_block8(IB, OFFSET) turbo_k_qs_block8(IB, iqs, OFFSET)
#define k_block_to_shmem(BUF_IB, GLOBAL_IB, IQS, OFFSET) turbo_k_block_to_shmem(BUF_IB, GLOBAL_IB, block, IQS, OFFSET)
