"""Global memory: one span of bytes in which allocations live, and gathers and scatters that stay inside them."""

from __future__ import annotations

import bisect
import ctypes

import numpy as np
import numpy.typing as npt

from .errors import OutOfBounds

Array = npt.NDArray[np.generic]
POISON = 0xFF
"""What fresh memory, LDS, scratch and registers hold: NaN as f16, bf16, f32 and f64, so that a result that depends on it shows."""


class Memory:
    """A span of memory at ``base``; ``starts`` and ``ends`` (offsets, ascending) are the allocations in it.

    Accesses are made of units of 1 to 8 bytes, whichever the alignment of the addresses allows.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.base: int = data.ctypes.data
        if self.base % 4:
            raise ValueError("memory must begin at a multiple of 4")
        self.data = data
        self.units = units_of(data)
        self.starts: list[int] = []
        self.ends: list[int] = []
        self._spans: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    @classmethod
    def at(cls, base: int, size: int) -> Memory:
        """Memory that somebody else has mapped."""
        return cls(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)))

    @classmethod
    def of_size(cls, size: int) -> Memory:
        """Memory of its own, for tests."""
        return cls(np.full(size, POISON, np.uint8))

    def allow(self, offset: int, size: int) -> None:
        """Make a span accessible."""
        index = bisect.bisect_left(self.starts, offset)
        self.starts.insert(index, offset)
        self.ends.insert(index, offset + size)
        self._spans = None

    def forbid(self, offset: int) -> None:
        """Take back the span that begins here."""
        index = self.starts.index(offset)
        del self.starts[index], self.ends[index]
        self._spans = None

    def set_spans(self, starts: list[int], ends: list[int]) -> None:
        """Make these spans accessible, and nothing else."""
        self.starts, self.ends, self._spans = starts, ends, None

    def place(self, values: Array, align: int = 256) -> int:
        """Copy an array behind the last allocation and return its address (for tests)."""
        offset = (max(self.ends, default=0) + 2 * align - 1) // align * align
        flat = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.data[offset : offset + len(flat)] = flat
        self.allow(offset, len(flat))
        return self.base + offset

    def read(self, address: int, shape: tuple[int, ...] | int, dtype: npt.DTypeLike) -> Array:
        """A copy of what is at an address (for tests)."""
        count = int(np.prod(shape))
        offset = address - self.base
        return self.data[offset : offset + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape).copy()

    def check(self, offsets: npt.NDArray[np.int64], size: int, what: str) -> None:
        """Raise unless ``size`` bytes at each of these offsets lie within one allocation."""
        if not offsets.size:
            return
        low, high = int(offsets.min()), int(offsets.max()) + size
        index = bisect.bisect_right(self.starts, low) - 1
        if index >= 0 and high <= self.ends[index]:
            return
        if self._spans is None:
            self._spans = np.array(self.starts, np.int64), np.array(self.ends, np.int64)
        starts, ends = self._spans
        found = np.searchsorted(starts, offsets, side="right") - 1
        bad = (found < 0) | (offsets + size > ends[np.maximum(found, 0)]) if len(starts) else np.ones(offsets.shape, bool)
        if bad.any():
            first = int(offsets[bad][0])
            raise OutOfBounds(f"{what} of {size} bytes at {self.describe(first)} ({int(bad.sum())} of {bad.size} lanes)")

    def describe(self, offset: int) -> str:
        """An address in terms of the allocation before it."""
        index = bisect.bisect_right(self.starts, offset) - 1
        if index < 0:
            return f"address {self.base + offset:#x}, before all allocations"
        start, end = self.starts[index], self.ends[index]
        return f"byte {offset - start} of an allocation of {end - start} bytes"

    def load(self, address: npt.NDArray[np.int64], size: int, mask: npt.NDArray[np.bool_] | None) -> list[npt.NDArray[np.uint32]]:
        """Gather ``size`` bytes per lane as dwords (one narrow value below 4 bytes); lanes that are off give anything."""
        offsets = address - self.base
        if mask is None:
            self.check(offsets, size, "load")
        else:
            on = offsets[mask]
            if not on.size:
                return [np.zeros(offsets.shape, np.uint32)] * max(1, size // 4)
            self.check(on, size, "load")
            offsets = np.where(mask, offsets, on[0])
        return gather(self.units, offsets, size)

    def store(
        self, address: npt.NDArray[np.int64], values: list[npt.NDArray[np.uint32]], size: int, mask: npt.NDArray[np.bool_] | None
    ) -> None:
        """Scatter ``size`` bytes per lane; of lanes with the same address the last one wins."""
        offsets = address - self.base
        if mask is not None:
            offsets, values = offsets[mask], [value[mask] for value in values]
            if not offsets.size:
                return
        self.check(offsets, size, "store")
        scatter(self.units, offsets, values, size)


def units_of(data: npt.NDArray[np.uint8]) -> dict[int, Array]:
    """Bytes seen as units of 1, 2, 4 and 8 bytes."""
    return {size: data[: len(data) // size * size].view(f"u{size}") for size in (1, 2, 4, 8)}


def unit_of(offsets: npt.NDArray[np.int64], size: int) -> int:
    """The widest unit that all of these accesses are aligned to."""
    low = int(np.bitwise_or.reduce(offsets, axis=None)) | size
    return 8 if not low & 7 else low & -low


def gather(units: dict[int, Array], offsets: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.uint32]]:
    """Dwords at byte offsets of an array that is seen as units."""
    unit = unit_of(offsets, size)
    index = offsets >> (unit.bit_length() - 1)
    parts = [units[unit].take(index + k if k else index) for k in range(size // unit)]
    if unit == 8:
        pairs = [part.view(np.uint32).reshape(*part.shape, 2) for part in parts]
        return [pair[..., k] for pair in pairs for k in range(2)]
    if unit == 4:
        return parts
    result = []
    step = 4 // unit
    for first in range(0, len(parts), step):
        value = parts[first].astype(np.uint32)
        for k, part in enumerate(parts[first + 1 : first + step], start=1):
            value |= part.astype(np.uint32) << np.uint32(8 * unit * k)
        result.append(value)
    return result


def scatter(units: dict[int, Array], offsets: npt.NDArray[np.int64], values: list[npt.NDArray[np.uint32]], size: int) -> None:
    """The inverse of :func:`gather`."""
    unit = min(unit_of(offsets, size), 4)
    index = offsets >> (unit.bit_length() - 1)
    step = 4 // unit
    for k in range(size // unit):
        value = values[k // step]
        if unit < 4:
            value = (value >> np.uint32(8 * unit * (k % step))).astype(units[unit].dtype)
        units[unit][index + k if k else index] = value
