"""Global, flat and scratch memory instructions."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arithmetic import I64, U32
from .decode import VGPR, Instruction
from .errors import OutOfBounds, Unsupported
from .lds import Lds, Offsets, Values, apply_atomic, narrow_writer
from .memory import POISON, Memory, gather, scatter, units_of
from .operands import APERTURE, PRIVATE_BASE, SHARED_BASE, scalar, scalar64
from .state import LANE, LANES, NULL, Group, Mask

Run = Callable[[Group], None]

_ACCESS = re.compile(r"(?:GLOBAL|FLAT|SCRATCH)_(LOAD|STORE)_(D16_)?(HI_)?([BUI])(\d+)")


class Scratch:
    """Private memory: ``size`` bytes for each lane of each wave."""

    def __init__(self, waves: int, size: int) -> None:
        self.size = size
        self.stride = (size + 3) // 4 * 4
        self.units = units_of(np.full(waves * LANES * self.stride, POISON, np.uint8))

    def load(self, g: Group, offsets: Offsets, size: int) -> Values:
        """Gather."""
        return gather(self.units, np.where(g.lanes(), self._flat(g, offsets, size), 0), size)

    def store(self, g: Group, offsets: Offsets, values: Values, size: int) -> None:
        """Scatter."""
        on = g.lanes()
        flat = self._flat(g, offsets, size)[on]
        if flat.size:
            scatter(self.units, flat, [value[on] for value in values], size)

    def _flat(self, g: Group, offsets: Offsets, size: int) -> Offsets:
        bad = ((offsets < 0) | (offsets + size > self.size)) & g.lanes()
        if bad.any():
            raise OutOfBounds(f"scratch access of {size} bytes at {int(offsets[bad][0])} of {self.size}")
        lane: Offsets = g.chosen[:, None] * LANES + LANE.astype(I64)
        return lane * self.stride + offsets


class Spaces:
    """All memories that an instruction can reach."""

    def __init__(self, memory: Memory, lds: Lds, scratch: Scratch) -> None:
        self.memory, self.lds, self.scratch = memory, lds, scratch

    def load_global(self, g: Group, address: Offsets, size: int) -> Values:
        """Gather from global memory."""
        return self.memory.load(address, size, g.mask())

    def store_global(self, g: Group, address: Offsets, values: Values, size: int) -> None:
        """Scatter to global memory."""
        self.memory.store(address, values, size, g.mask())

    def load_flat(self, g: Group, address: Offsets, size: int) -> Values:
        """Gather from whichever memory each address is in."""
        result: Values | None = None
        for part, access in self._parts(g, address):
            before = g.narrow(part)
            found = access.load(g, np.where(part, address & 0xFFFFFFFF, 0), size) if access else self.load_global(g, address, size)
            g.widen(before)
            result = found if result is None else [np.where(part, new, old) for new, old in zip(found, result, strict=True)]
        return result if result is not None else [np.zeros((g.n, LANES), np.uint32)] * max(1, size // 4)

    def store_flat(self, g: Group, address: Offsets, values: Values, size: int) -> None:
        """Scatter to whichever memory each address is in."""
        for part, access in self._parts(g, address):
            before = g.narrow(part)
            if access:
                access.store(g, np.where(part, address & 0xFFFFFFFF, 0), values, size)
            else:
                self.store_global(g, address, values, size)
            g.widen(before)

    def _parts(self, g: Group, address: Offsets) -> list[tuple[Mask, Lds | Scratch | None]]:
        """Lanes by memory; ``None`` is global memory."""
        on, upper = g.lanes(), address & ~I64(0xFFFFFFFF)
        in_lds, in_scratch = on & (upper == APERTURE[SHARED_BASE]), on & (upper == APERTURE[PRIVATE_BASE])
        parts: list[tuple[Mask, Lds | Scratch | None]] = [
            (on & ~in_lds & ~in_scratch, None),
            (in_lds, self.lds),
            (in_scratch, self.scratch),
        ]
        return [(part, access) for part, access in parts if part.any()]


ACCESS: dict[str, tuple[Callable[[Group, Offsets, int], Values], Callable[[Group, Offsets, Values, int], None]]] = {
    "GLOBAL": (lambda g, *a: g.spaces.load_global(g, *a), lambda g, *a: g.spaces.store_global(g, *a)),
    "FLAT": (lambda g, *a: g.spaces.load_flat(g, *a), lambda g, *a: g.spaces.store_flat(g, *a)),
    "SCRATCH": (lambda g, *a: g.spaces.scratch.load(g, *a), lambda g, *a: g.spaces.scratch.store(g, *a)),
}


def bind(inst: Instruction) -> Run:
    """The function that executes a GLOBAL, FLAT or SCRATCH instruction."""
    name, kind = inst.name, inst.format
    address = _scratch_address(inst) if kind == "SCRATCH" else _global_address(inst)
    match = _ACCESS.fullmatch(name)
    if match is None:
        return _atomic(inst, address, name)
    load, store = ACCESS[kind]
    operation, half, high, sign, bits = match.groups()
    size = int(bits) // 8
    if operation == "LOAD":
        put = narrow_writer(inst.vdst - VGPR, size, sign == "I", half is not None, high is not None)
        return lambda g: put(g, load(g, address(g), size))
    data, shift = inst.data - VGPR, U32(16 if high else 0)

    def run(g: Group) -> None:
        values = [g.u[data + k] for k in range(size // 4)] if size >= 4 else [g.u[data] >> shift]
        store(g, address(g), values, size)

    return run


def _offset(inst: Instruction) -> np.int64:
    return I64((inst.offset ^ 0x1000) - 0x1000)


def _global_address(inst: Instruction) -> Callable[[Group], Offsets]:
    vaddr, offset = inst.addr - VGPR, _offset(inst)
    if inst.saddr in (NULL, 127):

        def from_pair(g: Group) -> Offsets:
            address = g.u[vaddr + 1].astype(I64)
            address <<= I64(32)
            address |= g.u[vaddr]
            address += offset
            return address

        return from_pair
    base = scalar64(inst.saddr, None, "I")
    return lambda g: (base(g) + offset)[:, None] + g.u[vaddr]


def _scratch_address(inst: Instruction) -> Callable[[Group], Offsets]:
    offset, vaddr = _offset(inst), inst.addr - VGPR
    register = None if inst.saddr in (NULL, 127) else scalar(inst.saddr, None)

    def address(g: Group) -> Offsets:
        where: npt.NDArray[np.int64] = np.full((g.n, LANES), offset)
        if inst.sve:
            where += g.u[vaddr]
        if register is not None:
            where += register(g).astype(I64)[:, None]
        return where

    return address


def _atomic(inst: Instruction, address: Callable[[Group], Offsets], name: str) -> Run:
    match = re.fullmatch(r"(?:GLOBAL|FLAT)_ATOMIC_(\w+32)", name)
    if match is None:
        raise Unsupported(name)
    operation, returns, data, target = match[1], bool(inst.glc), inst.data - VGPR, inst.vdst - VGPR

    def run(g: Group) -> None:
        memory, on = g.spaces.memory, g.lanes()
        where = (address(g) - memory.base)[on]
        memory.check(where, 4, "atomic")
        found = apply_atomic(memory.units[4], where >> 2, g.u[data][on], operation)
        if returns:
            value = np.zeros((g.n, LANES), np.uint32)
            value[on] = found
            g.put(g.u[target], value)

    return run
