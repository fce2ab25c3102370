"""WMMA of RDNA3 in waves of 32 lanes: D = A * B + C of 16x16 tiles.

Lane l holds row l%16 of A and column l%16 of B, so each row and each column is in two lanes, which must agree. Register i of C and D is
row 2*i + l/16, column l%16; a float16 there is in the half of the register that op_sel names, and the other half stays.

Sums of integers are exact (wrapped, or saturated with clamp). In which order hardware adds floats is not documented: here the sixteen
products and C are added in float64 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arithmetic import F16, F32, F64, I32, I64, U32, Array
from .decode import VGPR, Instruction
from .errors import BadOperand, Unsupported
from .operands import constant
from .packed import Fields, elements
from .state import LANES, Group

Run = Callable[[Group], None]
Rows = Callable[[npt.NDArray[np.uint32]], Array]
Accumulate = Callable[[Group, Array], None]

SIDE = 16


def bind(inst: Instruction) -> Run:
    """The function that executes a WMMA instruction."""
    fields = Fields(inst)
    match = re.fullmatch(r"V_WMMA_(F32|F16|I32)_16X16X16_(F16|BF16|IU8|IU4)", fields.name)
    if match is None:
        raise Unsupported(fields.name)
    result, element = match.groups()
    is_integer = element.startswith("IU")
    decode = [_integers(fields, k, int(element[2])) if is_integer else _floats(fields, k, element) for k in range(2)]
    count = SIDE * int(element[2]) // 32 if is_integer else SIDE // 2
    accumulate = _integer_sum(fields) if is_integer else _float_sum(fields, result)
    sources = [source - VGPR for source in fields.sources[:2]]
    for source in sources:
        if source < 0:
            raise Unsupported(f"{fields.name} with A or B in scalar registers")
        if source < fields.vdst + 8 and fields.vdst < source + count:
            raise BadOperand("D of WMMA overlaps A or B")

    def run(g: Group) -> None:
        if g.mask() is not None:
            raise BadOperand("WMMA with lanes that are off")
        a, b = (rows(_sixteen(g.u[source : source + count], name)) for rows, source, name in zip(decode, sources, "AB", strict=True))
        accumulate(g, np.matmul(a, b.transpose(0, 2, 1)).reshape(g.n, 8, LANES).transpose(1, 0, 2))

    return run


def _sixteen(registers: npt.NDArray[np.uint32], name: str) -> npt.NDArray[np.uint32]:
    """``(register, n, lane)`` as ``(n, row, register)`` of the sixteen rows that both halves of the wave hold."""
    low, high = registers[:, :, :SIDE], registers[:, :, SIDE:]
    if not np.array_equal(low, high):
        raise BadOperand(f"operand {name} of WMMA differs between the halves of the wave")
    return np.ascontiguousarray(low.transpose(1, 2, 0))


def _integers(fields: Fields, operand: int, bits: int) -> Rows:
    """Integers as float32, in which sums of sixteen products are exact. A bit of NEG means that the operand is signed."""
    signed = bool(fields.negative[0] >> operand & 1)
    if any(fields.negative[1:]) or fields.negative[0] >> 2:
        raise Unsupported(f"{fields.name} with NEG_HI or a negated C")
    return lambda rows: elements(rows, bits, signed).reshape(len(rows), SIDE, SIDE).astype(F32)


def _floats(fields: Fields, operand: int, element: str) -> Rows:
    """Floats as float64, their even and odd elements negated by NEG_LO and NEG_HI."""
    signs = np.resize([-1.0 if plane >> operand & 1 else 1.0 for plane in fields.negative], SIDE)
    if element == "F16":
        return lambda rows: rows.view(F16).astype(F64) * signs
    return lambda rows: (rows.view(np.uint16).astype(U32) << U32(16)).view(F32).astype(F64) * signs


def _integer_sum(fields: Fields) -> Accumulate:
    read, target, clamp, limits = _addend(fields, "i", 0), fields.vdst, fields.clamp, np.iinfo(I32)

    def add(g: Group, product: Array) -> None:
        total = product.astype(I64) + read(g)
        g.i[target : target + 8] = np.clip(total, limits.min, limits.max) if clamp else total.astype(U32).view(I32)

    return add


def _float_sum(fields: Fields, result: str) -> Accumulate:
    fields.reject_clamp()
    kind, half, target = "f" if result == "F32" else "h", fields.select[0] >> 2 & 1, fields.vdst
    read = _addend(fields, kind, half)
    negative, absolute = (plane >> 2 & 1 for plane in fields.negative)

    def add(g: Group, product: Array) -> None:
        addend = np.abs(read(g)) if absolute else read(g)
        view = g.f[target : target + 8] if kind == "f" else g.hf[target : target + 8, :, :, half]
        view[...] = product - addend if negative else product + addend

    return add


def _addend(fields: Fields, kind: str, half: int) -> Callable[[Group], Array]:
    """C, which may be an inline constant."""
    source = fields.sources[2] - VGPR
    value = constant(fields.sources[2], fields.literal, kind)
    if value is not None:
        return lambda g: value
    if source < 0:
        raise Unsupported(f"{fields.name} with C in scalar registers")
    if kind == "h":
        return lambda g: g.hf[source : source + 8, :, :, half]
    return (lambda g: g.f[source : source + 8]) if kind == "f" else (lambda g: g.i[source : source + 8])
