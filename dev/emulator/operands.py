"""Operands of instructions as functions of a group: registers, constants, modifiers.

A kind is one letter: ``u i f`` 32 bits unsigned, signed, float; ``U I d`` 64 bits; ``w s h`` 16 bits. An operand comes as an array that
broadcasts to ``(waves, 32)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .decode import LITERAL, VGPR
from .errors import Unsupported
from .state import EXEC, NULL, VCC, Group

Array = npt.NDArray[Any]
Read = Callable[[Group], Array]

DTYPE = {
    **{"u": np.uint32, "i": np.int32, "f": np.float32},
    **{"U": np.uint64, "I": np.int64, "d": np.float64},
    **{"w": np.uint16, "s": np.int16, "h": np.float16},
}
HALF, PAIR, FLOAT = "wsh", "UId", "fdh"

VCCZ, EXECZ, SCC = 251, 252, 253
SHARED_BASE, PRIVATE_BASE = 235, 237
APERTURE = {SHARED_BASE: 0x20000 << 32, PRIVATE_BASE: 0x10000 << 32}
"""Where flat addresses of LDS and of scratch begin; no global memory is there."""

_INTEGERS = {**{128 + k: k for k in range(65)}, **{192 + k: -k for k in range(1, 17)}}
_FLOATS = {240: 0.5, 241: -0.5, 242: 1.0, 243: -1.0, 244: 2.0, 245: -2.0, 246: 4.0, 247: -4.0, 248: 0.15915494309189532}


def constant(source: int, literal: int | None, kind: str) -> Array | None:
    """An inline constant or a literal as an array of one value; ``None`` when the source is a register."""
    dtype = np.dtype(DTYPE[kind])
    bits = 8 * dtype.itemsize
    if source == NULL:
        value = 0
    elif source in _INTEGERS:
        value = _INTEGERS[source]
    elif source in _FLOATS and kind in "UI":
        raise Unsupported(f"float constant {_FLOATS[source]} in a 64-bit integer operand")
    elif source in _FLOATS:
        float_of = {2: np.float16, 4: np.float32, 8: np.float64}[dtype.itemsize]
        return np.array([_FLOATS[source]], float_of).view(dtype)
    elif source == LITERAL and literal is not None:
        value = literal << 32 if kind == "d" else literal - (1 << 32 if kind == "I" and literal >> 31 else 0)
    elif source in APERTURE:
        value = APERTURE[source]
    else:
        return None
    return np.array([value & ((1 << bits) - 1)], f"u{dtype.itemsize}").view(dtype)


def scalar(source: int, literal: int | None, kind: str = "u") -> Read:
    """A scalar operand of 32 bits, ``(n,)`` or ``(1,)``."""
    value = constant(source, literal, kind)
    if value is not None:
        return lambda g: value
    if source < NULL or source in (125, EXEC, 127):
        if kind == "u":
            return lambda g: g.s[source]
        return (lambda g: g.sf[source]) if kind == "f" else (lambda g: g.si[source])
    if source in (VCCZ, EXECZ):
        register = VCC if source == VCCZ else EXEC
        return lambda g: (g.s[register] == 0).astype(np.uint32)
    if source == SCC:
        return lambda g: g.scc.astype(np.uint32)
    raise Unsupported(f"scalar operand {source}")


def scalar64(source: int, literal: int | None, kind: str = "U") -> Read:
    """A scalar operand of 64 bits."""
    value = constant(source, literal, kind)
    if value is not None:
        return lambda g: value
    dtype = DTYPE[kind]
    if source == EXEC:
        return lambda g: g.s[EXEC].astype(np.uint64).view(dtype)
    if source < NULL:
        return lambda g: _join(g.s[source], g.s[source + 1]).view(dtype)
    raise Unsupported(f"64-bit scalar operand {source}")


def vector(source: int, literal: int | None, kind: str, half: int | None = None) -> Read:
    """A vector operand.

    ``half`` chooses the half of a 16-bit operand; ``None`` is for the short encodings, in which bit 7 of the register does.
    """
    value = constant(source, literal, kind)
    if value is not None:
        if half and kind in HALF and source == LITERAL:
            raise Unsupported("upper half of a literal")
        return lambda g: value
    if kind in HALF:
        return _half(source, literal, kind, half)
    if source >= VGPR:
        return _register(source - VGPR, kind)
    read = (scalar64 if kind in PAIR else scalar)(source, literal, kind)
    return lambda g: read(g)[:, None]


def _register(register: int, kind: str) -> Read:
    if kind in PAIR:
        dtype = DTYPE[kind]
        return lambda g: _join(g.u[register], g.u[register + 1]).view(dtype)
    if kind == "f":
        return lambda g: g.f[register]
    return (lambda g: g.u[register]) if kind == "u" else (lambda g: g.i[register])


def _half(source: int, literal: int | None, kind: str, half: int | None) -> Read:
    dtype = DTYPE[kind]
    if source < VGPR:
        read = scalar(source, literal)
        shift = np.uint32(16 if half else 0)
        return lambda g: (read(g) >> shift).astype(np.uint16).view(dtype)[:, None]
    register, which = split_half(source - VGPR, half)
    if kind == "h":
        return lambda g: g.hf[register, :, :, which]
    if kind == "w":
        return lambda g: g.h[register, :, :, which]
    return lambda g: g.h[register, :, :, which].view(np.int16)


def split_half(register: int, half: int | None) -> tuple[int, int]:
    """Register and half of a 16-bit operand; see :func:`vector`."""
    return (register & 127, register >> 7) if half is None else (register, half)


def modified(read: Read, kind: str, negative: int, absolute: int) -> Read:
    """Apply the sign modifiers of a floating-point operand."""
    if kind not in FLOAT or not (negative or absolute):
        return read
    if negative and absolute:
        return lambda g: -np.abs(read(g))
    return (lambda g: -read(g)) if negative else (lambda g: np.abs(read(g)))


def writer(register: int, kind: str, half: int | None = None) -> Callable[[Group, Array], None]:
    """A function that writes a vector register in the lanes that are on; 16-bit results leave the other half."""
    if kind in HALF:
        target, which = split_half(register, half)
        if kind == "h":
            return lambda g, value: g.put(g.hf[target, :, :, which], value)
        return lambda g, value: g.put(g.h[target, :, :, which], value.view(np.uint16))
    if kind in PAIR:
        return lambda g, value: g.put64(register, np.ascontiguousarray(value))
    if kind == "f":
        return lambda g, value: g.put(g.f[register], value)
    return (lambda g, value: g.put(g.u[register], value)) if kind == "u" else (lambda g, value: g.put(g.i[register], value))


def _join(low: Array, high: Array) -> Array:
    result: Array = low.astype(np.uint64)
    result |= high.astype(np.uint64) << np.uint64(32)
    return result
