"""Memory of a block (LDS), and the DS instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .arithmetic import I32, I64, U32, sign_extend
from .decode import VGPR, Instruction
from .errors import OutOfBounds, Unsupported
from .memory import POISON, gather, scatter, units_of
from .races import Offsets, Watch
from .state import LANES, Group, Mask

Run = Callable[[Group], None]
Values = list[npt.NDArray[np.uint32]]


class Lds:
    """The LDS of some blocks, one after the other."""

    def __init__(self, blocks: int, size: int, waves_per_block: int, check_races: bool = True) -> None:
        self.size = size
        self.stride = (size + 15) // 16 * 16
        self.units = units_of(np.full(blocks * self.stride + 16, POISON, np.uint8))
        self.watch = Watch(blocks, self.stride, waves_per_block) if check_races and waves_per_block > 1 else None

    def barrier(self) -> None:
        """All waves of all blocks have met."""
        if self.watch is not None:
            self.watch.barrier()

    def load(self, g: Group, offsets: Offsets, size: int) -> Values:
        """Gather; lanes that are off give anything."""
        mask = g.mask()
        self.check(offsets, size, mask)
        flat = offsets + (g.block * self.stride)[:, None]
        if self.watch is not None:
            self.watch.note_read(g, flat, size, mask)
        return gather(self.units, flat if mask is None else np.where(mask, flat, 0), size)

    def store(self, g: Group, offsets: Offsets, values: Values, size: int) -> None:
        """Scatter; of lanes with the same address the last one wins."""
        mask = g.mask()
        self.check(offsets, size, mask)
        flat = offsets + (g.block * self.stride)[:, None]
        if self.watch is not None:
            self.watch.note_write(g, flat, size, mask)
        if mask is not None:
            flat, values = flat[mask], [value[mask] for value in values]
            if not flat.size:
                return
        scatter(self.units, flat, values, size)

    def check(self, offsets: Offsets, size: int, mask: Mask | None) -> None:
        """Raise unless the accesses of all lanes that are on lie within the block's LDS."""
        if offsets.min() >= 0 and offsets.max() + size <= self.size:
            return
        bad = (offsets < 0) | (offsets + size > self.size)
        if mask is not None:
            bad &= mask
        if bad.any():
            raise OutOfBounds(f"LDS access of {size} bytes at {int(offsets[bad][0])} of {self.size} ({int(bad.sum())} lanes)")


_ACCESS = re.compile(r"DS_(LOAD|STORE)_(2ADDR_)?(STRIDE64_)?(?:([UI])(8|16)|B(\d+))(_D16)?(_HI)?")


def bind(inst: Instruction) -> Run:
    """The function that executes a DS instruction."""
    name = inst.name
    if name == "DS_NOP":
        return lambda g: None
    if inst.gds:
        raise Unsupported(f"{name} in GDS")
    if name in ("DS_BPERMUTE_B32", "DS_PERMUTE_B32"):
        return _permute(inst, name)
    if name == "DS_SWIZZLE_B32":
        return _swizzle(inst)
    match = _ACCESS.fullmatch(name)
    if match is not None:
        two = match[2] is not None
        return (_two if two else _load if match[1] == "LOAD" else _store)(inst, match)
    return _atomic(inst, name)


def _address(g: Group, inst_addr: int, offset: int) -> Offsets:
    return g.u[inst_addr].astype(I64) + offset & 0xFFFFFFFF  # compilers rely on it for addresses below zero


def _load(inst: Instruction, match: re.Match[str]) -> Run:
    addr, target, offset = inst.addr - VGPR, inst.vdst - VGPR, inst.offset0 | inst.offset1 << 8
    size = int(match[5] or match[6]) // 8
    put = narrow_writer(target, size, match[4] == "I", bool(match[7]), bool(match[8]))

    def run(g: Group) -> None:
        put(g, g.spaces.lds.load(g, _address(g, addr, offset), size))

    return run


def _store(inst: Instruction, match: re.Match[str]) -> Run:
    addr, data, offset = inst.addr - VGPR, inst.data0 - VGPR, inst.offset0 | inst.offset1 << 8
    size, shift = int(match[5] or match[6]) // 8, U32(16 if match[8] else 0)

    def run(g: Group) -> None:
        values = [g.u[data + k] for k in range(size // 4)] if size >= 4 else [g.u[data] >> shift]
        g.spaces.lds.store(g, _address(g, addr, offset), values, size)

    return run


def _two(inst: Instruction, match: re.Match[str]) -> Run:
    """Two accesses whose offsets count in elements, or in 64 elements."""
    addr, target, size = inst.addr - VGPR, inst.vdst - VGPR, int(match[6]) // 8
    scale = size * (64 if match[3] else 1)
    words = size // 4
    offsets = [inst.offset0 * scale, inst.offset1 * scale]
    data = [inst.data0 - VGPR, inst.data1 - VGPR]

    def load(g: Group) -> None:
        values = [value for offset in offsets for value in g.spaces.lds.load(g, _address(g, addr, offset), size)]
        for k, value in enumerate(values):
            g.put(g.u[target + k], value)

    def store(g: Group) -> None:
        for offset, first in zip(offsets, data, strict=True):
            g.spaces.lds.store(g, _address(g, addr, offset), [g.u[first + k] for k in range(words)], size)

    return load if match[1] == "LOAD" else store


def narrow_writer(target: int, size: int, signed: bool, into_half: bool, high: bool) -> Callable[[Group, Values], None]:
    """What writes loaded values: dwords, a narrow value extended to a dword, or (D16) a narrow value into half a register."""
    if size >= 4:

        def wide(g: Group, values: Values) -> None:
            for k, value in enumerate(values):
                g.put(g.u[target + k], value)

        return wide

    def extended(value: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        return sign_extend(value, 8 * size).astype(U32) if signed else value

    if into_half:
        return lambda g, values: g.put(g.h[target, :, :, int(high)], extended(values[0]).astype(np.uint16))
    return lambda g, values: g.put(g.u[target], extended(values[0]))


def _permute(inst: Instruction, name: str) -> Run:
    addr, data, target, offset = (
        inst.addr - VGPR,
        inst.data0 - VGPR,
        inst.vdst - VGPR,
        inst.offset0 | inst.offset1 << 8,
    )
    backward = name == "DS_BPERMUTE_B32"

    def run(g: Group) -> None:
        lane = (_address(g, addr, offset) >> 2) & (LANES - 1)
        mask = g.mask()
        value = g.u[data] if mask is None else np.where(mask, g.u[data], U32(0))
        if backward:
            return g.put(g.u[target], np.take_along_axis(value, lane, 1))
        pushed = np.zeros((g.n, LANES), np.uint32)
        rows, columns = np.nonzero(g.lanes())
        pushed[rows, lane[rows, columns]] = value[rows, columns]
        return g.put(g.u[target], pushed)

    return run


def _swizzle(inst: Instruction) -> Run:
    """Bit 15 of the offset: quads permuted; else lane = ((lane & and) | or) ^ xor within the 32 lanes."""
    data, target, control = inst.addr - VGPR, inst.vdst - VGPR, inst.offset0 | inst.offset1 << 8
    lane = np.arange(LANES)
    if control & 0x8000:
        if control & 0x4000:
            raise Unsupported(f"DS_SWIZZLE {control:#x}")
        source = (lane & ~3) | (control >> (2 * (lane & 3)) & 3)
    else:
        source = ((lane & control & 31) | (control >> 5 & 31)) ^ (control >> 10 & 31)

    def run(g: Group) -> None:
        mask = g.mask()
        value = g.u[data][:, source]
        g.put(g.u[target], value if mask is None else np.where(mask[:, source], value, U32(0)))

    return run


ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "ADD_U32": lambda old, new: old + new,
    "SUB_U32": lambda old, new: old - new,
    "AND_B32": lambda old, new: old & new,
    "OR_B32": lambda old, new: old | new,
    "XOR_B32": lambda old, new: old ^ new,
    "MAX_U32": np.maximum,
    "MIN_U32": np.minimum,
    "MAX_I32": lambda old, new: np.maximum(old.view(I32), new.view(I32)).view(U32),
    "MIN_I32": lambda old, new: np.minimum(old.view(I32), new.view(I32)).view(U32),
    "ADD_F32": lambda old, new: (old.view(np.float32) + new.view(np.float32)).view(U32),
    "MAX_F32": lambda old, new: np.fmax(old.view(np.float32), new.view(np.float32)).view(U32),
    "MIN_F32": lambda old, new: np.fmin(old.view(np.float32), new.view(np.float32)).view(U32),
    "STOREXCHG_B32": lambda old, new: new,
    "SWAP_B32": lambda old, new: new,
}


def apply_atomic(cells: npt.NDArray[np.uint32], index: Offsets, new: npt.NDArray[np.uint32], name: str) -> npt.NDArray[np.uint32]:
    """Lane after lane: returns what each found."""
    if name not in ATOMIC:
        raise Unsupported(f"atomic {name}")
    function = ATOMIC[name]
    found = np.empty(len(index), np.uint32)
    for k, at in enumerate(index.tolist()):
        found[k] = cells[at]
        cells[at] = function(cells[at], new[k])
    return found


def _atomic(inst: Instruction, name: str) -> Run:
    """Atomics of 32 bits. They do not race with each other, and are not watched."""
    match = re.fullmatch(r"DS_(\w+?)_(RTN_)?([UIBF]32)", name)
    if match is None or f"{match[1]}_{match[3]}" not in ATOMIC:
        raise Unsupported(name)
    operation, returns = f"{match[1]}_{match[3]}", match[2] is not None
    addr, data, target, offset = (
        inst.addr - VGPR,
        inst.data0 - VGPR,
        inst.vdst - VGPR,
        inst.offset0 | inst.offset1 << 8,
    )

    def run(g: Group) -> None:
        lds, where, on = g.spaces.lds, _address(g, addr, offset), g.lanes()
        lds.check(where, 4, on)
        flat = (where + (g.block * lds.stride)[:, None])[on]
        found = apply_atomic(lds.units[4], flat >> 2, g.u[data][on], operation)
        if returns:
            value = np.zeros((g.n, LANES), np.uint32)
            value[on] = found
            g.put(g.u[target], value)

    return run
