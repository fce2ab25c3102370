"""SET_ROWS of few rows, and K and V of a layer by one launch, run lane by lane on the CPU, against the C reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import pytest
from lanes_tools import CUDA, Device, each_device, load
from test_lanes_ops import OPS, CTensor, Tensor, gaussian, indices, quantized, row_bytes, turbo_tensor

from turbo_gguf.codec.tables import ALL, TRELLIS, TurboType

COMPUTE = 16
NO_OPS = {"none": 0, "reshape": 4, "view": 5, "permute": 6, "transpose": 7}
H200 = 132
N_ROWS = 12

each_index_type = pytest.mark.parametrize("index_type", [np.int32, np.int64], ids=["i32", "i64"])
each_trellis_type = pytest.mark.parametrize("t", TRELLIS, ids=lambda t: t.name)


@dataclass
class Write:
    """Rows of values that go to a tensor of a turbo type."""

    t: TurboType
    values: np.ndarray
    rows: np.ndarray
    stored: np.ndarray = field(init=False)
    node: CTensor = field(init=False)

    def __post_init__(self) -> None:
        self.stored = np.full((N_ROWS, row_bytes(self.t, self.values.shape[1])), 0x5A, dtype=np.uint8)
        source = Tensor(1 if self.values.dtype == np.float16 else 0, self.values)
        self.node = compute(turbo_tensor(self.t, self.stored).c(source, indices(self.rows)), "set_rows")

    def check(self) -> None:
        expected = np.full_like(self.stored, 0x5A)
        expected[self.rows] = quantized(self.t, self.values.astype(np.float32))
        assert np.array_equal(self.stored, expected)


def write(t: TurboType, n_rows: int = 1, n_blocks: int = 2, index_type: type = np.int64, seed: int = 1) -> Write:
    rows = np.random.default_rng(seed).permutation(N_ROWS)[:n_rows].astype(index_type)
    return Write(t, gaussian(n_rows, n_blocks * t.block, seed=seed), rows)


def compute(node: CTensor, op: str) -> CTensor:
    node.op, node.flags = OPS[op], COMPUTE
    return node


def no_op(name: str) -> CTensor:
    node = Tensor(0, np.zeros((1, 4), dtype=np.float32)).c()
    node.op = NO_OPS[name]
    return node


def copy(dst: np.ndarray, src: np.ndarray) -> CTensor:
    """An op of floats, which is not ours."""
    return compute(Tensor(0, dst).c(Tensor(0, src)), "dup")


def run(nodes: list[CTensor], *, device: Device = CUDA, n_sm: int = H200, concurrent: bool = False) -> int:
    """Computes a graph. How many of our kernels were launched."""
    pointers = (ctypes.POINTER(CTensor) * len(nodes))(*(ctypes.pointer(node) for node in nodes))
    launches = np.zeros(1, dtype=np.int64)
    load("ops.cpp", device).call("lanes_run_graph", pointers, len(nodes), n_sm, concurrent, launches)
    return int(launches[0])


#
# a tensor
#


@each_trellis_type
@each_index_type
@pytest.mark.parametrize("n_rows", range(1, 10))
def test_few_rows(t: TurboType, index_type: type, n_rows: int) -> None:
    one = write(t, n_rows, 1 + 2 * n_rows % 5, index_type)
    assert run([one.node]) == 1
    one.check()


@each_trellis_type
def test_one_row(t: TurboType) -> None:
    for n_blocks in range(1, 17):
        one = write(t, 1, n_blocks, seed=n_blocks)
        assert run([one.node]) == 1
        one.check()


@each_trellis_type
@pytest.mark.parametrize("n_sm", [6, 7], ids=["more", "few"])
def test_both_ways_around_the_limit(t: TurboType, n_sm: int) -> None:
    one = write(t, 3, 7)
    assert run([one.node], n_sm=n_sm) == 1
    one.check()


@each_trellis_type
@pytest.mark.parametrize(("n_matrices", "launches"), [(1, 1), (3, 2), (16, 8), (17, 1)])
def test_two_matrices_at_once(t: TurboType, n_matrices: int, launches: int) -> None:
    """Indices repeat over them."""
    values = gaussian(n_matrices, 1, 3, 2 * t.block)
    rows = np.array([[[4, 1, 3]]])
    stored = np.zeros((n_matrices, 1, 5, row_bytes(t, 2 * t.block)), dtype=np.uint8)
    assert run([compute(turbo_tensor(t, stored).c(Tensor(0, values), indices(rows)), "set_rows")]) == launches
    assert np.array_equal(stored[:, :, rows[0, 0]], quantized(t, values))
    assert not stored[:, :, [0, 2]].any()


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_values_apart(t: TurboType) -> None:
    """What a cache never asks for goes the other way."""
    values = gaussian(3, 4 * t.block)[:, ::2]
    stored = np.zeros((3, row_bytes(t, 2 * t.block)), dtype=np.uint8)
    run([compute(turbo_tensor(t, stored).c(Tensor(0, values), indices(np.arange(3))), "set_rows")])
    assert np.array_equal(stored, quantized(t, np.ascontiguousarray(values)))


def test_few_rows_of_views() -> None:
    """Rows apart, indices apart, and a destination that is part of longer rows."""
    t = TRELLIS[1]
    values, rows = gaussian(6, 5 * t.block)[::2, t.block : 4 * t.block], np.array([4, 9, 1, 9, 0, 9])[::2]
    stored = np.zeros((5, 8 * t.block_bytes), dtype=np.uint8)
    part = stored[:, 2 * t.block_bytes : 5 * t.block_bytes]
    run([compute(turbo_tensor(t, part).c(Tensor(0, values), indices(rows)), "set_rows")])
    assert np.array_equal(part[rows], quantized(t, np.ascontiguousarray(values)))
    assert not stored[:, : 2 * t.block_bytes].any() and not stored[:, 5 * t.block_bytes :].any() and not stored[[2, 3]].any()


#
# K and V
#


@each_device
@pytest.mark.parametrize("k", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("v", ALL, ids=lambda t: t.name)
def test_one_launch_for_each_pair_of_types(device: Device, k: TurboType, v: TurboType) -> None:
    pair = write(k, 2, 4, np.int64, seed=1), write(v, 2, 3, np.int32, seed=2)
    assert run([one.node for one in pair], device=device) == 1
    for one in pair:
        one.check()


@each_trellis_type
@each_index_type
@pytest.mark.parametrize("n_rows", range(1, 10))
def test_one_launch_for_all_numbers_of_rows(t: TurboType, index_type: type, n_rows: int) -> None:
    pair = [write(t, n_rows, n_blocks, index_type, seed=n_blocks) for n_blocks in (1, n_rows)]
    assert run([one.node for one in pair]) == 1
    for one in pair:
        one.check()


def test_one_launch_for_rows_of_all_lengths() -> None:
    for n_blocks in range(1, 17):
        pair = [write(t, 1, n_blocks, seed=i) for i, t in enumerate((TRELLIS[1], ALL[0]))]
        assert run([one.node for one in pair]) == 1
        for one in pair:
            one.check()


def test_one_launch_is_the_same_as_two() -> None:
    together, apart = ([write(t, 3, 4, seed=i) for i, t in enumerate((TRELLIS[1], TRELLIS[2]))] for _ in range(2))
    assert run([one.node for one in together]) == 1
    assert [run([one.node]) for one in apart] == [1, 1]
    for a, b in zip(together, apart, strict=True):
        assert np.array_equal(a.stored, b.stored)


@pytest.mark.parametrize("names", [["view"], ["view", "reshape"], ["none", "permute", "transpose"]], ids=" ".join)
def test_what_computes_nothing_may_lie_between(names: list[str]) -> None:
    k, v = write(TRELLIS[1]), write(TRELLIS[2], seed=2)
    empty = copy(np.zeros((0, 4), dtype=np.float32), np.zeros((0, 4), dtype=np.float32))
    assert run([no_op("view"), k.node, *map(no_op, names), empty, v.node, no_op("view")]) == 1
    k.check()
    v.check()


@pytest.mark.parametrize("n_pairs", [1, 3])
def test_each_layer_has_its_own_launch(n_pairs: int) -> None:
    layers = [(write(TRELLIS[0], seed=2 * i), write(ALL[1], seed=2 * i + 1)) for i in range(n_pairs)]
    done, source = np.zeros((n_pairs, 4), dtype=np.float32), gaussian(n_pairs, 4)
    nodes = [node for i, (k, v) in enumerate(layers) for node in (k.node, no_op("view"), v.node, copy(done[i : i + 1], source[i : i + 1]))]
    assert run(nodes) == n_pairs
    assert np.array_equal(done, source)
    for layer in layers:
        for one in layer:
            one.check()


#
# what is not done together
#


def test_not_with_an_op_in_between() -> None:
    """Which makes what the second one stores."""
    k, v = write(TRELLIS[1]), write(TRELLIS[1], seed=2)
    made = gaussian(*v.values.shape, seed=3)
    assert run([k.node, no_op("view"), copy(v.values, made), v.node]) == 2
    assert np.array_equal(v.values, made)
    k.check()
    v.check()


def test_not_with_a_copy_in_f16_in_between() -> None:
    """As an exact tail would have it, if it came between."""
    k, v = write(TRELLIS[1]), write(TRELLIS[1], seed=2)
    halves = Tensor(1, np.zeros((N_ROWS, v.values.shape[1]), dtype=np.float16))
    exact = compute(halves.c(Tensor(1, v.values.astype(np.float16)), indices(v.rows)), "set_rows")
    assert run([k.node, exact, v.node]) == 2
    k.check()
    v.check()


def test_not_where_upstream_uses_several_streams() -> None:
    k, v = write(TRELLIS[1]), write(TRELLIS[1], seed=2)
    assert run([k.node, v.node], concurrent=True) == 2
    k.check()
    v.check()


def test_not_with_one_that_is_not_to_be_computed() -> None:
    k, v = write(TRELLIS[1]), write(TRELLIS[1], seed=2)
    v.node.flags = 0
    assert run([k.node, v.node]) == 1
    k.check()
    assert (v.stored == 0x5A).all()


def test_not_at_the_end_of_a_graph() -> None:
    k = write(TRELLIS[1])
    assert run([k.node, no_op("view"), no_op("view")]) == 1
    k.check()


def test_not_from_f16() -> None:
    k, v = write(TRELLIS[1]), write(TRELLIS[1], seed=2)
    half = Write(v.t, v.values.astype(np.float16), v.rows)
    assert run([k.node, half.node]) == 2
    k.check()
    half.check()


@pytest.mark.parametrize(("n_sm", "launches"), [(3, 1), (2, 2)], ids=["few", "more"])
def test_not_many_rows(n_sm: int, launches: int) -> None:
    k, v = write(TRELLIS[1], 2, 4), write(TRELLIS[2], 2, 4, seed=2)
    assert run([k.node, v.node], n_sm=n_sm) == launches
    k.check()
    v.check()


def test_not_to_the_same_tensor() -> None:
    """The second one wins where both write."""
    k, v = write(TRELLIS[1]), write(TRELLIS[1], seed=2)
    v.rows[:] = k.rows
    v.node.data = k.node.data
    assert run([k.node, v.node]) == 2
    v.stored[:] = k.stored
    v.check()


@pytest.mark.parametrize("source", [0, 1], ids=["values", "rows"])
@pytest.mark.parametrize("writer", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize(("shared", "launches"), [(0, 1), (8, 2)], ids=["behind", "shared"])
def test_not_where_one_reads_what_the_other_one_writes(source: int, writer: int, shared: int, launches: int) -> None:
    pair = [write(TRELLIS[1], seed=i) for i in range(2)]
    memory = np.zeros(2048, dtype=np.float64)
    read = pair[1 - writer].node.src[source].contents
    pair[writer].node.data = memory.ctypes.data
    read.data = memory.ctypes.data + pair[writer].stored.nbytes - shared
    assert run([one.node for one in pair]) == launches
