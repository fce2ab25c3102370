"""Matrix instructions of NVIDIA's sm_80 and later, and packed rows as their operands, bit for bit against numpy.

Registers are filled and read here after the tables of the PTX manual, not after the sources.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from lanes_tools import CUDA, LanesMisuse, Library, load

from turbo_gguf.codec import oracle, scalar, tables

SCALAR = {t.name: t for t in tables.SCALAR}
TRELLIS = {t.name: t for t in tables.TRELLIS}
LANE = np.arange(32)
TILE = 32


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def words(elements: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """Registers of what the last axis has, the first one lowest."""
    return np.ascontiguousarray(elements).view(np.uint32)[..., 0]


def c_places() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of c0 .. c3 of each lane."""
    i = np.arange(4)
    return LANE[:, None] // 4 + i // 2 * 8, LANE[:, None] % 4 * 2 + i % 2


def b_registers(b: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """[k][8] of int8 (k = 32) or f16 (k = 16) to [32][2]."""
    n = 4 // b.itemsize
    k = (LANE % 4)[:, None, None] * n + np.arange(2)[:, None] * len(b) // 2 + np.arange(n)
    return words(b[k, (LANE // 4)[:, None, None]])


def a_registers(a: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """[16][k] to [32][4]."""
    n = 4 // a.itemsize
    i = np.arange(4)[:, None]
    k = (LANE % 4)[:, None, None] * n + i // 2 * a.shape[1] // 2 + np.arange(n)
    return words(a[(LANE // 4)[:, None, None] + i % 2 * 8, k])


@pytest.fixture
def plain() -> Library:
    return load("mma.cpp", CUDA)


def test_products_of_int8(plain: Library, rng: np.random.Generator) -> None:
    a, b = (rng.integers(-128, 128, shape, np.int8) for shape in ((16, 32), (32, 8)))
    c = rng.integers(-(10**6), 10**6, (16, 8), np.int32)
    d = np.zeros((32, 4), np.int32)
    plain.call("lanes_mma_s8", a_registers(a), b_registers(b), np.ascontiguousarray(c[c_places()]), d)
    want = a.astype(np.int32) @ b.astype(np.int32) + c
    assert np.array_equal(d, want[c_places()])


def test_products_of_f16(plain: Library, rng: np.random.Generator) -> None:
    """Of small integers, so that sums are exact."""
    a, b = (rng.integers(-50, 50, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    c = rng.integers(-999, 999, (16, 8)).astype(np.float32)
    d = np.ascontiguousarray(c[c_places()])
    plain.call("lanes_mma_f16", a_registers(a), b_registers(b), d)
    want = a.astype(np.float32) @ b.astype(np.float32) + c
    assert np.array_equal(d, want[c_places()])


def test_transpose(plain: Library, rng: np.random.Generator) -> None:
    x = rng.integers(0, 65536, (8, 8), np.uint16)
    y = np.zeros(32, np.uint32)
    plain.call("lanes_mma_transpose", words(x.reshape(8, 4, 2)).reshape(-1), y)
    assert np.array_equal(y.view(np.uint16).reshape(8, 8), x.T)


def test_a_missing_wait_shows(plain: Library, rng: np.random.Generator) -> None:
    x = rng.integers(1, 2**32, 64, np.uint32)
    want = x.reshape(2, 32)[:, ::-1].reshape(-1)
    for waits in (True, False):
        seen = []
        for descending in (False, True):
            y = np.zeros(64, np.uint32)
            plain.set_descending(descending)
            plain.call("lanes_reverse", x, y, waits)
            seen.append(np.array_equal(y, want))
        plain.set_descending(False)
        assert seen == [True, waits]


#
# packed rows
#


def rows(kind: str, rng: np.random.Generator, size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Packed rows at an address and a stride that suit all copies, and what they unpack to."""
    x = rng.standard_normal((TILE, size), np.float32)
    if kind in TRELLIS:
        packed = oracle.load().quantize_trellis(TRELLIS[kind], x)
        values = oracle.load().dequantize(TRELLIS[kind], packed)
    else:
        packed = scalar.quantize(SCALAR[kind], x)
        values = scalar.dequantize(SCALAR[kind], packed)
    packed = packed.reshape(TILE, -1)
    stride = packed.shape[1] + 15 & ~15
    memory = np.empty(TILE * stride + 16, np.uint8)
    start = -memory.ctypes.data % 16
    placed = memory[start : start + TILE * stride].reshape(TILE, stride)
    placed[:, : packed.shape[1]] = packed
    return placed, values.astype(np.float32).reshape(TILE, size)


def library(kind: str, size: int) -> Library:
    return load("mma.cpp", CUDA, f"LANES_TYPE=GGML_TYPE_{tables.enum_of(kind)}", f"LANES_D={size}")


each_type = pytest.mark.parametrize("kind", [*SCALAR, *TRELLIS])
each_size = pytest.mark.parametrize("size", [64, 128, 256])


def valid(kind: str, size: int) -> int:
    """Rows of the tile: all of them, but where they cannot be copied asynchronously."""
    return TILE - 5 if kind in TRELLIS and size == 64 else TILE


def check_keys(lanes: Library, kind: str, size: int, columns: int, rng: np.random.Generator) -> None:
    """Compare integer products of each block's levels with queries, and scales, with what the rows unpack to."""
    packed, values = rows(kind, rng, size)
    n, group = valid(kind, size), 64 if kind in TRELLIS else 32
    q = rng.integers(-127, 128, (columns, size), np.int8)
    dots, scales = np.zeros((TILE, columns, size // group), np.int32), np.zeros((TILE, size // group), np.float32)
    lanes.call("lanes_dot_keys", packed, packed.strides[0], n, q, dots, scales)

    blocks = values[:n].reshape(n, -1, group)
    levels = np.rint(blocks / scales[:n, :, None])
    assert np.array_equal((levels * scales[:n, :, None]).astype(np.float32), blocks)
    want = np.einsum("kbv,cbv->kcb", levels.astype(np.int64), q.reshape(columns, -1, group).astype(np.int64))
    assert np.array_equal(dots[:n], want)
    assert np.array_equal(dots[n:], np.broadcast_to(dots[n - 1], dots[n:].shape)), "rows beyond the last are the last"


@each_size
@each_type
def test_keys(kind: str, size: int, rng: np.random.Generator) -> None:
    """Integer products of each block's levels with 8 queries, and the scales."""
    check_keys(library(kind, size), kind, size, 8, rng)


@each_size
@each_type
def test_values(kind: str, size: int, rng: np.random.Generator) -> None:
    packed, values = rows(kind, rng, size)
    n = valid(kind, size)
    y = np.full((TILE, size), np.nan, np.float32)
    library(kind, size).call("lanes_sum_values", packed, packed.strides[0], n, y)
    assert np.array_equal(y[:n], values[:n].astype(np.float16).astype(np.float32))


def test_rows_off_their_grid_are_refused(rng: np.random.Generator) -> None:
    packed, _ = rows("turbo3", rng, 128)
    with pytest.raises(LanesMisuse, match="not aligned to 8"):
        library("turbo3", 128).call("lanes_sum_values", packed.reshape(-1)[2:], packed.strides[0], TILE, np.zeros((TILE, 128), np.float32))
