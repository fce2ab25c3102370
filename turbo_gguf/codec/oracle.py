"""The C reference and the CPU kernels through ctypes, compiled from the overlay without an upstream tree.

The shared library lies under ``home()/oracle``, in a folder named by a hash of sources, compiler and flags.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turbo_gguf import tools
from turbo_gguf.assets import home, patches_dir
from turbo_gguf.codec.scalar import Bytes, Floats
from turbo_gguf.codec.tables import QK_SCALAR, ScalarType, Scale, TrellisType, TurboType
from turbo_gguf.errors import EnvironmentMissing

WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wcast-qual", "-Wshadow", "-Wstrict-prototypes", "-Wpointer-arith", "-Wmissing-prototypes")
"""What upstream compiles ggml with; the tests turn them into errors."""

Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", QK_SCALAR)])
"""``block_q8_0``."""

_GGML = Path("overlay") / "ggml"
_TURBO = Path("src") / "turbo"
_CPU = Path("src") / "ggml-cpu" / "turbo"
_SOURCES = (*(_TURBO / f"{name}.c" for name in ("scalar", "scale-rule", "trellis", "types")), _CPU / "scalar.c")
_FOLDERS = ("include", _TURBO, _CPU)
_STANDALONE = Path(__file__).resolve().parent / "standalone"
_COMPILE_SECONDS = 120.0


class Oracle:
    """Typed calls into the compiled C code. Arrays are converted to contiguous binary32 or bytes."""

    def __init__(self, library: Path) -> None:
        """Load a library that :func:`build` made."""
        self._lib = ctypes.CDLL(str(library))
        self._lib.ggml_turbo_cpu_scalar_isa.restype = ctypes.c_char_p
        self._lib.ggml_turbo_validate_row.restype = ctypes.c_bool
        self._lib.ggml_turbo_decays.restype = ctypes.c_bool

    @property
    def isa(self) -> str:
        """Which implementation of the CPU kernels is active: ``avx2``, ``neon`` or ``generic``."""
        name: bytes = self._lib.ggml_turbo_cpu_scalar_isa()
        return name.decode()

    @property
    def scale(self) -> Scale:
        """The scale rule of all encoders that are not told one."""
        return Scale(self._lib.ggml_turbo_get_scale())

    @scale.setter
    def scale(self, scale: Scale) -> None:
        self._lib.ggml_turbo_set_scale(int(scale))

    def quantize(self, t: ScalarType, x: npt.ArrayLike, *, scale: Scale = Scale.LEAST_SQUARES, search: bool = True) -> Bytes:
        """Encode rows with the C reference; shapes as in :func:`turbo_gguf.codec.scalar.quantize`."""
        rows, packed = _rows_and_output(t, x)
        self._lib.ggml_turbo_quantize_row_scalar(
            t.type_id, int(scale), ctypes.c_bool(search), _pointer(rows), _pointer(packed), ctypes.c_int64(rows.size)
        )
        return packed

    def quantize_ref(self, t: ScalarType, x: npt.ArrayLike) -> Bytes:
        """Encode rows with ``quantize_row_*_ref``."""
        return self._quantize_with(f"quantize_row_{t.c_name}_ref", t, x)

    def quantize_cpu(self, t: ScalarType, x: npt.ArrayLike) -> Bytes:
        """Encode rows with ``quantize_row_*``, the encoder of the CPU backend."""
        return self._quantize_with(f"quantize_row_{t.c_name}", t, x)

    def quantize_trellis(self, t: TrellisType, x: npt.ArrayLike) -> Bytes:
        """Encode rows with the C reference; shapes as in :func:`turbo_gguf.codec.trellis.quantize`."""
        rows, packed = _rows_and_output(t, x)
        self._lib.ggml_turbo_quantize_row_trellis(t.type_id, _pointer(rows), _pointer(packed), ctypes.c_int64(rows.size))
        return packed

    def dequantize(self, t: TurboType, packed: Bytes) -> Floats:
        """Decode rows of shape (..., bytes) to shape (..., values)."""
        data = np.ascontiguousarray(packed)
        values = data.shape[-1] // t.block_bytes * t.block
        out = np.empty((*data.shape[:-1], values), dtype=np.float32)
        self._lib[f"dequantize_row_{t.c_name}"](_pointer(data), _pointer(out), ctypes.c_int64(out.size))
        return out

    def decays(self, t: ScalarType) -> bool:
        """What ``ggml_turbo_decays`` says."""
        return bool(self._lib.ggml_turbo_decays(t.type_id))

    def decay(self, t: ScalarType, packed: Bytes, *, scale: Scale = Scale.LEAST_SQUARES) -> Bytes:
        """Rows after ``ggml_turbo_decay_row``; as :func:`turbo_gguf.codec.scalar.decay`."""
        if not self.decays(t):
            raise ValueError(f"{t.name} does not decay")
        data = np.array(packed, order="C")
        values = data.size // t.block_bytes * QK_SCALAR
        self._lib.ggml_turbo_decay_row(t.type_id, int(scale), _pointer(data), ctypes.c_int64(values))
        return data

    def vec_dot(self, t: ScalarType, packed: Bytes, activations: npt.NDArray[np.void]) -> float:
        """Dot product of one packed row with as many ``Q8_0`` blocks."""
        x, y = np.ascontiguousarray(packed), np.ascontiguousarray(activations)
        if x.size != y.size * t.block_bytes:
            raise ValueError(f"{x.size} bytes of {t.name} do not match {y.size} blocks of q8_0")
        result = ctypes.c_float()
        zero = ctypes.c_size_t(0)
        dot = self._lib[f"ggml_vec_dot_{t.c_name}_q8_0"]
        dot(y.size * QK_SCALAR, ctypes.byref(result), zero, _pointer(x), zero, _pointer(y), zero, 1)
        return result.value

    def validate(self, t: TurboType, packed: Bytes) -> bool:
        """Whether ``ggml_turbo_validate_row`` accepts the blocks."""
        data = np.ascontiguousarray(packed)
        return bool(self._lib.ggml_turbo_validate_row(t.type_id, _pointer(data), ctypes.c_size_t(data.nbytes)))

    def _quantize_with(self, function: str, t: ScalarType, x: npt.ArrayLike) -> Bytes:
        rows, packed = _rows_and_output(t, x)
        self._lib[function](_pointer(rows), _pointer(packed), ctypes.c_int64(rows.size))
        return packed


@cache
def load(*flags: str) -> Oracle:
    """Compile (if needed) with ``-O3`` and these flags, and load."""
    return Oracle(build(flags))


def build(flags: Sequence[str] = ()) -> Path:
    """Compile the C code into a shared library and return its path; does nothing when it is there already.

    Raises:
        EnvironmentMissing: there is no C compiler.
        ToolFailed: it does not compile.
    """
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if tools.find(name)), None)
    if compiler is None:
        raise EnvironmentMissing("no C compiler found", tools.install_hint("gcc"))
    options = ("-std=gnu11", "-O3", "-shared", "-fPIC", *WARNINGS, *flags)
    folder = home() / "oracle" / _key(tools.capture([compiler, "--version"]), options)
    library = folder / "libturbo.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"libturbo.{os.getpid()}.so"
        ggml = patches_dir() / _GGML
        includes = [f"-I{path}" for path in (_STANDALONE, ggml / "src", ggml / "include")]
        sources = [ggml / path for path in _SOURCES]
        argv: list[str | Path] = [compiler, *options, *includes, *sources, "-o", part, "-lm"]
        tools.run(argv, log=folder / f"compile.{os.getpid()}.log", timeout=_COMPILE_SECONDS)
        part.replace(library)
    return library


def _key(compiler_version: str, options: Sequence[str]) -> str:
    ggml = patches_dir() / _GGML
    digest = hashlib.sha256("\0".join([platform.machine(), _cpu_flags(), compiler_version, *options]).encode())
    ours = sorted(path for folder in _FOLDERS for path in (ggml / folder).iterdir() if path.is_file())
    for path in [*ours, *sorted(_STANDALONE.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """What ``-march=native`` depends on, so that a cache folder shared between machines stays valid."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _rows_and_output(t: TurboType, x: npt.ArrayLike) -> tuple[Floats, Bytes]:
    rows, size = np.ascontiguousarray(x, dtype=np.float32), t.block
    if rows.ndim == 0 or rows.shape[-1] % size:
        raise ValueError(f"rows of shape {rows.shape} are no whole number of blocks of {size}")
    return rows, np.empty((*rows.shape[:-1], rows.shape[-1] // size * t.block_bytes), dtype=np.uint8)


def _pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
