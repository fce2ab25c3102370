"""The kernels that write rows, compiled for gfx1100 and run on the emulator: bits of the C reference, and how many instructions.

The emulated device has few multiprocessors, so only the smallest cases of test-backend-ops take the kernel for few rows, and none
writes K and V.
"""

from __future__ import annotations

import struct

import emulated_tools
import numpy as np
import pytest
from emulator.codeobject import CodeObject
from emulator.machine import Call, Machine, Statistics
from emulator.memory import Memory

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import SCALAR, TRELLIS, Scale, TrellisType, TurboType

pytestmark = pytest.mark.emulated

THREADS, SCALAR_GROUP = 320, 40
N_ROWS = 5


def quantized(t: TurboType, values: np.ndarray) -> np.ndarray:
    return (
        oracle.load().quantize_trellis(t, values)
        if isinstance(t, TrellisType)
        else oracle.load().quantize(t, values, scale=Scale.MATCHED_NORM)
    )


def division(d: int) -> tuple[int, int, int]:
    """Upstream's init_fastdiv_values()."""
    shift = (d - 1).bit_length()
    return (1 << 32) * ((1 << shift) - d) // d + 1, shift, d


class Write:
    """Rows of values that go to a tensor of a turbo type, in the memory of a machine."""

    def __init__(self, memory: Memory, t: TurboType, shape: tuple[int, int], index_type: type, seed: int) -> None:
        n_rows, n_blocks = shape
        rng = np.random.default_rng(seed)
        self.memory, self.t = memory, t
        self.values = rng.standard_normal((n_rows, n_blocks * t.block)).astype(np.float32)
        self.rows = rng.permutation(N_ROWS)[:n_rows].astype(index_type)
        self.before = np.full((N_ROWS, n_blocks * t.block_bytes), 0x5A, np.uint8)
        self.place = memory.place(self.before)
        self.groups = n_rows * n_blocks if isinstance(t, TrellisType) else -(-n_rows * n_blocks // SCALAR_GROUP)

    def job(self) -> bytes:
        """turbo_job."""
        places = (self.memory.place(self.values), self.place, self.memory.place(self.rows))
        steps = (self.values.strides[0], self.before.strides[0], self.rows.itemsize)
        row = division(self.values.shape[1] // self.t.block)
        n_blocks = self.values.size // self.t.block
        return struct.pack("<3Q3q3IIiB3x", *places, *steps, *row, n_blocks, self.t.type_id, self.rows.itemsize == 8)

    def check(self) -> None:
        expected = self.before.copy()
        expected[self.rows] = quantized(self.t, self.values)
        assert np.array_equal(self.memory.read(self.place, expected.shape, np.uint8), expected)


def run(memory: Memory, first: Write, second: Write | None = None) -> Statistics:
    machine, object_code = Machine(memory), CodeObject(emulated_tools.code_object("turbo-write.cu"), memory)
    (kernel,) = object_code.kernels
    groups = (first.groups, second.groups if second else 0)
    jobs = first.job() + (second or first).job() + struct.pack("<2Ii4x", *groups, Scale.MATCHED_NORM)
    return machine.launch(object_code, Call(kernel, (sum(groups), 1, 1), (THREADS, 1, 1), [jobs]))


@pytest.mark.parametrize("t", TRELLIS, ids=lambda t: t.name)
@pytest.mark.parametrize("index_type", [np.int32, np.int64], ids=["i32", "i64"])
def test_few_rows(t: TurboType, index_type: type) -> None:
    memory = Memory.of_size(1 << 21)
    one = Write(memory, t, (3, 2), index_type, seed=1)
    statistics = run(memory, one)
    one.check()
    assert statistics.wave_instructions / one.groups < 9_000


@pytest.mark.parametrize("k", [TRELLIS[1], SCALAR[1]], ids=lambda t: t.name)
@pytest.mark.parametrize("v", [TRELLIS[2], SCALAR[0]], ids=lambda t: t.name)
def test_two_tensors(k: TurboType, v: TurboType) -> None:
    memory = Memory.of_size(1 << 21)
    pair = Write(memory, k, (2, 2), np.int64, seed=1), Write(memory, v, (1, 3), np.int32, seed=2)
    run(memory, *pair)
    for one in pair:
        one.check()


MANY = 64  # blocks of values
BLOCKS_A_GROUP, THREADS_A_GROUP = 16, 128

MOST_INSTRUCTIONS = 2_000
"""Of a wave, for a block of values. Counted were 1,645 (turbo3t) to 1,855 (turbo2t)."""


def view(n_blocks: int, row: int, value: int) -> bytes:
    """turbo_view of one row."""
    return struct.pack("<9I4x5q", *division(n_blocks), *division(1), *division(1), row // n_blocks, row, row, row, value)


@pytest.mark.parametrize("t", TRELLIS, ids=lambda t: t.name)
def test_many_rows(t: TrellisType) -> None:
    memory = Memory.of_size(1 << 21)
    machine, object_code = Machine(memory), CodeObject(emulated_tools.code_object("turbo-ops.cu"), memory)
    (kernel,) = (name for name in object_code.kernels if f"turbo_quantize_trellisIL9ggml_type{t.type_id}Ef14turbo_in_order" in name)
    values = np.random.default_rng(1).standard_normal(MANY * t.block).astype(np.float32)
    place = memory.place(np.full((MANY, t.block_bytes), 0x5A, np.uint8))
    views = view(MANY, values.nbytes, values.itemsize), view(MANY, MANY * t.block_bytes, t.block_bytes)
    arguments = [struct.pack("<Q", memory.place(values)), struct.pack("<Q", place), *views, b"\0", struct.pack("<I", MANY)]
    statistics = machine.launch(object_code, Call(kernel, (MANY // BLOCKS_A_GROUP, 1, 1), (THREADS_A_GROUP, 1, 1), arguments))
    assert np.array_equal(memory.read(place, (MANY * t.block_bytes,), np.uint8), quantized(t, values))
    assert statistics.wave_instructions / MANY < MOST_INSTRUCTIONS
