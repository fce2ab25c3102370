"""The CPU: what every build has."""

from __future__ import annotations

from turbo_gguf.make.toolkits.toolkit import CARRIED, PORTABLE, Toolkit, Variant

_DEBUG = {
    "CMAKE_BUILD_TYPE": "RelWithDebInfo",
    "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g",  # without -DNDEBUG
    "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g",
    "LLAMA_SANITIZE_ADDRESS": "ON",
    "LLAMA_SANITIZE_UNDEFINED": "ON",
    "GGML_SANITIZE_ADDRESS": "ON",  # ggml does not take them from llama.cpp's
    "GGML_SANITIZE_UNDEFINED": "ON",
}

TOOLKIT = Toolkit(
    name="cpu",
    title="CPU",
    backend="CPU",
    cmake={},
    min_cmake=(3, 14),
    offloads=False,
    variants=(
        Variant("", "optimised for this CPU", {}, 150),
        Variant(
            "debug",
            "optimised a little, with assertions, debug information, and address and undefined-behaviour sanitizers",
            _DEBUG,
            3000,
        ),
        Variant("portable", "for any CPU of this kind, to be moved to another machine; with RPC", PORTABLE, 300),
        Variant("carried", "the same for CPUs with AVX2, in less time: what `scripts/gpu/prove.sh` takes along", CARRIED, 150),
    ),
)
