"""What a toolkit is: one for each of ggml's backends that we build for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

ALL_PAIRS = "-DGGML_TURBO_CUDA_ALL_PAIRS"
"""Compiler flag for kernels of all K/V pairs. Not upstream's GGML_CUDA_FA_ALL_QUANTS: that compiles upstream's 49 pairs, too, and at
0c1e57098 it no longer reaches the sources as a definition.
"""

PORTABLE = {
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",  # backends are loaded at run time: a GPU's where its driver is, the CPU's that fits best
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_RPC": "ON",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",  # libraries are found beside the programs, wherever both are moved
}
"""CMake options of programs that run on other machines than this one, as in a container."""

CARRIED = {**PORTABLE, "GGML_CPU_ALL_VARIANTS": "OFF", "GGML_RPC": "OFF"}
"""The same with one CPU backend, for any x86-64 with AVX2: what is tried once on another machine is compiled in less time."""

Status = Literal["ok", "missing", "none"]


class Finding(msgspec.Struct, frozen=True):
    """One line of ``doctor``'s table. ``missing`` stops a CPU build; ``none`` is only something that is not there."""

    name: str
    status: Status
    detail: str
    fix: str = ""


class Variant(msgspec.Struct, frozen=True):
    """A preset of a toolkit."""

    suffix: str  # of the preset's name, "" for the plain one
    about: str
    options: dict[str, str]  # of CMake, over those of the toolkit
    megabytes: int  # room that a build of the default targets takes: measured for cpu, estimated for the others


class Toolkit(msgspec.Struct, frozen=True):
    """A backend, what it is built with, and the devices that run it."""

    name: str  # first word of its presets' names
    title: str
    backend: str  # prefix of the names of its devices and buffers
    cmake: dict[str, str]  # options that switch it on
    min_cmake: tuple[int, int]
    variants: tuple[Variant, ...]
    offloads: bool = True  # layers are moved to a device of it
    by_default: bool = True  # for a GPU that is here; else only where a preset is named
    languages: tuple[str, ...] = ()  # of CMake beside C and C++, for the compiler launcher
    targets: str = ""  # CMake option with the architectures that it is built for; "": this machine's
    options: Callable[[], dict[str, str]] = dict  # CMake options on this machine; raises when something is missing
    environment: Callable[[], dict[str, str]] = dict  # variables that its compilers need
    compiler_version: Callable[[], list[str]] = list
    where: Callable[[], str] = str  # it was found, for doctor
    gpus: Callable[[], list[str]] = list  # the GPUs that it could run on, for people
    architectures: Callable[[], list[str]] = list  # of those GPUs, as the compiler names them
    devices: Callable[[], Iterable[Finding]] = tuple  # the same for doctor, with what keeps this user from them
    about_machine: Callable[[], str] = str  # GPUs, driver and compiler, for results

    def built_for(self, options: Mapping[str, str]) -> list[str]:
        """Architectures that CMake options name; none: it is built for this machine."""
        return [name for name in options.get(self.targets, "").split(";") if name]

    @property
    def device(self) -> str:
        """Name of its first device in llama.cpp."""
        return f"{self.backend}0" if self.offloads else self.backend
