"""Memory of a block (LDS), the DS instructions, and the check for races between its waves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .arithmetic import I32, I64, U32, sign_extend
from .decode import VGPR, Instruction
from .errors import OutOfBounds, Race, Unsupported
from .memory import POISON, gather, scatter
from .state import LANES, Group, Mask

Run = Callable[[Group], None]
Offsets = npt.NDArray[np.int64]
Values = list[npt.NDArray[np.uint32]]

CELL = 2  # bytes whose accesses are watched together; neighbouring bytes are never written by different waves in practice
SEVERAL = 63  # in the place of a wave: several waves have read the cell
WAVE_BITS = 6


class Lds:
    """The LDS of some blocks.

    For each cell the last wave that wrote it and the last that read it are kept together with the number of barriers passed (the
    epoch). Two waves that meet in a cell in one epoch race, unless both read. A wave never races with itself: its accesses are in order.
    """

    def __init__(self, blocks: int, size: int, waves_per_block: int, check_races: bool = True) -> None:
        self.size = size
        self.stride = (size + 15) // 16 * 16
        self.data = np.full(blocks * self.stride + 16, POISON, np.uint8)
        self.units = {1: self.data, 2: self.data.view(np.uint16), 4: self.data.view(np.uint32)}
        self.watched = check_races and 1 < waves_per_block < SEVERAL
        cells = len(self.data) // CELL if self.watched else 0
        self.written, self.read = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.epoch = 1

    def barrier(self) -> None:
        """All waves of all blocks have met."""
        self.epoch += 1

    def load(self, g: Group, offsets: Offsets, size: int) -> Values:
        """Gather; lanes that are off give anything."""
        mask = g.mask()
        self._check(offsets, size, mask)
        flat = offsets + (g.block * self.stride)[:, None]
        if mask is not None:
            flat = np.where(mask, flat, 0)
        if self.watched:
            self._note_read(g, flat, size, mask)
        return gather(self.units, flat, size)

    def store(self, g: Group, offsets: Offsets, values: Values, size: int) -> None:
        """Scatter; of lanes with the same address the last one wins."""
        mask = g.mask()
        self._check(offsets, size, mask)
        flat = offsets + (g.block * self.stride)[:, None]
        if self.watched:
            self._note_write(g, flat, size, mask)
        if mask is not None:
            flat, values = flat[mask], [value[mask] for value in values]
            if not flat.size:
                return
        scatter(self.units, flat, values, size)

    def _check(self, offsets: Offsets, size: int, mask: Mask | None) -> None:
        bad = (offsets < 0) | (offsets + size > self.size)
        if mask is not None:
            bad &= mask
        if bad.any():
            raise OutOfBounds(f"LDS access of {size} bytes at {int(offsets[bad][0])} of {self.size} ({int(bad.sum())} lanes)")

    def _cells(self, g: Group, flat: Offsets, size: int, mask: Mask | None) -> tuple[Offsets, npt.NDArray[np.int32]]:
        """The cells that each lane touches, and what this access is noted as."""
        who = np.broadcast_to((self.epoch << WAVE_BITS | g.wave).astype(np.int32)[:, None], flat.shape)
        on, who = (flat.reshape(-1), who.reshape(-1)) if mask is None else (flat[mask], who[mask])
        count = max(1, size // CELL)
        cells = (on >> (CELL.bit_length() - 1))[:, None] + np.arange(count)
        return cells.reshape(-1), np.repeat(who, count)

    def _note_read(self, g: Group, flat: Offsets, size: int, mask: Mask | None) -> None:
        cells, who = self._cells(g, flat, size, mask)
        self._compare(self.written, cells, who, "read by", "written by")
        before = self.read.take(cells)
        several = who | SEVERAL
        self.read[cells] = np.where(_other_wave(before, who), several, who)
        # waves of one group that read the same cell overwrite each other's note
        lost = self.read.take(cells) != who
        self.read[cells[lost]] = several[lost]

    def _note_write(self, g: Group, flat: Offsets, size: int, mask: Mask | None) -> None:
        cells, who = self._cells(g, flat, size, mask)
        self._compare(self.read, cells, who, "written by", "read by")
        self._compare(self.written, cells, who, "written by", "written by")
        self.written[cells] = who
        self._compare(self.written, cells, who, "written by", "written by")

    def _compare(self, noted: npt.NDArray[np.int32], cells: Offsets, who: npt.NDArray[np.int32], now: str, before: str) -> None:
        then = noted.take(cells)
        bad = _other_wave(then, who)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            offset, mine, other = int(cells[first]) * CELL % self.stride, int(who[first]) & SEVERAL, int(then[first]) & SEVERAL
            others = "several waves" if other == SEVERAL else f"wave {other}"
            raise Race(f"LDS byte {offset} is {now} wave {mine} and was {before} {others} since the last barrier")


def _other_wave(then: npt.NDArray[np.int32], who: npt.NDArray[np.int32]) -> Mask:
    """Whether another wave did something in the same epoch: only the bits of the wave differ."""
    return ((then ^ who) - 1).view(np.uint32) < np.uint32((1 << WAVE_BITS) - 1)


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
        lds._check(where, 4, on)
        flat = (where + (g.block * lds.stride)[:, None])[on]
        found = apply_atomic(lds.units[4], flat >> 2, g.u[data][on], operation)
        if returns:
            value = np.zeros((g.n, LANES), np.uint32)
            value[on] = found
            g.put(g.u[target], value)

    return run
