"""VOP3P without WMMA: packed 16-bit arithmetic, mixed-precision FMA and dot products."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arithmetic import F16, F32, I32, I64, U32, Array, Function, fma16, fma32
from .decode import DPP16, VGPR, Instruction
from .errors import Unsupported
from .operands import DTYPE, Read, constant, vector, writer
from .state import Group

Run = Callable[[Group], None]

PACKED: dict[str, tuple[str, Function]] = {
    "V_PK_FMA_F16": ("hhh", fma16),
    "V_PK_ADD_F16": ("hh", np.add),
    "V_PK_MUL_F16": ("hh", np.multiply),
    "V_PK_MAX_F16": ("hh", np.fmax),
    "V_PK_MIN_F16": ("hh", np.fmin),
    "V_PK_ADD_U16": ("ww", np.add),
    "V_PK_SUB_U16": ("ww", np.subtract),
    "V_PK_ADD_I16": ("ww", np.add),
    "V_PK_SUB_I16": ("ww", np.subtract),
    "V_PK_MUL_LO_U16": ("ww", np.multiply),
    "V_PK_MAD_U16": ("www", lambda a, b, c: a * b + c),
    "V_PK_MAD_I16": ("www", lambda a, b, c: a * b + c),
    "V_PK_MAX_U16": ("ww", np.maximum),
    "V_PK_MIN_U16": ("ww", np.minimum),
    "V_PK_MAX_I16": ("ss", np.maximum),
    "V_PK_MIN_I16": ("ss", np.minimum),
    "V_PK_LSHLREV_B16": ("ww", lambda a, b: b << (a & np.uint16(15))),
    "V_PK_LSHRREV_B16": ("ww", lambda a, b: b >> (a & np.uint16(15))),
    "V_PK_ASHRREV_I16": ("ss", lambda a, b: b >> (a & np.int16(15))),
}


class Fields:
    """The fields of one instruction. ``select`` and ``negative`` have a bit per operand, for the low and for the high half."""

    def __init__(self, inst: Instruction) -> None:
        self.name: str = inst.name
        self.literal: int | None = inst.get("literal", None)
        self.sources = [inst.src0, inst.src1, inst.src2]
        if self.sources[0] == DPP16:
            raise Unsupported(f"{self.name} with DPP")
        self.select = (inst.opsel, inst.opsel_hi | inst.opsel_hi2 << 2)
        self.negative = (inst.neg, inst.neg_hi)
        self.clamp = bool(inst.clmp)
        self.vdst = inst.vdst - VGPR

    def half(self, index: int, kind: str, high: bool) -> Read:
        """The half of an operand that takes part in the low or in the high result."""
        source, which = self.sources[index], self.select[high] >> index & 1
        if constant(source, self.literal, "u") is not None:
            read = self._constant_half(source, kind, which)
        else:
            read = vector(source, None, kind, which)
        if kind == "h" and self.negative[high] >> index & 1:
            return lambda g: -read(g)
        return read

    def both(self, index: int, kind: str) -> Read | None:
        """Both halves of an operand in a last axis, if it is a register whose halves each take part in the result of their place."""
        register = self.sources[index] - VGPR
        if register < 0 or any(plane >> index & 1 for plane in (self.select[0], ~self.select[1], *self.negative)):
            return None
        if kind == "h":
            return lambda g: g.hf[register]
        return (lambda g: g.h[register]) if kind == "w" else (lambda g: g.h[register].view(np.int16))

    def _constant_half(self, source: int, kind: str, which: int) -> Read:
        """Inline constants are 32-bit values: sign-extended integers; a float16 below zeros, or a float32 for integer operations."""
        is_float = 240 <= source <= 248
        narrow = constant(source, self.literal, "h" if is_float and kind == "h" else "u")
        assert narrow is not None
        bits = int(narrow.view(np.uint16)[0]) if narrow.dtype.itemsize == 2 else int(narrow[0])
        value = np.array([bits >> 16 * which & 0xFFFF], np.uint16).view(DTYPE[kind])
        return lambda g: value

    def reject_clamp(self) -> None:
        """For instructions whose clamp is not modelled."""
        if self.clamp:
            raise Unsupported(f"{self.name} with clamp")


def bind(inst: Instruction) -> Run:
    """The function that executes a VOP3P instruction."""
    fields = Fields(inst)
    if fields.name in PACKED:
        return _packed(fields)
    if fields.name.startswith("V_FMA_MIX"):
        return _mixed(fields)
    if fields.name.startswith("V_DOT"):
        return _dot(fields)
    raise Unsupported(fields.name)


def _packed(fields: Fields) -> Run:
    kinds, function = PACKED[fields.name]
    low = [fields.half(k, kind, high=False) for k, kind in enumerate(kinds)]
    high = [fields.half(k, kind, high=True) for k, kind in enumerate(kinds)]
    if fields.clamp and kinds[0] != "h":
        raise Unsupported(f"{fields.name} with clamp")
    clamp = fields.clamp
    put_low, put_high = writer(fields.vdst, kinds[0], 0), writer(fields.vdst, kinds[0], 1)
    whole = [fields.both(k, kind) for k, kind in enumerate(kinds)]
    if not clamp and all(whole):
        return lambda g: g.put(g.u[fields.vdst], function(*[read(g) for read in whole]).view(U32)[..., 0])

    def run(g: Group) -> None:
        first, second = function(*[read(g) for read in low]), function(*[read(g) for read in high])
        if clamp:
            first, second = (np.nan_to_num(np.clip(x, 0, 1), nan=0.0) for x in (first, second))
        put_low(g, first)
        put_high(g, second)

    return run


def _mixed(fields: Fields) -> Run:
    """V_FMA_MIX: each operand is a float32, or a float16 in either half. The second modifier of an operand means its absolute value."""
    reads = [_mixed_operand(fields, k) for k in range(3)]
    write32 = writer(fields.vdst, "f")
    write16 = writer(fields.vdst, "h", 1 if fields.name == "V_FMA_MIXHI_F16" else 0)
    clamp, to_half = fields.clamp, fields.name != "V_FMA_MIX_F32"

    def run(g: Group) -> None:
        value = fma32(*[read(g) for read in reads])
        if clamp:
            value = np.nan_to_num(np.clip(value, 0, 1), nan=0.0)
        if to_half:
            write16(g, value.astype(F16))
        else:
            write32(g, value)

    return run


def _mixed_operand(fields: Fields, index: int) -> Read:
    source, (which, is_half) = fields.sources[index], (plane >> index & 1 for plane in fields.select)
    if is_half:
        narrow = vector(source, fields.literal, "h", which)
        wide: Read = lambda g: narrow(g).astype(F32)
    else:
        wide = vector(source, fields.literal, "f")
    negative, absolute = (plane >> index & 1 for plane in fields.negative)
    if negative and absolute:
        return lambda g: -np.abs(wide(g))
    if negative or absolute:
        return (lambda g: -wide(g)) if negative else (lambda g: np.abs(wide(g)))
    return wide


def _dot(fields: Fields) -> Run:
    match = re.fullmatch(r"V_DOT(\d)_(F32|I32|U32)_(\w+)", fields.name)
    if match is None:
        raise Unsupported(fields.name)
    if match[3] == "F16":
        fields.reject_clamp()
        return _dot_f16(fields)
    if match[3] not in ("IU8", "U8", "IU4", "U4"):
        raise Unsupported(fields.name)
    bits = int(match[3][-1])
    signed = fields.negative[0] if match[3].startswith("I") else 0
    a, b, c = (vector(source, fields.literal, "u") for source in fields.sources)
    limits, clamp = np.iinfo(I32 if match[2] == "I32" else U32), fields.clamp

    def run(g: Group) -> None:
        left, right = (elements(read(g), bits, bool(signed >> k & 1)) for k, read in enumerate((a, b)))
        total = (left * right).sum(-1, dtype=I64) + (c(g).view(I32) if limits.min else c(g))
        g.put(g.u[fields.vdst], (np.clip(total, limits.min, limits.max) if clamp else total).astype(U32))

    return run


def elements(x: Array, bits: int, signed: bool) -> npt.NDArray[np.int32]:
    """The integers of ``bits`` bits in dwords, along a new last axis."""
    if bits == 8:
        return np.ascontiguousarray(x)[..., None].view(np.int8 if signed else np.uint8).astype(I32)
    up = np.arange(32 - bits, -1, -bits, dtype=I32)
    moved = x[..., None].astype(U32).view(I32) << up
    return moved >> I32(32 - bits) if signed else (moved.view(U32) >> U32(32 - bits)).astype(I32)


def _dot_f16(fields: Fields) -> Run:
    whole = [fields.both(k, "h") for k in range(2)]
    halves = [[fields.half(k, "h", high) for k in range(2)] for high in (False, True)]
    c = vector(fields.sources[2], fields.literal, "f")
    negate = fields.negative[0] >> 2 & 1
    (a0, b0), (a1, b1) = halves
    a, b = whole

    def run_whole(g: Group) -> None:
        product = np.multiply(a(g), b(g), dtype=F32)
        total = product[..., 0] + product[..., 1]
        g.put(g.f[fields.vdst], total - c(g) if negate else total + c(g))

    if a is not None and b is not None:
        return run_whole

    def run(g: Group) -> None:
        low = np.multiply(a0(g), b0(g), dtype=F32)
        high = np.multiply(a1(g), b1(g), dtype=F32)
        addend = -c(g) if negate else c(g)
        g.put(g.f[fields.vdst], low + high + addend)

    return run
