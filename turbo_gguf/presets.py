"""What is built how: the CMake options of each preset, chosen lean and so that a build fetches nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.tools import capture, find

GPU_TARGETS_HINT = (
    "GPU_TARGETS=gfx1100 turbo-gguf build --preset rocm (your GPU: gfx1100 is the 7900 XTX, gfx1151 Strix Halo, gfx1201 the 9070 XT)"
)

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
        Preset("rocm", "AMD GPUs through HIP", {**_COMMON, "GGML_HIP": "ON"}, 3000, (3, 21)),
        Preset("cuda", "NVIDIA GPUs", {**_COMMON, "GGML_CUDA": "ON", "GGML_CUDA_NCCL": "OFF"}, 4000, (3, 18)),
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


def machine_options(name: str) -> dict[str, str]:
    """CMake options that depend on this machine: compilers and GPU architectures of a preset.

    Raises:
        EnvironmentMissing: the GPU toolkit, or a GPU to build for, is missing.
    """
    if name == "rocm":
        return _rocm_options()
    if name == "cuda":
        return _cuda_options()
    return {}


def rocm_path() -> Path | None:
    """Folder of the ROCm installation: ``ROCM_PATH``, /opt/rocm, or /usr for distribution packages."""
    named = os.environ.get("ROCM_PATH")
    for folder in (Path(named) if named else None, Path("/opt/rocm"), Path("/usr")):
        if folder is not None and (folder / "bin" / "hipcc").exists():
            return folder
    return None


def rocm_targets() -> list[str]:
    """Architectures of the AMD GPUs here, such as gfx1100; ``GPU_TARGETS`` (or ``AMDGPU_TARGETS``) wins."""
    named = os.environ.get("GPU_TARGETS") or os.environ.get("AMDGPU_TARGETS")
    if named:
        return [name for name in re.split(r"[;, ]+", named) if name]
    root = rocm_path()
    for tool in ("bin/rocm_agent_enumerator", "llvm/bin/amdgpu-arch", "lib/llvm/bin/amdgpu-arch"):
        if root is not None and (root / tool).exists():
            found = _gfx(root / tool)
            if found:
                return found
    return []


def cuda_compiler() -> Path | None:
    """The CUDA compiler: ``CUDACXX``, on PATH, or of the default installation."""
    named = os.environ.get("CUDACXX")
    default = Path("/usr/local/cuda/bin/nvcc")
    return Path(named) if named else find("nvcc") or (default if default.exists() else None)


def gpu_compiler(name: str) -> list[str]:
    """Version line of the GPU compiler of a preset; none for the CPU, or when the compiler is missing."""
    root, nvcc = rocm_path(), cuda_compiler()
    if name == "rocm" and root is not None:
        return capture([root / "bin" / "hipcc", "--version"]).splitlines()[:1]
    if name == "cuda" and nvcc is not None:
        return re.findall(r"release.*", capture([nvcc, "--version"]))[:1]
    return []


def _gfx(tool: Path) -> list[str]:
    """Ask a tool for the GPUs; gfx000 is the CPU. A tool that finds no driver is like one that finds no GPU."""
    try:
        lines = capture([tool]).split()
    except (EnvironmentMissing, ToolFailed):
        return []
    return sorted({line for line in lines if re.fullmatch(r"gfx[0-9a-f]+", line) and line != "gfx000"})


def _rocm_options() -> dict[str, str]:
    root = rocm_path()
    if root is None:
        raise EnvironmentMissing(
            "ROCm not found: no hipcc in $ROCM_PATH/bin, /opt/rocm/bin or /usr/bin",
            "install ROCm 6.1 or newer: apt-get install rocm-hip-sdk from AMD's repository, or hipcc libhipblas-dev librocblas-dev",
        )
    targets = rocm_targets()
    if not targets:
        raise EnvironmentMissing("no AMD GPU found to build for (rocm_agent_enumerator, amdgpu-arch)", GPU_TARGETS_HINT)
    options = {"GPU_TARGETS": ";".join(targets), "CMAKE_PREFIX_PATH": str(root)}
    clang = next((path for path in (root / "llvm/bin/clang++", root / "lib/llvm/bin/clang++") if path.exists()), None)
    return {**options, "CMAKE_HIP_COMPILER": str(clang)} if clang else options


def _cuda_options() -> dict[str, str]:
    nvcc = cuda_compiler()
    if nvcc is None:
        raise EnvironmentMissing(
            "CUDA compiler not found: no nvcc on PATH or in /usr/local/cuda/bin",
            "apt-get install nvidia-cuda-toolkit, or set CUDACXX to the path of nvcc",
        )
    named = os.environ.get("CUDAARCHS")
    return {"CMAKE_CUDA_COMPILER": str(nvcc), **({"CMAKE_CUDA_ARCHITECTURES": named} if named else {})}
