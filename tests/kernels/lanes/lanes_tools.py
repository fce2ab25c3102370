"""Compiles our GPU sources as plain C++ with the shim under ``include/`` and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from turbo_gguf import tools
from turbo_gguf.assets import home, patches_dir

LANES = Path(__file__).resolve().parent
OVERLAY = patches_dir() / "overlay" / "ggml"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Device:
    """What the sources are compiled for."""

    name: str
    defines: tuple[str, ...]


CUDA = Device("cuda", ("-DLANES_WAVE=32",))
HIP32 = Device("hip, waves of 32", ("-DLANES_WAVE=32", "-DGGML_USE_HIP"))
HIP64 = Device("hip, waves of 64", ("-DLANES_WAVE=64", "-DGGML_USE_HIP"))
GFX11 = Device("gfx11", (*HIP32.defines, "-DLANES_GFX=11"))
GFX12 = Device("gfx12", (*HIP32.defines, "-DLANES_GFX=12"))
GFX942 = Device("gfx942", (*HIP64.defines, "-DLANES_GFX=942"))

each_device = pytest.mark.parametrize("device", [CUDA, HIP32, HIP64], ids=lambda d: d.name.replace(", waves of ", ""))


class Library:
    """A compiled test source. Its functions return None, or what went wrong, which is raised."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))

    def call(self, function: str, *arguments: object) -> None:
        """Call with arrays as pointers to their data, and integers as 64-bit ones."""
        entry = self._lib[function]
        entry.restype = ctypes.c_char_p
        message = entry(*(_argument(a) for a in arguments))
        if message is not None:
            raise LanesMisuse(message.decode())

    def set_descending(self, descending: bool) -> None:
        """Which thread goes first after each meeting."""
        self._lib.lanes_set_descending(ctypes.c_bool(descending))


class LanesMisuse(Exception):
    """What a GPU would have left undefined."""


@cache
def load(source: str, device: Device, *defines: str) -> Library:
    """Compile a source of this folder (if needed) and load it. Skips the test where there is no compiler that knows ``_Float16``.

    ``defines`` are ``NAME=VALUE`` for the preprocessor.
    """
    argv = command(device, *defines)
    folder = home() / "lanes" / _key(argv, LANES / source)
    library = folder / (Path(source).stem + ".so")
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part, log = folder / f"part.{os.getpid()}", folder / f"compile.{os.getpid()}.log"
        compile_argv = [*_launcher(), *argv, "-c", str(LANES / source), "-o", f"{part}.o"]
        tools.run(compile_argv, log=log, cwd=LANES, env={"CCACHE_BASEDIR": str(LANES.parents[2])}, timeout=300)
        tools.run([argv[0], "-shared", f"{part}.o", "-o", f"{part}.so"], log=log, timeout=60)
        Path(f"{part}.o").unlink()
        Path(f"{part}.so").replace(library)
    return Library(library)


def command(device: Device, *defines: str) -> list[str]:
    """Compiler and flags, without a source."""
    folders = (LANES / "include", OVERLAY / "src" / "ggml-cuda", OVERLAY / "src", OVERLAY / "include")
    return [compiler(), *FLAGS, *device.defines, *(f"-D{define}" for define in defines), *(f"-I{path}" for path in folders)]


def _launcher() -> list[str]:
    """ccache, which shares what it has between checkouts, but compiles only: it does not link."""
    found = tools.find("ccache")
    return [str(found)] if found else []


@cache
def compiler() -> str:
    """A C++ compiler. Skips the test where none knows ``_Float16``."""
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    for name in candidates:
        if tools.find(name) and _knows_float16(name):
            return name
    pytest.skip("no C++ compiler that knows _Float16 (g++ 12 on x86-64 does)")


def _knows_float16(compiler: str) -> bool:
    probe = home() / "lanes" / f"probe.{os.getpid()}.cpp"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text("_Float16 twice(_Float16 x) { return x + x; }\n", encoding="utf-8")
    try:
        tools.capture([compiler, "-std=c++17", "-fsyntax-only", str(probe)])
    except Exception:
        return False
    finally:
        probe.unlink()
    return True


def _key(argv: list[str], source: Path) -> str:
    digest = hashlib.sha256("\0".join([tools.capture([argv[0], "--version"]), *argv]).encode())
    folders = [LANES / "include", LANES / "include" / "ggml-cuda", OVERLAY / "include"]
    folders += [OVERLAY / "src" / name for name in (".", "turbo", "ggml-cuda", "ggml-cuda/turbo")]
    files = [source, *sorted(p for folder in folders if folder.is_dir() for p in folder.iterdir() if p.is_file())]
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value
