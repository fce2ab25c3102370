#pragma once

#include <cstdint>
#include <type_traits>

// Where the supported upstreams differ.

// How a KV cache keeps the rotation of K and V. Since build 11434 or before: n_rot_k and n_rot_v, the sizes of the groups (0: none), which a
// state holds, too. Older ones: the flags attn_rot_k and attn_rot_v, and the graph chooses the size.
struct llama_turbo_compat {
    template <typename T> static auto rot_k(T & kv, int) -> decltype((kv.n_rot_k)) { return kv.n_rot_k; }

    template <typename T> static auto rot_k(T & kv, long) -> decltype((kv.attn_rot_k)) { return kv.attn_rot_k; }

    template <typename T> static auto rot_v(T & kv, int) -> decltype((kv.n_rot_v)) { return kv.n_rot_v; }

    template <typename T> static auto rot_v(T & kv, long) -> decltype((kv.attn_rot_v)) { return kv.attn_rot_v; }

    template <typename T> static constexpr bool has_rot_sizes() {
        return std::is_same_v<std::decay_t<decltype(rot_k(std::declval<T &>(), 0))>, uint32_t>;
    }
};
