"""What is built how: the CMake options of each preset, chosen lean and so that a build fetches nothing."""

from __future__ import annotations

from types import ModuleType

import msgspec

from turbo_gguf.errors import UsageError
from turbo_gguf.make.toolkits import cuda, rocm

_COMMON = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",  # the codec oracle loads libggml-base through ctypes
    "LLAMA_BUILD_TESTS": "ON",  # only named targets are compiled, so this costs nothing until a test is asked for
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",  # with the next one: llama-server gets no web page, and none is fetched or built with npm
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_LLGUIDANCE": "OFF",
    "LLAMA_TOOLS_INSTALL": "OFF",
    "LLAMA_TESTS_INSTALL": "OFF",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",  # we set the compiler launcher ourselves
}

# Not upstream's GGML_CUDA_FA_ALL_QUANTS: that compiles upstream's 49 pairs, too, and at 0c1e57098 it no longer reaches the sources
# as a definition.
_ALL_PAIRS = "-DGGML_TURBO_CUDA_ALL_PAIRS"
_ROCM = {**_COMMON, "GGML_HIP": "ON"}
_CUDA = {**_COMMON, "GGML_CUDA": "ON", "GGML_CUDA_NCCL": "OFF"}


class Preset(msgspec.Struct, frozen=True):
    """A named set of CMake options."""

    name: str
    about: str
    options: dict[str, str]
    megabytes: int  # room that a build of the default targets takes: measured for cpu, estimated for the others
    min_cmake: tuple[int, int]


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("cpu", "optimised for this CPU", _COMMON, 150, (3, 14)),
        Preset(
            "cpu-debug",
            "optimised a little, with assertions, debug information, and address and undefined-behaviour sanitizers",
            {
                **_COMMON,
                "CMAKE_BUILD_TYPE": "RelWithDebInfo",
                "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g",  # without -DNDEBUG
                "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g",
                "LLAMA_SANITIZE_ADDRESS": "ON",
                "LLAMA_SANITIZE_UNDEFINED": "ON",
                "GGML_SANITIZE_ADDRESS": "ON",  # ggml does not take them from llama.cpp's
                "GGML_SANITIZE_UNDEFINED": "ON",
            },
            3000,
            (3, 14),
        ),
        Preset("rocm", "AMD GPUs through HIP", _ROCM, 3000, (3, 21)),
        Preset("rocm-all-pairs", "the same, with kernels for all K/V pairs", {**_ROCM, "CMAKE_HIP_FLAGS": _ALL_PAIRS}, 3000, (3, 21)),
        Preset("cuda", "NVIDIA GPUs", _CUDA, 4000, (3, 18)),
        Preset("cuda-all-pairs", "the same, with kernels for all K/V pairs", {**_CUDA, "CMAKE_CUDA_FLAGS": _ALL_PAIRS}, 4000, (3, 18)),
    )
}


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}", f"give one of {', '.join(PRESETS)}")
    return PRESETS[name]


def options(chosen: Preset) -> dict[str, str]:
    """CMake options of a preset on this machine: its own, and the compilers and GPU architectures that are found here.

    Raises:
        EnvironmentMissing: the GPU toolkit, or a GPU to build for, is missing.
        UsageError: a variable names an architecture that there is not.
    """
    toolkit = _toolkit(chosen.name)
    found: dict[str, str] = toolkit.options() if toolkit else {}
    both = {name: f"{chosen.options[name]} {found[name]}" for name in found.keys() & chosen.options.keys()}  # compiler flags
    return {**chosen.options, **found, **both}


def environment(chosen: Preset) -> dict[str, str]:
    """Variables that the compilers of a preset need."""
    return rocm.environment() if _toolkit(chosen.name) is rocm else {}


def gpu_compiler(name: str) -> list[str]:
    """Version line of the GPU compiler of a preset; none for the CPU, or when the compiler is missing."""
    toolkit = _toolkit(name)
    found: list[str] = toolkit.compiler_version() if toolkit else []
    return found


def _toolkit(name: str) -> ModuleType | None:
    return {"rocm": rocm, "cuda": cuda}.get(name.partition("-")[0])


BACKENDS = {"cpu": "CPU", "rocm": "ROCm", "cuda": "CUDA"}


def backend_of(name: str) -> str:
    """Backend that a build of this preset must run on: the prefix of the names of its buffers."""
    return BACKENDS[name.partition("-")[0]]
