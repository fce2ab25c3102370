// K of a scalar turbo type in upstream's integer dot products, included behind flash_attn_mmq_funcs.glsl; see turbo-attn.glsl. Its levels are int8, so
// a block is one of q8_0 once it is unpacked, and has the same place in shared memory.

int32_t turbo_k_qs(uint ib, uint iqs, uint a_offset) {
    return TURBO_IS_SCALAR(FaTypeK) ?
               int32_t(turbo_scalar_levels(FaTypeK, turbo_block(a_offset + ib, BINDING_IDX_K), iqs / 4)) :
               get_k_qs(ib, iqs, a_offset);
}

FLOAT_TYPEV2 turbo_k_scale(uint ib, uint a_offset) {
    return TURBO_IS_SCALAR(FaTypeK) ?
               FLOAT_TYPEV2(turbo_scalar_scale(turbo_block(a_offset + ib, BINDING_IDX_K)), 0.0) :
               get_k_scale(ib, a_offset);
}

fa_k_qs_block8 turbo_k_qs_block8(uint ib, uint a_offset) {
    if (!TURBO_IS_SCALAR(FaTypeK)) {
        return get_k_qs_block8(ib, a_offset);
    }
    fa_k_qs_block8 r;
    [[unroll]] for (uint d = 0; d < 8; ++d) {
        r.qs[d] = turbo_k_qs(ib, 4 * d, a_offset);
    }
    return r;
}

void turbo_k_block_to_shmem(uint buf_ib, uint global_ib, uint iqs, uint a_offset) {
    if (!TURBO_IS_SCALAR(FaTypeK)) {
        k_block_to_shmem(buf_ib, global_ib, iqs, a_offset);
        return;
    }
    kblocksh[buf_ib].qs[iqs] = turbo_k_qs(global_ib, 4 * iqs, a_offset);
    if (iqs == 0) {
        kblocksh[buf_ib].dm = turbo_k_scale(global_ib, a_offset);
    }
}

int32_t turbo_k_qs_shmem(uint buf_ib, uint pos) {
    return TURBO_IS_SCALAR(FaTypeK) ? kblocksh[buf_ib].qs[pos] : get_k_qs_shmem(buf_ib, pos);
}

#define get_k_qs turbo_k_qs
#define get_k_scale turbo_k_scale
#define get_k_qs_block8 turbo_k_qs_block8
#define k_block_to_shmem turbo_k_block_to_shmem
#define get_k_qs_shmem turbo_k_qs_shmem
