"""Registers of waves, and groups of waves that stand at the same instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .memory import POISON

if TYPE_CHECKING:
    from .vmem import Spaces

LANES = 32
VCC, NULL, M0, EXEC = 106, 124, 125, 126
SCALARS = 128
FULL = np.uint32(0xFFFFFFFF)
LANE = np.arange(LANES, dtype=np.uint32)

Mask = npt.NDArray[np.bool_]
U32 = npt.NDArray[np.uint32]
Any32 = npt.NDArray[Any]


def unpack(bits: U32) -> Mask:
    """``(n,)`` masks of 32 lanes as ``(n, 32)``."""
    return np.unpackbits(np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little").view(np.bool_)


def pack(lanes: Mask) -> U32:
    """The inverse of :func:`unpack`."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint32)[:, 0]


class Waves:
    """The registers of all waves of some blocks.

    Wave ``w`` of block ``b`` has index ``w * blocks + b``, so that waves of the same place in their blocks, which take the same
    branches, lie side by side.
    """

    def __init__(self, blocks: int, waves_per_block: int, vgprs: int, spaces: Spaces) -> None:
        self.spaces = spaces
        count = blocks * waves_per_block
        self.count = count
        self.vector = np.full((vgprs, count, LANES), 0x01010101 * POISON, np.uint32)
        self.scalar = np.zeros((SCALARS, count), np.uint32)
        self.scc = np.zeros(count, np.bool_)
        self.block = np.arange(count) % blocks
        self.wave = np.arange(count) // blocks


class Group:
    """Some waves as the instructions see them: views of their registers, or copies when the waves do not lie side by side.

    Attributes:
        u, f, i: vector registers ``(register, n, lane)`` as uint32, float32, int32.
        h, hf: the same in 16-bit halves ``(register, n, lane, half)``, as uint16 and float16.
        s, sf, si: scalar registers ``(register, n)``.
        scc: the scalar condition code ``(n,)``.
        first: for DPP, what replaces the first operand's vector register.
    """

    def __init__(self, waves: Waves, chosen: npt.NDArray[np.int64]) -> None:
        self.chosen = chosen
        self.n = len(chosen)
        first = int(chosen[0])
        self._waves, self.spaces = waves, waves.spaces
        self._copied = int(chosen[-1]) - first + 1 != self.n
        where: Any = chosen if self._copied else slice(first, first + self.n)
        self.u = waves.vector[:, where]
        self.s = waves.scalar[:, where]
        self.scc = waves.scc[where]
        self.f, self.i = self.u.view(np.float32), self.u.view(np.int32)
        self.sf, self.si = self.s.view(np.float32), self.s.view(np.int32)
        shape = (*self.u.shape, 2)
        self.h = self.u.view(np.uint16).reshape(shape)
        self.hf = self.u.view(np.float16).reshape(shape)
        self.block, self.wave = waves.block[chosen], waves.wave[chosen]
        self.first: U32 | None = None
        self._mask: Mask | None = None
        self._stale = True

    def refresh(self) -> None:
        """Forget what was derived from registers that other groups may have written since."""
        self._stale = True

    def finish(self) -> None:
        """Write copies back."""
        if self._copied:
            self._waves.vector[:, self.chosen] = self.u
            self._waves.scalar[:, self.chosen] = self.s
            self._waves.scc[self.chosen] = self.scc

    def exec_changed(self) -> None:
        """To be called after each write to EXEC."""
        self._stale = True

    def mask(self) -> Mask | None:
        """The lanes that are on, ``(n, 32)``; ``None`` when all of them are."""
        if self._stale:
            bits = self.s[EXEC]
            self._mask = None if (bits == FULL).all() else unpack(bits)
            self._stale = False
        return self._mask

    def lanes(self) -> Mask:
        """The same as an array in any case."""
        mask = self.mask()
        return np.ones((self.n, LANES), np.bool_) if mask is None else mask

    def narrow(self, allowed: Mask | None) -> Mask | None:
        """For one instruction, take lanes off; returns what :meth:`widen` wants back."""
        before = self.mask()
        if allowed is not None:
            self._mask = allowed if before is None else before & allowed
        return before

    def widen(self, before: Mask | None) -> None:
        """Undo :meth:`narrow`."""
        self._mask = before

    def put(self, row: Any32, value: Any32) -> None:
        """Write a vector register (or half of it) in the lanes that are on."""
        mask = self.mask()
        if mask is None:
            row[...] = value
        else:
            np.copyto(row, value, where=mask)

    def put64(self, register: int, value: npt.NDArray[Any]) -> None:
        """Write a pair of vector registers."""
        bits = value.view(np.uint64)
        self.put(self.u[register], bits.astype(np.uint32))
        self.put(self.u[register + 1], (bits >> np.uint64(32)).astype(np.uint32))

    def put_scalar(self, register: int, value: Any32) -> None:
        """Write a scalar register."""
        if register == NULL:
            return
        self.s[register] = value
        if register == EXEC:
            self._stale = True

    def put_scalar64(self, register: int, value: npt.NDArray[Any]) -> None:
        """Write a pair of scalar registers; the upper half of EXEC does not exist."""
        bits = value.view(np.uint64)
        self.put_scalar(register, bits.astype(np.uint32))
        if register not in (NULL, EXEC):
            self.put_scalar(register + 1, (bits >> np.uint64(32)).astype(np.uint32))

    def set_scc(self, flag: Any32) -> None:
        """Write the scalar condition code."""
        self.scc[...] = flag

    def put_mask(self, register: int, lanes: Mask) -> None:
        """Write a mask of lanes; those that are off become 0."""
        mask = self.mask()
        lanes = np.broadcast_to(lanes, (self.n, LANES))
        self.put_scalar(register, pack(lanes if mask is None else lanes & mask))
