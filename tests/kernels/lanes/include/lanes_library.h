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

// Calls function with the scalar turbo type as a constant: [&](auto type) { kernel<type>(...); }
template <typename Function> void for_turbo_type(int64_t type, Function function) {
    switch (type) {
        case GGML_TYPE_TURBO2_0:
            return function(std::integral_constant<ggml_type, GGML_TYPE_TURBO2_0>());
        case GGML_TYPE_TURBO3_0:
            return function(std::integral_constant<ggml_type, GGML_TYPE_TURBO3_0>());
        case GGML_TYPE_TURBO4_0:
            return function(std::integral_constant<ggml_type, GGML_TYPE_TURBO4_0>());
        default:
            throw std::invalid_argument("type " + std::to_string(type));
    }
}

template <typename Function> void for_trellis_type(int64_t type, Function function) {
    switch (type) {
        case GGML_TYPE_TURBO2_T:
            return function(std::integral_constant<ggml_type, GGML_TYPE_TURBO2_T>());
        case GGML_TYPE_TURBO3_T:
            return function(std::integral_constant<ggml_type, GGML_TYPE_TURBO3_T>());
        case GGML_TYPE_TURBO4_T:
            return function(std::integral_constant<ggml_type, GGML_TYPE_TURBO4_T>());
        default:
            throw std::invalid_argument("type " + std::to_string(type));
    }
}

}  // namespace lanes

// Which thread goes first after each meeting: see lanes::Order.
LANES_EXPORT __attribute__((used)) inline void lanes_set_descending(bool descending) {
    lanes::order = descending ? lanes::Order::descending : lanes::Order::ascending;
}
