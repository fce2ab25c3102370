"""Scalar instructions (SOP1, SOP2, SOPC, SOPK, SMEM) except those that change the program counter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import (
    COMPARE,
    I32,
    I64,
    U32,
    U64,
    Array,
    Function,
    count_bits,
    leading_zeros,
    reverse_bits,
    sign_extend,
    trailing_zeros,
)
from .decode import Instruction
from .errors import Unsupported
from .operands import Read, scalar, scalar64
from .state import EXEC, NULL, Group

Run = Callable[[Group], None]


def _shift(y: Array) -> Array:
    return y & U32(31)


def _shift64(y: Array) -> Array:
    return (y & U64(63)).astype(U64)


def _field(x: Array, y: Array, bits: int, signed: bool) -> Array:
    """s_bfe: offset in the low bits of y, width in bits 16 to 22."""
    offset = (y & U64(bits - 1)).astype(U64)
    width = np.minimum((y >> U64(16)) & U64(127), U64(bits))
    up = U64(64) - np.maximum(width, U64(1))
    moved = (x >> offset) << up
    value = (moved.view(I64) >> up.view(I64)).view(U64) if signed else moved >> up
    return np.where(width == 0, U64(0), value)


def _pack(low_high: str) -> Function:
    shifts = [U32(16 if letter == "H" else 0) for letter in low_high]
    return lambda x, y: ((x >> shifts[0]) & U32(0xFFFF)) | ((y >> shifts[1]) & U32(0xFFFF)) << U32(16)


# Result and operands as in arithmetic.py; the second entry says what SCC becomes: "" untouched, "nz" whether the result is not zero.
PLAIN: dict[str, tuple[str, str, Function]] = {
    "S_MOV_B32": ("u:u", "", lambda x: x),
    "S_MOV_B64": ("U:U", "", lambda x: x),
    "S_NOT_B32": ("u:u", "nz", np.invert),
    "S_NOT_B64": ("U:U", "nz", np.invert),
    "S_ABS_I32": ("i:i", "nz", np.abs),
    "S_SEXT_I32_I8": ("i:u", "", lambda x: sign_extend(x, 8).astype(I32)),
    "S_SEXT_I32_I16": ("i:u", "", lambda x: sign_extend(x, 16).astype(I32)),
    "S_BREV_B32": ("u:u", "", reverse_bits),
    "S_BCNT1_I32_B32": ("u:u", "nz", count_bits),
    "S_BCNT0_I32_B32": ("u:u", "nz", lambda x: U32(32) - count_bits(x)),
    "S_BCNT1_I32_B64": ("u:U", "nz", lambda x: count_bits(x.astype(U32)) + count_bits((x >> U64(32)).astype(U32))),
    "S_CLZ_I32_U32": ("u:u", "", lambda x: np.where(x == 0, U32(0xFFFFFFFF), leading_zeros(x))),
    "S_CTZ_I32_B32": ("u:u", "", lambda x: np.where(x == 0, U32(0xFFFFFFFF), trailing_zeros(x))),
    "S_MUL_I32": ("u:uu", "", np.multiply),
    "S_MUL_HI_U32": ("u:uu", "", lambda x, y: ((x.astype(U64) * y) >> U64(32)).astype(U32)),
    "S_MUL_HI_I32": ("i:ii", "", lambda x, y: ((x.astype(I64) * y) >> I64(32)).astype(I32)),
    "S_ABSDIFF_I32": ("i:ii", "nz", lambda x, y: np.abs(x - y)),
    "S_BFM_B32": ("u:uu", "", lambda x, y: ((U32(1) << _shift(x)) - U32(1)) << _shift(y)),
    "S_BFM_B64": ("U:uu", "", lambda x, y: ((U64(1) << (x & U32(63)).astype(U64)) - U64(1)) << (y & U32(63)).astype(U64)),
    "S_LSHL_B32": ("u:uu", "nz", lambda x, y: x << _shift(y)),
    "S_LSHR_B32": ("u:uu", "nz", lambda x, y: x >> _shift(y)),
    "S_ASHR_I32": ("i:iu", "nz", lambda x, y: x >> _shift(y).view(I32)),
    "S_LSHL_B64": ("U:Uu", "nz", lambda x, y: x << _shift64(y)),
    "S_LSHR_B64": ("U:Uu", "nz", lambda x, y: x >> _shift64(y)),
    "S_ASHR_I64": ("I:Iu", "nz", lambda x, y: x >> _shift64(y).view(I64)),
    "S_BFE_U32": ("u:uu", "nz", lambda x, y: _field(x.astype(U64), y.astype(U64), 32, False).astype(U32)),
    "S_BFE_I32": ("u:iu", "nz", lambda x, y: _field(x.astype(I64).view(U64), y.astype(U64), 32, True).astype(U32)),
    "S_BFE_U64": ("U:Uu", "nz", lambda x, y: _field(x, y.astype(U64), 64, False)),
    "S_BFE_I64": ("U:Uu", "nz", lambda x, y: _field(x, y.astype(U64), 64, True)),
    **{f"S_PACK_{a}{b}_B32_B16": ("u:uu", "", _pack(a + b)) for a in "LH" for b in "LH"},
    "S_ADD_F32": ("f:ff", "", np.add),
    "S_MUL_F32": ("f:ff", "", np.multiply),
}
for _name, _function in {
    "AND": np.bitwise_and,
    "OR": np.bitwise_or,
    "XOR": np.bitwise_xor,
    "NAND": lambda x, y: ~(x & y),
    "NOR": lambda x, y: ~(x | y),
    "XNOR": lambda x, y: ~(x ^ y),
    "AND_NOT1": lambda x, y: x & ~y,
    "OR_NOT1": lambda x, y: x | ~y,
}.items():
    PLAIN[f"S_{_name}_B32"] = ("u:uu", "nz", _function)
    PLAIN[f"S_{_name}_B64"] = ("U:UU", "nz", _function)

SAVE_EXEC: dict[str, Function] = {
    "AND": lambda x, e: x & e,
    "OR": lambda x, e: x | e,
    "XOR": lambda x, e: x ^ e,
    "NAND": lambda x, e: ~(x & e),
    "NOR": lambda x, e: ~(x | e),
    "XNOR": lambda x, e: ~(x ^ e),
    "AND_NOT1": lambda x, e: x & ~e,
    "AND_NOT0": lambda x, e: ~x & e,
    "OR_NOT1": lambda x, e: x | ~e,
    "OR_NOT0": lambda x, e: ~x | e,
}


def bind(inst: Instruction) -> Run:
    """The function that executes a scalar instruction."""
    name = inst.name
    if name.startswith("S_CMPK"):
        return _compare_literal(inst, name)
    if name.startswith(("S_CMP_", "S_BITCMP")):
        return _compare(inst, name)
    if "SAVEEXEC" in name or "WREXEC" in name:
        return _save_exec(inst, name)
    if name in PLAIN:
        return _plain(inst, name)
    if name in ARITHMETIC:
        return _arithmetic(inst, name)
    if name in SPECIAL:
        return SPECIAL[name](inst, name)
    raise Unsupported(name)


def _read(inst: Instruction, index: int, kind: str) -> Read:
    source, literal = getattr(inst, f"ssrc{index}"), inst.get("literal", None)
    return scalar64(source, literal, kind) if kind in "UI" else scalar(source, literal, kind)


def _put(target: int, kind: str) -> Callable[[Group, Array], None]:
    if kind in "UI":
        return lambda g, value: g.put_scalar64(target, np.ascontiguousarray(value))
    return lambda g, value: g.put_scalar(target, value.view(U32))


def _plain(inst: Instruction, name: str) -> Run:
    kinds, flag, function = PLAIN[name]
    result, sources = kinds.split(":")
    reads = [_read(inst, k, kind) for k, kind in enumerate(sources)]
    put = _put(inst.sdst, result)

    def run(g: Group) -> None:
        value = function(*[read(g) for read in reads])
        put(g, value)
        if flag:
            g.scc[...] = value != 0

    return run


def _add(x: Array, y: Array, carry: Array) -> tuple[Array, Array]:
    total = x.astype(I64) + y + carry
    return total.astype(U32), total > 0xFFFFFFFF


def _subtract(x: Array, y: Array, carry: Array) -> tuple[Array, Array]:
    total = x.astype(I64) - y - carry
    return total.astype(U32), total < 0


def _signed(x: Array, y: Array, sign: int) -> tuple[Array, Array]:
    total = x.view(I32).astype(I64) + sign * y.view(I32).astype(I64)
    return total.astype(U32), (total < -(1 << 31)) | (total >= 1 << 31)


def _extreme(function: Function, kind: Any) -> Callable[..., tuple[Array, Array]]:
    def run(x: Array, y: Array, carry: Array) -> tuple[Array, Array]:
        value = function(x.view(kind), y.view(kind))
        return value.view(U32), value == x.view(kind)

    return run


def _shift_add(count: int) -> Callable[..., tuple[Array, Array]]:
    def run(x: Array, y: Array, carry: Array) -> tuple[Array, Array]:
        total = (x.astype(U64) << U64(count)) + y
        return total.astype(U32), total > 0xFFFFFFFF

    return run


ARITHMETIC: dict[str, Callable[..., tuple[Array, Array]]] = {
    "S_ADD_U32": lambda x, y, c: _add(x, y, I64(0)),
    "S_SUB_U32": lambda x, y, c: _subtract(x, y, I64(0)),
    "S_ADDC_U32": _add,
    "S_SUBB_U32": _subtract,
    "S_ADD_I32": lambda x, y, c: _signed(x, y, 1),
    "S_SUB_I32": lambda x, y, c: _signed(x, y, -1),
    "S_MIN_I32": _extreme(np.minimum, I32),
    "S_MAX_I32": _extreme(np.maximum, I32),
    "S_MIN_U32": _extreme(np.minimum, U32),
    "S_MAX_U32": _extreme(np.maximum, U32),
    **{f"S_LSHL{k}_ADD_U32": _shift_add(k) for k in (1, 2, 3, 4)},
}
"""Functions of two operands and SCC that give a value and the new SCC."""


def _arithmetic(inst: Instruction, name: str) -> Run:
    x, y, function, target = _read(inst, 0, "u"), _read(inst, 1, "u"), ARITHMETIC[name], inst.sdst

    def run(g: Group) -> None:
        value, flag = function(x(g), y(g), g.scc.astype(I64))
        g.put_scalar(target, value)
        g.scc[...] = flag

    return run


def _compare(inst: Instruction, name: str) -> Run:
    match = re.fullmatch(r"S_(?:CMP_([A-Z]+)|BITCMP([01]))_([IUFB])(\d\d)", name)
    if match is None:
        raise Unsupported(name)
    condition, bit, kind, bits = match.groups()
    if bit is not None:
        x, y = _read(inst, 0, "U" if bits == "64" else "u"), _read(inst, 1, "u")
        wanted, top = int(bit), U32(int(bits) - 1)
        return lambda g: g.set_scc(((x(g) >> (y(g) & top).astype(x(g).dtype)) & x(g).dtype.type(1)) == wanted)
    letter = {"I32": "i", "U32": "u", "U64": "U", "F32": "f"}[kind + bits]
    x, y, function = _read(inst, 0, letter), _read(inst, 1, letter), COMPARE[condition]
    return lambda g: g.set_scc(function(x(g), y(g)))


def _signed_immediate(inst: Instruction) -> int:
    return int((inst.simm16 ^ 0x8000) - 0x8000)


def _compare_literal(inst: Instruction, name: str) -> Run:
    match = re.fullmatch(r"S_CMPK_([A-Z]+)_([IU])32", name)
    if match is None:
        raise Unsupported(name)
    signed = match[2] == "I"
    x, function = scalar(inst.sdst, None, "i" if signed else "u"), COMPARE[match[1]]
    value = np.array([_signed_immediate(inst)], I32) if signed else np.array([inst.simm16], U32)
    return lambda g: g.set_scc(function(x(g), value))


def _save_exec(inst: Instruction, name: str) -> Run:
    match = re.fullmatch(r"S_(\w+?)_(SAVE|WR)EXEC_B32", name)
    if match is None or match[1] not in SAVE_EXEC:
        raise Unsupported(name)
    x, target, function, save = _read(inst, 0, "u"), inst.sdst, SAVE_EXEC[match[1]], match[2] == "SAVE"

    def run(g: Group) -> None:
        before = g.s[EXEC].copy()
        after = function(x(g), before)
        g.put_scalar(EXEC, after)
        g.put_scalar(target, before if save else after)
        g.scc[...] = after != 0

    return run


def _select(inst: Instruction, name: str) -> Run:
    kind = "U" if name.endswith("64") else "u"
    x, y, put = _read(inst, 0, kind), _read(inst, 1, kind), _put(inst.sdst, kind)
    return lambda g: put(g, np.where(g.scc, x(g), y(g)))


def _conditional_move(inst: Instruction, name: str) -> Run:
    kind = "U" if name.endswith("64") else "u"
    x, old, put = _read(inst, 0, kind), (scalar64 if kind == "U" else scalar)(inst.sdst, None), _put(inst.sdst, kind)
    return lambda g: put(g, np.where(g.scc, x(g), old(g)))


def _immediate(inst: Instruction, name: str) -> Run:
    target, value = inst.sdst, np.array([_signed_immediate(inst)], I32)
    old = scalar(target, None, "i")

    def run(g: Group) -> None:
        if name == "S_MOVK_I32":
            g.put_scalar(target, value.view(U32))
        elif name == "S_CMOVK_I32":
            g.put_scalar(target, np.where(g.scc, value, old(g)).view(U32))
        elif name == "S_MULK_I32":
            g.put_scalar(target, (old(g) * value).view(U32))
        else:
            total, flag = _signed(old(g), value, 1)
            g.put_scalar(target, total)
            g.scc[...] = flag

    return run


def _set_bit(inst: Instruction, name: str) -> Run:
    x, target, on = _read(inst, 0, "u"), inst.sdst, name == "S_BITSET1_B32"
    old = scalar(target, None)

    def run(g: Group) -> None:
        bit = U32(1) << _shift(x(g))
        g.put_scalar(target, old(g) | bit if on else old(g) & ~bit)

    return run


SPECIAL: dict[str, Callable[[Any, str], Run]] = {
    "S_CSELECT_B32": _select,
    "S_CSELECT_B64": _select,
    "S_CMOV_B32": _conditional_move,
    "S_CMOV_B64": _conditional_move,
    "S_MOVK_I32": _immediate,
    "S_CMOVK_I32": _immediate,
    "S_ADDK_I32": _immediate,
    "S_MULK_I32": _immediate,
    "S_BITSET0_B32": _set_bit,
    "S_BITSET1_B32": _set_bit,
}


def bind_load(inst: Instruction) -> Run:
    """SMEM: loads of whole dwords at a scalar address."""
    name = inst.name
    match = re.fullmatch(r"S_LOAD_B(\d+)", name)
    if match is None:
        if name in ("S_GL1_INV", "S_DCACHE_INV"):
            return lambda g: None
        raise Unsupported(name)
    size, target = int(match[1]) // 8, inst.sdata
    base = scalar64(inst.sbase, None, "I")
    offset = I64((inst.offset ^ 0x100000) - 0x100000)
    register = scalar(inst.soffset, None) if inst.soffset != NULL else None

    def run(g: Group) -> None:
        address = np.broadcast_to(base(g) + offset, (g.n,))
        if register is not None:
            address = address + register(g)
        for k, value in enumerate(g.spaces.memory.load(address & ~I64(3), size, None)):
            g.put_scalar(target + k, value)

    return run
