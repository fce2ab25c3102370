// Decode attention with K in f16, and V packed, or in f16 as in an exact segment.

#include "turbo/decode-instances.cuh"

turbo_attn_decode_t ggml_cuda_turbo_decode_k_f16(const ggml_type type_v) {
    switch (type_v) {
        case GGML_TYPE_F16:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_F16>;
        case GGML_TYPE_TURBO2_0:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_TURBO2_0>;
        case GGML_TYPE_TURBO3_0:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_TURBO3_0>;
        case GGML_TYPE_TURBO4_0:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_TURBO4_0>;
        case GGML_TYPE_TURBO2_T:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_TURBO2_T>;
        case GGML_TYPE_TURBO3_T:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_TURBO3_T>;
        case GGML_TYPE_TURBO4_T:
            return turbo_attn_decode<GGML_TYPE_F16, GGML_TYPE_TURBO4_T>;
        default:
            return nullptr;
    }
}
