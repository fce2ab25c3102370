// Decode attention with K in turbo3.

#include "turbo/decode-instances.cuh"

turbo_attn_decode_t ggml_cuda_turbo_decode_k_turbo3(const ggml_type type_v) {
    switch (type_v) {
        case GGML_TYPE_TURBO3_0:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO3_0>;
#ifdef GGML_TURBO_CUDA_ALL_PAIRS
        case GGML_TYPE_TURBO2_0:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO2_0>;
        case GGML_TYPE_TURBO4_0:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO4_0>;
        case GGML_TYPE_TURBO2_T:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO2_T>;
        case GGML_TYPE_TURBO3_T:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO3_T>;
        case GGML_TYPE_TURBO4_T:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO4_T>;
        case GGML_TYPE_Q8_0:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_Q8_0>;
        case GGML_TYPE_F16:
            return turbo_attn_decode<GGML_TYPE_TURBO3_0, GGML_TYPE_F16>;
#endif  // GGML_TURBO_CUDA_ALL_PAIRS
        default:
            return nullptr;
    }
}
