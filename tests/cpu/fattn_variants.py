"""The ways to compile attention for the CPU, and the programs made of them.

Environment variables:
    TURBO_GGUF_REQUIRE_QEMU: a variant for AArch64 that can't be compiled or run is a failure then, not a skip.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from turbo_gguf import patchset, tools
from turbo_gguf.assets import home
from turbo_gguf.build import find_cmake, find_tool, toolchain
from turbo_gguf.errors import ToolFailed, TurboError
from turbo_gguf.presets import preset
from turbo_gguf.upstream import fetch, lock, resolve

HERE = Path(__file__).resolve().parent
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
GCC_VERSIONS = range(16, 10, -1)
SECONDS = 60.0
"""Time that a program may take for one op; the slowest takes 2 s on the emulator."""


@dataclass(frozen=True)
class Variant:
    """Flags of a compiler, what the CPU must have for the result, and the implementation that must be in it."""

    name: str
    machine: str
    isa: str
    flags: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()  # as /proc/cpuinfo calls them
    pairs: bool = False  # whether values become pairs of int16


_PAIRS = "-DTURBO_TEST_PAIRS=true"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_DOTPROD = "-march=armv8.2-a+dotprod"
VARIANTS = (
    Variant("avx512-vnni", "x86_64", "avx512-vnni", (*_AVX2, *_AVX512), tuple(f[2:].replace("512vn", "512_vn") for f in _AVX512), True),
    Variant("avx2-vnni", "x86_64", "avx2-vnni", (*_AVX2, "-mavxvnni"), ("avx2", "fma", "f16c", "avx_vnni"), True),
    Variant("avx2", "x86_64", "avx2", _AVX2, ("avx2", "fma", "f16c")),
    Variant("avx2-pairs", "x86_64", "avx2", (*_AVX2, _PAIRS), ("avx2", "fma", "f16c"), True),
    Variant("generic", "x86_64", "generic"),
    Variant("generic-pairs", "x86_64", "generic", (_PAIRS,), (), True),
    Variant("neon", "aarch64", "neon-dotprod", (_DOTPROD,), ("asimddp",)),
    Variant("neon-pairs", "aarch64", "neon-dotprod", (_DOTPROD, _PAIRS), ("asimddp",), True),
    Variant("arm-generic", "aarch64", "generic"),
)

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


class Crashed(Exception):
    """A program has ended instead of answering."""


class Runner:
    """A program of :func:`program` that is kept for many ops; one that crashed starts again."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self._argv, self._env = argv, env
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: str, data: list[bytes], answer_bytes: int) -> tuple[list[str], bytes]:
        """Send a request; the words and the bytes of the answer."""
        log = home() / "logs" / f"fattn-{os.getpid()}.err"
        if self._process is None:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as err:
                env = {**os.environ, "GGML_NO_BACKTRACE": "1", **self._env}
                self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, env=env)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            for part in (line.encode() + b"\n", *data):
                self._process.stdin.write(part)
            self._process.stdin.flush()
            words = self._process.stdout.readline().split()
            result = self._process.stdout.read(answer_bytes)
        except BrokenPipeError:
            words, result = [], b""
        if not words or len(result) < answer_bytes:
            rc = self._process.wait(timeout=SECONDS)
            self._process = None
            raise Crashed(f"{self._argv[-1]}: {tools.describe_rc(rc)}; {tools.tail(log)}")
        return [word.decode() for word in words], result


@cache
def runner(variant: Variant, **env: str) -> Runner:
    """The program of a variant, compiled on first use. Skips the test where that, or running it, is not possible here."""
    emulator: list[str] = []
    if variant.machine != MACHINE:
        emulator = [_emulator(variant)]
    elif missing := [flag for flag in variant.cpu_flags if not _cpu_has(flag)]:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    return Runner([*emulator, str(program(variant))], dict(env))


@cache
def program(variant: Variant) -> Path:
    """Compile all variants for a kind of CPU (what has changed), and return the program of one."""
    folder = _build_folder(variant.machine)
    return folder / f"fattn-{variant.name}"


@cache
def _build_folder(machine: str) -> Path:
    pass
