"""What is built how: the CMake options of each preset, chosen lean and so that a build fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from turbo_gguf.errors import UsageError
from turbo_gguf.make.toolkits import TOOLKITS, Toolkit, of_preset

_COMMON = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",  # a changed patch set links few programs again
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


def _presets(toolkit: Toolkit) -> Iterator[Preset]:
    for variant in toolkit.variants:
        name = "-".join(filter(None, (toolkit.name, variant.suffix)))
        yield Preset(name, variant.about, {**_COMMON, **toolkit.cmake, **variant.options}, variant.megabytes, toolkit.min_cmake)


PRESETS = {preset.name: preset for toolkit in TOOLKITS.values() for preset in _presets(toolkit)}


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
    found = of_preset(chosen.name).options()
    both = {name: f"{chosen.options[name]} {found[name]}" for name in found.keys() & chosen.options.keys()}  # compiler flags
    return {**chosen.options, **found, **both}


def environment(chosen: Preset) -> dict[str, str]:
    """Variables that the compilers of a preset need."""
    return of_preset(chosen.name).environment()


def gpu_compiler(name: str) -> list[str]:
    """Version line of the GPU compiler of a preset; none for the CPU, or when the compiler is missing."""
    return of_preset(name).compiler_version()


def backend_of(name: str) -> str:
    """Backend that a build of this preset must run on: the prefix of the names of its buffers."""
    return of_preset(name).backend
