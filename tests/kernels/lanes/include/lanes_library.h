// For test programs that are compiled to a shared library and called from Python with ctypes.

#pragma once

#include "ggml.h"
#include "lanes.h"

#include <string>
#include <type_traits>

#define LANES_EXPORT extern "C" __attribute__((visibility("default")))

namespace lanes {

// nullptr, or what went wrong. Valid until the next call.
template <typename Function> const char * guarded(Function function) {
    static std::string message;
    try {
        function();
        return nullptr;
    } catch (const std::exception & e) {
        message = e.what();
        return message.c_str();
    }
}

#define LANES_CALL(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                           \
        return function(std::integral_constant<ggml_type, GGML_TYPE_##ENUM>());

// Calls function with the scalar type as a constant: [&](auto type) { kernel<type>(...); }
template <typename Function> void for_scalar_type(int64_t type, Function function) {
    switch (type) {
        GGML_TURBO_SCALAR_TYPES_X(LANES_CALL)
        default:
            throw std::invalid_argument("type " + std::to_string(type));
    }
}

template <typename Function> void for_trellis_type(int64_t type, Function function) {
    switch (type) {
        GGML_TURBO_TRELLIS_TYPES_X(LANES_CALL)
        default:
            throw std::invalid_argument("type " + std::to_string(type));
    }
}

#undef LANES_CALL

}  // namespace lanes

// Which thread goes first after each meeting: see lanes::Order.
LANES_EXPORT __attribute__((used)) inline void lanes_set_descending(bool descending) {
    lanes::order = descending ? lanes::Order::descending : lanes::Order::ascending;
}
