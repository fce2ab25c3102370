// What turbo/decode-warp.cuh loads ahead, for Python: see test_lanes_attn_loads.py.

#include "attn.h"
#include "lanes_library.h"
#include "turbo/decode-pairs.cuh"
#include "turbo/decode-warp.cuh"

template <ggml_type type, int DK, int DV> static void describe(int64_t * out) {
    if constexpr (DK % turbo_block_values(type) == 0 && DV % turbo_block_values(type) == 0) {
        using shape               = turbo_decode_shape<DK, DV, type, type, 8>;
        const int64_t registers[] = { shape::prefetch_K ? shape::loader_K::n_regs : 0,
                                      shape::prefetch_V ? shape::loader_V::n_regs : 0 };
        std::copy(std::begin(registers), std::end(registers), out);
    } else {
        throw std::invalid_argument("head size");
    }
}

// out: registers of a lane for a piece of K and for one of V; 0: they are copied when needed
LANES_EXPORT const char * lanes_loads_ahead(int64_t type, int64_t DK, int64_t DV, int64_t * out) {
    return lanes::guarded([&] {
        const auto of_type = [&](auto constant) {
            constexpr ggml_type t = decltype(constant)::value;
#define LANES_DESCRIBE(K, V)           \
    if (DK == K && DV == V) {          \
        return describe<t, K, V>(out); \
    }
            GGML_TURBO_HEAD_SIZES_X(LANES_DESCRIBE)
#undef LANES_DESCRIBE
            throw std::invalid_argument("head size");
        };
        switch (type) {
#define LANES_OF_TYPE(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                              \
        return of_type(std::integral_constant<ggml_type, GGML_TYPE_##ENUM>());
            GGML_TURBO_TYPES_X(LANES_OF_TYPE)
#undef LANES_OF_TYPE
            case GGML_TYPE_Q8_0:
                return of_type(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>());
            default:
                throw std::invalid_argument("type");
        }
    });
}
