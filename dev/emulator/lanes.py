"""Vector instructions that move values between lanes or registers: DPP, lane reads and writes, row permutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .decode import VGPR, Instruction
from .errors import Unsupported
from .operands import scalar, vector
from .state import LANES, M0, Group, Mask

if TYPE_CHECKING:
    from .valu import Operands, Run

_LANE = np.arange(LANES)
ROW = 16


def dpp_map(control: int) -> tuple[npt.NDArray[np.int64], Mask]:
    """Where each lane reads from under a DPP control, and whether that lane exists."""
    row, at = _LANE & ~(ROW - 1), _LANE & (ROW - 1)
    valid = np.ones(LANES, np.bool_)
    kind, amount = control >> 4, control & 15
    if control <= 0xFF:
        source = (_LANE & ~3) | (control >> (2 * (_LANE & 3)) & 3)
    elif kind in (0x10, 0x11):
        moved = at + amount if kind == 0x10 else at - amount
        valid = (moved >= 0) & (moved < ROW)
        source = row | (moved & (ROW - 1))
    elif kind == 0x12:
        source = row | (at - amount & (ROW - 1))
    elif control == 0x140:
        source = row | (ROW - 1 - at)
    elif control == 0x141:
        source = (_LANE & ~7) | (7 - (_LANE & 7))
    elif kind == 0x15:
        source = row | amount
    elif kind == 0x16:
        source = row | (at ^ amount)
    else:
        raise Unsupported(f"DPP control {control:#x}")
    return source, valid


def dpp(inst: Instruction, register: int, run: Run) -> Run:
    """Execute an instruction whose first operand is a vector register of other lanes."""
    if register < 0:
        raise Unsupported(f"{inst.name} with DPP")
    source, valid = dpp_map(inst.dpp)
    writes = ((inst.row_mask >> (_LANE >> 4) & 1) & (inst.bank_mask >> (_LANE >> 2 & 3) & 1)).astype(np.bool_)
    fill, fetch_inactive = bool(inst.bc), bool(inst.fi)

    def go(g: Group) -> None:
        mask = g.mask()
        usable = valid if mask is None or fetch_inactive else valid & mask[:, source]
        value = g.u[register][:, source]
        allowed: Mask | None
        if fill:
            g.first = np.where(usable, value, np.uint32(0))
            allowed = None if writes.all() else np.broadcast_to(writes, (g.n, LANES))
        else:
            g.first = value
            allowed = np.broadcast_to(usable & writes, (g.n, LANES))
        before = g.narrow(None if allowed is None or allowed.all() else allowed)
        run(g)
        g.widen(before)

    return go


def _first_active(g: Group) -> npt.NDArray[np.int64]:
    mask = g.mask()
    return np.zeros(g.n, np.int64) if mask is None else mask.argmax(1)


def read_first(ops: Operands) -> Run:
    """V_READFIRSTLANE: the first lane that is on, or lane 0."""
    read, target = vector(ops.sources[0], ops.literal, "u"), ops.inst.vdst
    target = target - VGPR if target >= VGPR else target

    def run(g: Group) -> None:
        value = np.broadcast_to(read(g), (g.n, LANES))
        g.put_scalar(target, value[np.arange(g.n), _first_active(g)])

    return run


def read_lane(ops: Operands) -> Run:
    """V_READLANE, whatever EXEC says."""
    read, lane, target = vector(ops.sources[0], None, "u"), scalar(ops.sources[1], ops.literal), ops.inst.vdst
    target = target - VGPR if target >= VGPR else target

    def run(g: Group) -> None:
        index = np.broadcast_to(lane(g) & np.uint32(31), (g.n,)).astype(np.int64)
        g.put_scalar(target, np.broadcast_to(read(g), (g.n, LANES))[np.arange(g.n), index])

    return run


def write_lane(ops: Operands) -> Run:
    """V_WRITELANE, whatever EXEC says."""
    value, lane = scalar(ops.sources[0], ops.literal), scalar(ops.sources[1], ops.literal)

    def run(g: Group) -> None:
        index = np.broadcast_to(lane(g) & np.uint32(31), (g.n,)).astype(np.int64)
        g.u[ops.vdst][np.arange(g.n), index] = value(g)

    return run


def permute_rows(ops: Operands) -> Run:
    """V_PERMLANE16 and V_PERMLANEX16: each lane names, in 4 bits of two scalars, a lane of its row or of the other row."""
    read = vector(ops.sources[0], None, "u")
    low, high = scalar(ops.sources[1], ops.literal), scalar(ops.sources[2], ops.literal)
    crossing = ROW if "PERMLANEX" in ops.name else 0
    fetch_inactive, fill = bool((ops.opsel or 0) & 1), bool((ops.opsel or 0) & 2)
    shift = (4 * (_LANE & 7)).astype(np.uint32)
    upper = (_LANE & 8) != 0

    def run(g: Group) -> None:
        choice = np.where(upper, high(g)[:, None], low(g)[:, None]) >> shift & np.uint32(15)
        source = np.broadcast_to((_LANE & ROW ^ crossing) | choice.astype(np.int64), (g.n, LANES))
        value = np.take_along_axis(np.broadcast_to(read(g), (g.n, LANES)), source, 1)
        mask = g.mask()
        if mask is None or fetch_inactive:
            return g.put(g.u[ops.vdst], value)
        usable = np.take_along_axis(mask, source, 1)
        if fill:
            return g.put(g.u[ops.vdst], np.where(usable, value, np.uint32(0)))
        before = g.narrow(usable)
        g.put(g.u[ops.vdst], value)
        g.widen(before)
        return None

    return run


def swap(ops: Operands) -> Run:
    """V_SWAP_B32."""
    other = ops.sources[0] - VGPR

    def run(g: Group) -> None:
        value = g.u[other].copy()
        g.put(g.u[other], g.u[ops.vdst])
        g.put(g.u[ops.vdst], value)

    return run


def move_relative(ops: Operands) -> Run:
    """V_MOVRELS and V_MOVRELD: a register's number is raised by M0."""
    from_relative = ops.name == "V_MOVRELS_B32"
    source = ops.sources[0]
    read = vector(source, ops.literal, "u")

    def run(g: Group) -> None:
        steps = np.unique(g.s[M0])
        if len(steps) != 1:
            raise Unsupported("M0 differs between waves that move registers together")
        step = int(steps[0])
        if from_relative:
            g.put(g.u[ops.vdst], g.u[source - VGPR + step])
        else:
            g.put(g.u[ops.vdst + step], read(g))

    return run
