"""Vector instructions (VOP1, VOP2, VOP3, VOPC, VOPD): from a decoded instruction to a function that executes it for a group."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import lanes
from .arithmetic import COMPARE, F32, I64, SATURATING, TABLE, U32, U64, Array, Function, count_bits, fma16, fma32, is_class
from .decode import DPP16, LITERAL, VGPR, Instruction
from .errors import Unsupported
from .operands import DTYPE, FLOAT, HALF, Read, modified, scalar, split_half, vector, writer
from .state import EXEC, LANE, LANES, VCC, Group, unpack

Run = Callable[[Group], None]

COMPARE_KINDS = {"F16": "h", "F32": "f", "F64": "d", "I16": "s", "U16": "w", "I32": "i", "U32": "u", "I64": "I", "U64": "U"}
OMOD = (1.0, 2.0, 4.0, 0.5)


class Operands:
    """The fields of one vector instruction, whatever its encoding."""

    def __init__(self, inst: Instruction) -> None:
        self.inst = inst
        self.name = re.sub(r"_E(32|64)$", "", inst.name)
        self.format = inst.format
        self.wide = self.format.startswith("VOP3")
        self.literal: int | None = inst.get("literal", None)
        self.sources = [getattr(inst, field) for field in ("src0", "src1" if self.wide else "vsrc1", "src2") if inst.has(field)]
        self.dpp = bool(self.sources) and self.sources[0] == DPP16
        self.dpp_register = -1
        self.negative, self.absolute = self._modifiers()
        self.opsel: int | None = (inst.get("opsel")) if self.wide else None
        self.vdst = inst.vdst - VGPR if inst.has("vdst") else -1
        self.clamp = bool(inst.get("clmp"))
        self.omod = OMOD[inst.get("omod")]

    def _modifiers(self) -> tuple[int, int]:
        inst = self.inst
        negative, absolute = inst.get("neg"), inst.get("abs")
        if self.dpp and not self.wide:
            negative, absolute = inst.src0_neg | inst.src1_neg << 1, inst.src0_abs | inst.src1_abs << 1
        return negative, absolute

    def source(self, index: int, kind: str) -> Read:
        """An operand with its modifiers."""
        half = None if self.opsel is None else self.opsel >> index & 1
        from_lanes = index == 0 and self.dpp
        read = self._permuted(kind, half) if from_lanes else vector(self.sources[index], self.literal, kind, half)
        return modified(read, kind, self.negative >> index & 1, self.absolute >> index & 1)

    def _permuted(self, kind: str, half: int | None) -> Read:
        """The first operand of a DPP instruction, which :func:`lanes.dpp` has put into ``Group.first``."""
        self.dpp_register = self.inst.vsrc0 - VGPR
        if kind not in HALF:
            return lambda g: g.first.view(DTYPE[kind])  # type: ignore[union-attr]
        self.dpp_register, which = split_half(self.dpp_register, half)
        return lambda g: g.first.view(np.uint16)[:, which::2].view(DTYPE[kind])  # type: ignore[union-attr]

    def result(self, kind: str) -> Callable[[Group, Array], None]:
        """What writes the result, output modifiers included."""
        write = writer(self.vdst, kind, None if self.opsel is None else self.opsel >> 3 & 1)
        if not self.clamp and self.omod == 1.0:
            return write
        if kind not in FLOAT:
            raise Unsupported("clamp of an integer")
        factor, clamp = DTYPE[kind](self.omod), self.clamp

        def finish(g: Group, value: Array) -> None:
            value = value * factor
            write(g, np.nan_to_num(np.clip(value, 0, 1), nan=0.0) if clamp else value)

        return finish


def bind(inst: Instruction) -> Run:
    """The function that executes a vector instruction."""
    ops = Operands(inst)
    if ops.name.startswith("V_CMP"):
        run = _compare(ops)
    elif ops.name in SPECIAL:
        run = SPECIAL[ops.name](ops)
    elif ops.name in TABLE:
        run = _plain(ops)
    else:
        raise Unsupported(ops.name)
    if ops.dpp:
        return lanes.dpp(inst, ops.dpp_register, run)
    return run


def _plain(ops: Operands) -> Run:
    kinds, function = TABLE[ops.name]
    if ops.clamp and ops.name in SATURATING:
        kinds, function = SATURATING[ops.name]
        ops.clamp = False
    result, sources = kinds.split(":")
    reads = [ops.source(k, kind) for k, kind in enumerate(sources)]
    if isinstance(function, np.ufunc) and result in "fui" and not ops.clamp and ops.omod == 1.0:
        return _in_place(function, reads, result, ops.vdst)
    write = ops.result(result)
    if len(reads) == 1:
        (a,) = reads
        return lambda g: write(g, function(a(g)))
    if len(reads) == 2:
        a, b = reads
        return lambda g: write(g, function(a(g), b(g)))
    a, b, c = reads
    return lambda g: write(g, function(a(g), b(g), c(g)))


def _in_place(function: np.ufunc, reads: list[Read], kind: str, register: int) -> Run:
    """A ufunc that writes into the result's register: no array is made."""

    def run(g: Group) -> None:
        row = getattr(g, kind)[register]
        mask = g.mask()
        if mask is None:
            function(*[read(g) for read in reads], out=row)
        else:
            function(*[read(g) for read in reads], out=row, where=mask)

    return run


def _compare(ops: Operands) -> Run:
    match = re.fullmatch(r"V_CMP(X?)_(\w+?)_([FIU]\d\d)", ops.name)
    if match is None:
        raise Unsupported(ops.name)
    to_exec, condition, type_name = match.groups()
    kind = COMPARE_KINDS[type_name]
    function: Function = is_class if condition == "CLASS" else COMPARE[condition]
    a, b = ops.source(0, kind), ops.source(1, "u" if condition == "CLASS" else kind)
    target = EXEC if to_exec else ops.inst.vdst if ops.wide else VCC
    return lambda g: g.put_mask(target, function(a(g), b(g)))


def _accumulate(kind: str, function: Function) -> Callable[[Operands], Run]:
    """a * b + d, the result's register being the third operand."""

    def bind_it(ops: Operands) -> Run:
        a, b, write = ops.source(0, kind), ops.source(1, kind), ops.result(kind)
        half = None if ops.opsel is None else ops.opsel >> 3 & 1
        d = vector(VGPR + ops.vdst, None, kind, half)
        return lambda g: write(g, function(a(g), b(g), d(g)))

    return bind_it


def _with_literal(kind: str, function: Function, position: int) -> Callable[[Operands], Run]:
    """FMAAK (a * b + literal) and FMAMK (a * literal + b)."""

    def bind_it(ops: Operands) -> Run:
        reads = [ops.source(0, kind), ops.source(1, kind)]
        reads.insert(position, vector(LITERAL, ops.literal, kind, 0))
        a, b, c = reads
        write = ops.result(kind)
        return lambda g: write(g, function(a(g), b(g), c(g)))

    return bind_it


def _select(kind: str) -> Callable[[Operands], Run]:
    """V_CNDMASK: sign modifiers make the operands floats."""

    def bind_it(ops: Operands) -> Run:
        as_float = {"u": "f", "w": "h"}[kind] if ops.negative or ops.absolute else kind
        a, b, write = ops.source(0, as_float), ops.source(1, as_float), ops.result(as_float)
        chosen = scalar(ops.sources[2] if ops.wide else VCC, None)
        return lambda g: write(g, np.where(unpack(np.broadcast_to(chosen(g), (g.n,))), b(g), a(g)))

    return bind_it


def _carry(subtract: bool, reverse: bool, carry_in: bool) -> Callable[[Operands], Run]:
    def bind_it(ops: Operands) -> Run:
        a, b = (ops.source(1, "u"), ops.source(0, "u")) if reverse else (ops.source(0, "u"), ops.source(1, "u"))
        carry = scalar(ops.sources[2] if ops.wide else VCC, None) if carry_in else None
        target = ops.inst.sdst if ops.wide else VCC
        write = ops.result("u")

        def run(g: Group) -> None:
            extra = unpack(np.broadcast_to(carry(g), (g.n,))).astype(I64) if carry else I64(0)
            total = a(g).astype(I64) - b(g) - extra if subtract else a(g).astype(I64) + b(g) + extra
            write(g, total.astype(U32))
            g.put_mask(target, (total >> I64(32)) != 0)

        return run

    return bind_it


def _multiply_add_64(kind: str) -> Callable[[Operands], Run]:
    def bind_it(ops: Operands) -> Run:
        long_kind, dtype = ("U", U64) if kind == "u" else ("I", I64)
        a, b, c = ops.source(0, kind), ops.source(1, kind), ops.source(2, long_kind)
        write, target = ops.result(long_kind), ops.inst.sdst

        def run(g: Group) -> None:
            product = a(g).astype(dtype) * b(g)
            total = product + c(g)
            overflow = total < product if kind == "u" else (total < product) != (c(g) < 0)
            write(g, np.broadcast_to(total, (g.n, LANES)))
            g.put_mask(target, overflow)

        return run

    return bind_it


def _division_scale(kind: str) -> Callable[[Operands], Run]:
    """Nothing is scaled: V_DIV_FIXUP gives the rounded quotient whatever comes in between."""

    def bind_it(ops: Operands) -> Run:
        a, write, target = ops.source(0, kind), ops.result(kind), ops.inst.sdst

        def run(g: Group) -> None:
            write(g, a(g) + DTYPE[kind](0))
            g.put_mask(target, np.zeros((g.n, LANES), np.bool_))

        return run

    return bind_it


def _lanes_below(high: bool) -> Callable[[Operands], Run]:
    """V_MBCNT: ones of a mask below the lane; a wave of 32 lanes has none in the upper half."""

    def bind_it(ops: Operands) -> Run:
        a, b, write = ops.source(0, "u"), ops.source(1, "u"), ops.result("u")
        if high:
            return lambda g: write(g, b(g))
        below = (U32(1) << LANE) - U32(1)
        return lambda g: write(g, count_bits(a(g) & below) + b(g))

    return bind_it


def _dot2_accumulate(ops: Operands) -> Run:
    a, b, write = ops.source(0, "u"), ops.source(1, "u"), ops.result("f")
    return lambda g: write(g, dot2(a(g), b(g)) + g.f[ops.vdst])


def dot2(a: Array, b: Array) -> Array:
    """The two products of float16 pairs, added in float32."""
    a, b = (np.ascontiguousarray(x).view(np.float16).astype(F32) for x in (a, b))
    product = a * b
    return product[..., 0::2] + product[..., 1::2]


def _packed_fma(ops: Operands) -> Run:
    a, b, write = ops.source(0, "u"), ops.source(1, "u"), ops.result("u")

    def run(g: Group) -> None:
        halves = [np.ascontiguousarray(np.broadcast_to(x, (g.n, LANES))).view(np.float16) for x in (a(g), b(g), g.u[ops.vdst])]
        write(g, fma16(*halves).view(U32))

    return run


def _nothing(ops: Operands) -> Run:
    return lambda g: None


SPECIAL: dict[str, Callable[[Operands], Run]] = {
    "V_NOP": _nothing,
    "V_FMAC_F32": _accumulate("f", fma32),
    "V_FMAC_F16": _accumulate("h", fma16),
    "V_FMAAK_F32": _with_literal("f", fma32, 2),
    "V_FMAMK_F32": _with_literal("f", fma32, 1),
    "V_FMAAK_F16": _with_literal("h", fma16, 2),
    "V_FMAMK_F16": _with_literal("h", fma16, 1),
    "V_PK_FMAC_F16": _packed_fma,
    "V_DOT2ACC_F32_F16": _dot2_accumulate,
    "V_CNDMASK_B32": _select("u"),
    "V_CNDMASK_B16": _select("w"),
    "V_ADD_CO_U32": _carry(subtract=False, reverse=False, carry_in=False),
    "V_SUB_CO_U32": _carry(subtract=True, reverse=False, carry_in=False),
    "V_SUBREV_CO_U32": _carry(subtract=True, reverse=True, carry_in=False),
    "V_ADD_CO_CI_U32": _carry(subtract=False, reverse=False, carry_in=True),
    "V_SUB_CO_CI_U32": _carry(subtract=True, reverse=False, carry_in=True),
    "V_SUBREV_CO_CI_U32": _carry(subtract=True, reverse=True, carry_in=True),
    "V_MAD_U64_U32": _multiply_add_64("u"),
    "V_MAD_I64_I32": _multiply_add_64("i"),
    "V_DIV_SCALE_F32": _division_scale("f"),
    "V_DIV_SCALE_F64": _division_scale("d"),
    "V_MBCNT_LO_U32_B32": _lanes_below(high=False),
    "V_MBCNT_HI_U32_B32": _lanes_below(high=True),
    "V_READFIRSTLANE_B32": lanes.read_first,
    "V_READLANE_B32": lanes.read_lane,
    "V_WRITELANE_B32": lanes.write_lane,
    "V_PERMLANE16_B32": lanes.permute_rows,
    "V_PERMLANEX16_B32": lanes.permute_rows,
    "V_SWAP_B32": lanes.swap,
    "V_MOVRELS_B32": lanes.move_relative,
    "V_MOVRELD_B32": lanes.move_relative,
}


def bind_dual(inst: Instruction) -> Run:
    """VOPD: both halves read before either writes."""
    halves = [_dual_half(inst, which) for which in "xy"]
    (first, first_to), (second, second_to) = halves

    def run(g: Group) -> None:
        a = np.broadcast_to(first(g), (g.n, LANES)).copy()
        g.put(g.u[second_to], second(g).view(U32))
        g.put(g.u[first_to], a.view(U32))

    return run


def _dual_half(inst: Instruction, which: str) -> tuple[Read, int]:
    name = getattr(inst, f"op{which}").replace("V_DUAL_", "V_")
    literal = inst.get("literal", None)
    first, second = getattr(inst, f"src{which}0"), getattr(inst, f"vsrc{which}1")
    target = getattr(inst, f"vdst{which}")

    def read(source: int, kind: str) -> Read:
        return vector(source, literal, kind, 0)

    if name in ("V_FMAC_F32", "V_FMAAK_F32", "V_FMAMK_F32"):
        order = {"V_FMAC_F32": (first, second, target), "V_FMAAK_F32": (first, second, LITERAL), "V_FMAMK_F32": (first, LITERAL, second)}[
            name
        ]
        a, b, c = (read(source, "f") for source in order)
        return lambda g: fma32(a(g), b(g), c(g)), target - VGPR
    if name == "V_CNDMASK_B32":
        a, b = read(first, "u"), read(second, "u")
        return lambda g: np.where(unpack(g.s[VCC]), b(g), a(g)), target - VGPR
    if name == "V_DOT2ACC_F32_F16":
        a, b, c = read(first, "u"), read(second, "u"), read(target, "f")
        return lambda g: dot2(a(g), b(g)) + c(g), target - VGPR
    if name not in TABLE:
        raise Unsupported(f"{name} in VOPD")
    kinds, function = TABLE[name]
    reads = [read(source, kind) for source, kind in zip((first, second), kinds.split(":")[1], strict=False)]
    return lambda g: function(*[r(g) for r in reads]), target - VGPR
