"""The ways to compile what is made for several instruction sets of the CPU, and the programs made of them.

Environment variables:
    TURBO_GGUF_REQUIRE_QEMU: a variant for AArch64 that can't be compiled or run is a failure then, not a skip.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from turbo_gguf import patchset, tools
from turbo_gguf.assets import home
from turbo_gguf.errors import TurboError
from turbo_gguf.files import lock
from turbo_gguf.make.build import toolchain
from turbo_gguf.make.presets import preset
from turbo_gguf.make.upstream import fetch, resolve

HERE = Path(__file__).resolve().parent
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
GCC_VERSIONS = range(16, 10, -1)
SECONDS = 60.0
"""Time that a program may take for one op; the slowest takes less than a second, on the emulator too."""


@dataclass(frozen=True)
class Variant:
    """Flags of a compiler, what the CPU must have for the result, and the implementations that must be in it."""

    name: str
    machine: str
    isa: str  # of attention
    codec_isa: str
    flags: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()  # as /proc/cpuinfo calls them
    pairs_above: int | None = None  # rows of a unit above which values become pairs of int16


_PAIRS = "-DTURBO_TEST_PAIRS=true"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_CPU_AVX2 = ("avx2", "fma", "f16c")
_CPU_AVX512 = (*_CPU_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_DOTPROD = "-march=armv8.2-a+dotprod"


def cpu_has(*flags: str) -> bool:
    return set(flags) <= _cpu_flags()


@cache
def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def best_isa() -> str:
    """The implementation that a build for this very CPU must have."""
    order = {"avx512-vnni": _CPU_AVX512, "avx2-vnni": (*_CPU_AVX2, "avx_vnni"), "avx2": _CPU_AVX2, "neon-dotprod": ("asimddp",)}
    return next((isa for isa, flags in order.items() if cpu_has(*flags)), "generic")


def best_codec_isa() -> str:
    """The encoder that such a build must have: any ARMv8 has NEON."""
    return "neon" if MACHINE == "aarch64" else "avx2" if cpu_has("avx2") else "generic"


VARIANTS = (
    Variant("native", MACHINE, best_isa(), best_codec_isa(), ("-march=native",), (), {"avx512-vnni": 12, "avx2-vnni": 6}.get(best_isa())),
    Variant("avx512-vnni", "x86_64", "avx512-vnni", "avx2", _AVX512, _CPU_AVX512, 12),
    Variant("avx512-vbmi", "x86_64", "avx512-vnni", "avx2", (*_AVX512, "-mavx512vbmi"), (*_CPU_AVX512, "avx512vbmi"), 12),
    Variant("avx2-vnni", "x86_64", "avx2-vnni", "avx2", (*_AVX2, "-mavxvnni"), (*_CPU_AVX2, "avx_vnni"), 6),
    Variant("avx2", "x86_64", "avx2", "avx2", _AVX2, _CPU_AVX2),
    Variant("avx2-pairs", "x86_64", "avx2", "avx2", (*_AVX2, _PAIRS), _CPU_AVX2, 6),
    Variant("generic", "x86_64", "generic", "generic"),
    Variant("generic-pairs", "x86_64", "generic", "generic", (_PAIRS,), (), 4),
    Variant("neon", "aarch64", "neon-dotprod", "neon", (_DOTPROD,), ("asimddp",)),
    Variant("neon-pairs", "aarch64", "neon-dotprod", "neon", (_DOTPROD, _PAIRS), ("asimddp",), 6),
    Variant("arm-generic", "aarch64", "generic", "neon"),
)

PROGRAMS = {"attn": VARIANTS, "codec": tuple(v for v in VARIANTS if _PAIRS not in v.flags)}
"""What is compiled of each program: pairs make no difference to the codec."""

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


class Crashed(Exception):
    """A program has ended, or was ended, instead of answering."""


class Runner:
    """A program that is kept for many ops; one that crashed starts again."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self._argv, self._env = argv, env
        self._log = home() / "logs" / f"{Path(argv[-1]).name}.err"
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: str, data: list[bytes], answer_bytes: int) -> tuple[list[str], bytes]:
        """Send a request; the words and the bytes of the answer."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            for part in (line.encode() + b"\n", *data):
                process.stdin.write(part)
            process.stdin.flush()
            words = process.stdout.readline().decode().split()
            result = process.stdout.read(answer_bytes)
        except BrokenPipeError:
            words, result = [], b""
        finally:
            timer.cancel()
        if not words or len(result) < answer_bytes:
            self._process = None
            raise Crashed(f"{self._argv[-1]}: {tools.describe_rc(process.wait())}; {tools.tail(self._log)}")
        return words, result

    def _start(self) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "GGML_NO_BACKTRACE": "1", **self._env}
        with self._log.open("wb") as err:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, env=env)
        return self._process


@cache
def runner(program: str, variant: Variant, setting: str = "1") -> Runner:
    """A program of a variant, compiled on first use; ``setting`` is GGML_TURBO_CPU_ATTN. Skips the test where it can't run here."""
    emulator: list[str] = []
    if variant.machine != MACHINE:
        emulator = [str(_emulator(variant.machine))]
    elif missing := [flag for flag in variant.cpu_flags if not cpu_has(flag)]:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    return Runner([*emulator, str(compiled(program, variant))], {"GGML_TURBO_CPU_ATTN": setting})


def compiled(program: str, variant: Variant) -> Path:
    """What is compiled of a program for a variant.

    Raises:
        TurboError: it can't be compiled; told to each test, tried once.
    """
    folder = _build_once(variant.machine)
    if isinstance(folder, TurboError):
        raise folder
    return folder / f"{program}-{variant.name}"


@cache
def _build_once(machine: str) -> Path | TurboError:
    try:
        return _build(machine)
    except TurboError as error:
        return error


def _build(machine: str) -> Path:
    """Compile what has changed of the variants for a kind of CPU: a static ggml without extensions, and the programs of each."""
    compilers, cross = _compilers(machine), machine != MACHINE
    found = toolchain(preset("cpu"))
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_C_FLAGS_RELEASE": "-O1",
        "CMAKE_CXX_FLAGS_RELEASE": "-O1",
        "CMAKE_C_COMPILER": str(compilers[0]),
        "CMAKE_CXX_COMPILER": str(compilers[1]),
        "VARIANTS": ";".join("|".join((p, v.name, *v.flags)) for p, variants in PROGRAMS.items() for v in variants if v.machine == machine),
        **({"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": machine, "CMAKE_EXE_LINKER_FLAGS": "-static"} if cross else {}),
        **({f"CMAKE_{language}_COMPILER_LAUNCHER": str(found.ccache) for language in ("C", "CXX")} if found.ccache else {}),
    }
    source = resolve()
    with lock(f"tree-{source.name}"):
        tree = patchset.apply(fetch(source))
        settings["TREE"] = str(tree.path)
        argv = [found.cmake, "-S", HERE, *(("-G", "Ninja") if found.ninja else ()), *(f"-D{k}={v}" for k, v in settings.items())]
        parts = [tools.capture([compilers[1], "--version"]), *map(str, argv)]
        folder = home() / "builds" / f"cpu-variants-{machine}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:8]}"
        environment = {"CCACHE_BASEDIR": str(home()), "CCACHE_NOHASHDIR": "1"}
        tools.run([*argv, "-B", folder], log=home() / "logs" / f"configure-{folder.name}.log", env=environment)
        jobs = str(os.cpu_count() or 1)
        tools.run([found.cmake, "--build", folder, "--parallel", jobs], log=home() / "logs" / f"build-{folder.name}.log", env=environment)
    return folder


def _compilers(machine: str) -> tuple[Path, Path]:
    """C and C++ compiler for a kind of CPU."""
    if machine == MACHINE:
        found = toolchain(preset("cpu"))
        return found.cc, found.cxx
    prefix = f"{machine}-linux-gnu-"
    for version in ("", *(f"-{number}" for number in GCC_VERSIONS)):
        cc, cxx = tools.find(f"{prefix}gcc{version}"), tools.find(f"{prefix}g++{version}")
        if cc and cxx:
            return cc, cxx
    _not_here(machine, f"{prefix}g++", f"g++-{machine.replace('_', '-')}-linux-gnu")


def _emulator(machine: str) -> Path:
    for name in (f"qemu-{machine}-static", f"qemu-{machine}"):
        if found := tools.find(name):
            return found
    _not_here(machine, f"qemu-{machine}", "qemu-user")


def _not_here(machine: str, program: str, package: str) -> NoReturn:
    reason = f"no {program} (apt-get install {package})"
    if machine == "aarch64" and os.environ.get("TURBO_GGUF_REQUIRE_QEMU"):
        pytest.fail(reason)
    pytest.skip(reason)
