"""Matrix instructions of AMD's CDNA3, and packed rows as their operands, bit for bit against numpy.

Registers are filled and read here after the tables of AMD's matrix instruction calculator, not after the sources.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from lanes_tools import GFX942, Library, load
from test_lanes_mma import TILE, check_keys, each_size, each_type, rng, rows, valid, words

from turbo_gguf.codec import tables

__all__ = ["rng"]

LANE = np.arange(64)


@pytest.fixture
def plain() -> Library:
    return load("mfma.cpp", GFX942)


def operand(matrix: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """Registers [64][2] of A from [row][k], or of B from [column][k]: a quarter of k in each quarter of the wave."""
    per_lane = matrix.shape[1] // 4
    k = np.arange(per_lane) + LANE[:, None] // 16 * per_lane
    return words(matrix[(LANE % 16)[:, None], k].reshape(64, 2, -1))


def d_places() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of the 4 elements of D of each lane."""
    return LANE[:, None] // 16 * 4 + np.arange(4), np.broadcast_to(LANE[:, None] % 16, (64, 4))


def test_products_of_int8(plain: Library, rng: np.random.Generator) -> None:
    a, b = (rng.integers(-128, 128, (16, 32), np.int8) for _ in range(2))
    d = rng.integers(-(10**6), 10**6, (16, 16), np.int32)
    got = np.ascontiguousarray(d[d_places()])
    plain.call("lanes_mfma_s8", operand(a), operand(b), got)
    want = a.astype(np.int32) @ b.astype(np.int32).T + d
    assert np.array_equal(got, want[d_places()])


def test_products_of_f16(plain: Library, rng: np.random.Generator) -> None:
    """Of small integers, so that sums are exact."""
    a, b = (rng.integers(-50, 50, (16, 16)).astype(np.float16) for _ in range(2))
    d = rng.integers(-999, 999, (16, 16)).astype(np.float32)
    got = np.ascontiguousarray(d[d_places()])
    plain.call("lanes_mfma_f16", operand(a), operand(b), got)
    want = a.astype(np.float32) @ b.astype(np.float32).T + d
    assert np.array_equal(got, want[d_places()])


def test_sums_and_maxima_of_columns(plain: Library, rng: np.random.Generator) -> None:
    x = rng.integers(-999, 999, (4, 16)).astype(np.float32)
    total, most = np.zeros_like(x), np.zeros_like(x)
    plain.call("lanes_mfma_over_columns", x, total, most)
    assert np.array_equal(total, np.broadcast_to(x.sum(0), x.shape))
    assert np.array_equal(most, np.broadcast_to(x.max(0), x.shape))


#
# packed rows
#


def library(kind: str, size: int) -> Library:
    return load("mfma.cpp", GFX942, f"LANES_TYPE=GGML_TYPE_{tables.enum_of(kind)}", f"LANES_D={size}")


@each_size
@each_type
def test_keys(kind: str, size: int, rng: np.random.Generator) -> None:
    """Integer products of each block's levels with 16 queries, and the scales."""
    check_keys(library(kind, size), kind, size, 16, rng)


@each_size
@each_type
def test_values(kind: str, size: int, rng: np.random.Generator) -> None:
    packed, values = rows(kind, rng, size)
    n = valid(kind, size)
    y = np.full((TILE, size), np.nan, np.float32)
    library(kind, size).call("lanes_sum_values", packed, packed.strides[0], n, y)
    assert np.array_equal(y[:n], values[:n].astype(np.float16).astype(np.float32))
