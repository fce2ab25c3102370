"""The check for races in LDS: waves of a block that touch the same place between two barriers, one of them writing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .errors import Race
from .state import Group, Mask

Offsets = npt.NDArray[np.int64]
Tags = npt.NDArray[np.uint16]

CELL = 2  # bytes that are watched together; neighbouring bytes are never written by different waves in practice
WAVE_BITS = 5  # a block has at most 1024 threads
MOST_WAVES = 1 << WAVE_BITS
LAST_EPOCH = (1 << 16 - WAVE_BITS) - 1
_FOUR = np.uint64(0x0001000100010001)
_SHADOW = {1: np.uint16, 2: np.uint32, 4: np.uint64}


class _Shadow:
    """A tag of 16 bits for each cell, zero at first. Tags that lie side by side are read and written together."""

    def __init__(self, cells: int) -> None:
        self.tags = np.zeros((cells + 3) // 4 * 4, np.uint16)
        self.units = {count: self.tags.view(kind) for count, kind in _SHADOW.items()}

    def take(self, cells: Offsets, count: int) -> Iterator[tuple[int, Tags]]:
        """The tags of ``count`` cells from each of these on, in parts: number of the part's first cell, tags in a new last axis."""
        wide, index = self._wide(cells, count)
        for k in range(count // wide):
            yield k * wide, self.units[wide].take(index + k).view(np.uint16).reshape(*index.shape, wide)

    def put(self, cells: Offsets, count: int, tags: npt.NDArray[np.uint64]) -> None:
        """Set the tags of ``count`` cells from each of these on; ``tags`` can be broadcast to the cells."""
        wide, index = self._wide(cells, count)
        several = (tags * _FOUR).astype(_SHADOW[wide])
        for k in range(count // wide):
            self.units[wide][index + k] = several

    @staticmethod
    def _wide(cells: Offsets, count: int) -> tuple[int, Offsets]:
        low = int(np.bitwise_or.reduce(cells, axis=None)) | count
        wide = 4 if not low & 3 else 2 if not low & 1 else 1
        return wide, cells >> (wide >> 1)


class Watch:
    """Who touched which cell since the last barrier.

    The number of barriers passed is the epoch. For each cell the wave that wrote it last is kept with its epoch, and for each wave and
    cell the epoch in which it was read last. A wave never races with itself: its accesses are in order.
    """

    def __init__(self, blocks: int, stride: int, waves_per_block: int) -> None:
        self.stride, self.waves = stride, waves_per_block
        self._written = _Shadow(blocks * stride // CELL)
        self._read = _Shadow(blocks * waves_per_block * stride // CELL)
        self.epoch, self._last_read, self._last_write = 1, 0, 0

    def barrier(self) -> None:
        """All waves of all blocks have met."""
        self.epoch += 1
        if self.epoch > LAST_EPOCH:
            self._written.tags.fill(0)
            self._read.tags.fill(0)
            self.epoch, self._last_read, self._last_write = 1, 0, 0

    def note_read(self, g: Group, flat: Offsets, size: int, mask: Mask | None) -> None:
        """The lanes that are on read ``size`` bytes at these places in the LDS of all blocks."""
        cells, block, wave = _lanes_on(g, flat, mask)
        count = max(1, size // CELL)
        if self._last_write == self.epoch:
            self._compare_written(cells, count, wave, "read by")
        self._read.put(self._cells_of(cells, block, wave), count, np.uint64(self.epoch))
        self._last_read = self.epoch

    def note_write(self, g: Group, flat: Offsets, size: int, mask: Mask | None) -> None:
        """The same for writes."""
        cells, block, wave = _lanes_on(g, flat, mask)
        count = max(1, size // CELL)
        if self._last_write == self.epoch:
            self._compare_written(cells, count, wave, "written by")
        if self._last_read == self.epoch:
            self._compare_read(cells, count, block, wave)
        self._written.put(cells, count, self._tags(wave).astype(np.uint64))
        self._last_write = self.epoch
        self._compare_written(cells, count, wave, "written by")  # waves of one instruction overwrite each other's tags

    def _tags(self, wave: Offsets) -> Tags:
        return (self.epoch << WAVE_BITS | wave).astype(np.uint16)

    def _cells_of(self, cells: Offsets, block: Offsets, wave: Offsets) -> Offsets:
        """Where the reads of a wave are kept."""
        return cells + (block * (self.waves - 1) + wave) * (self.stride // CELL)

    def _compare_written(self, cells: Offsets, count: int, wave: Offsets, now: str) -> None:
        mine = self._tags(wave)[..., None]
        for first, tags in self._written.take(cells, count):
            bad = (tags ^ mine) - np.uint16(1) < MOST_WAVES - 1  # equal but for the wave
            if bad.any():
                self._report(bad, cells + first, wave, (tags & np.uint16(MOST_WAVES - 1))[bad][0], f"{now} wave {{}} and was written by")

    def _compare_read(self, cells: Offsets, count: int, block: Offsets, wave: Offsets) -> None:
        for step in range(1, self.waves):
            other = wave + step
            other = np.where(other < self.waves, other, other - self.waves)
            for first, tags in self._read.take(self._cells_of(cells, block, other), count):
                bad = tags == self.epoch
                if bad.any():
                    lane = tuple(axis[0] for axis in np.nonzero(bad)[:-1])
                    who = np.broadcast_to(other, cells.shape)[lane]
                    self._report(bad, cells + first, wave, who, "written by wave {} and was read by")

    def _report(self, bad: npt.NDArray[np.bool_], cells: Offsets, wave: Offsets, other: np.integer, what: str) -> None:
        *lane, cell = (axis[0] for axis in np.nonzero(bad))
        offset = (int(cells[tuple(lane)]) + int(cell)) * CELL % self.stride
        mine = int(np.broadcast_to(wave, cells.shape)[tuple(lane)])
        raise Race(f"LDS byte {offset} is {what.format(mine)} wave {int(other)} since the last barrier")


def _lanes_on(g: Group, flat: Offsets, mask: Mask | None) -> tuple[Offsets, Offsets, Offsets]:
    """Cells of the lanes that are on, and block and wave of each (in the shape of the cells, or to be broadcast to it)."""
    cells, block, wave = flat >> (CELL.bit_length() - 1), g.block[:, None], g.wave[:, None]
    if mask is None:
        return cells, block, wave
    return cells[mask], np.broadcast_to(block, mask.shape)[mask], np.broadcast_to(wave, mask.shape)[mask]
