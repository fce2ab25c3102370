"""Matrix instructions of AMD's RDNA3 and RDNA4, and packed rows as their operands, bit for bit against numpy.

Registers are filled and read here after the tables of the ISA manuals, not after the sources.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from lanes_tools import GFX11, GFX12, Device, LanesMisuse, Library, load
from test_lanes_mma import TILE, check_keys, each_size, each_type, rng, rows, valid, words

from turbo_gguf.codec import tables

__all__ = ["rng"]

LANE = np.arange(32)
each_gfx = pytest.mark.parametrize("device", [GFX11, GFX12], ids=lambda d: d.name)


def operand(device: Device, matrix: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """Registers [32][n] of A from [row][k], or of B from [column][k]: all k in both halves of a wave (RDNA3), or 8 of them in each."""
    per_register = 4 // matrix.itemsize
    k = np.arange(16) + 0 * LANE[:, None] if device == GFX11 else np.arange(8) + LANE[:, None] // 16 * 8
    return words(matrix[(LANE % 16)[:, None], k].reshape(32, -1, per_register))


def d_places(device: Device) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of the 8 elements of D of each lane."""
    i, half = np.arange(8), LANE[:, None] // 16
    return (2 * i + half if device == GFX11 else i + 8 * half), np.broadcast_to(LANE[:, None] % 16, (32, 8))


@each_gfx
def test_products_of_int8(device: Device, rng: np.random.Generator) -> None:
    a, b = (rng.integers(-128, 128, (16, 16), np.int8) for _ in range(2))
    d = rng.integers(-(10**6), 10**6, (16, 16), np.int32)
    got = np.ascontiguousarray(d[d_places(device)])
    load("wmma.cpp", device).call("lanes_wmma_s8", operand(device, a), operand(device, b), got)
    want = a.astype(np.int32) @ b.astype(np.int32).T + d
    assert np.array_equal(got, want[d_places(device)])


@each_gfx
def test_products_of_f16(device: Device, rng: np.random.Generator) -> None:
    """Of small integers, so that sums are exact."""
    a, b = (rng.integers(-50, 50, (16, 16)).astype(np.float16) for _ in range(2))
    d = rng.integers(-999, 999, (16, 16)).astype(np.float32)
    got = np.ascontiguousarray(d[d_places(device)])
    load("wmma.cpp", device).call("lanes_wmma_f16", operand(device, a), operand(device, b), got)
    want = a.astype(np.float32) @ b.astype(np.float32).T + d
    assert np.array_equal(got, want[d_places(device)])


def test_rdna3_wants_an_operand_in_both_halves(rng: np.random.Generator) -> None:
    a = operand(GFX11, rng.integers(-128, 128, (16, 16), np.int8))
    a[20, 1] ^= 1
    with pytest.raises(LanesMisuse, match="have not the same operand"):
        load("wmma.cpp", GFX11).call("lanes_wmma_s8", a, a.copy(), np.zeros((32, 8), np.int32))


@each_gfx
def test_operands_of_halves(device: Device, rng: np.random.Generator) -> None:
    """Lanes that have 8 columns of a line each, and which row the first elements of D are."""
    matrix = rng.integers(-128, 128, (16, 16), np.int8)
    own, want = operand(GFX12, matrix), operand(device, matrix)
    got, lines = np.zeros_like(want), np.zeros(32, np.int32)
    load("wmma.cpp", device).call("lanes_wmma_operand", own, got, lines)
    assert np.array_equal(got, want)
    line_of, _ = d_places(device)
    elements = np.arange(8) * 2 + LANE[:, None] // 16
    assert np.array_equal(lines[line_of], elements)


#
# packed rows
#


def library(device: Device, kind: str, size: int) -> Library:
    return load("wmma.cpp", device, f"LANES_TYPE=GGML_TYPE_{tables.enum_of(kind)}", f"LANES_D={size}")


@each_gfx
@each_size
@each_type
def test_keys(kind: str, size: int, device: Device, rng: np.random.Generator) -> None:
    """Integer products of each block's levels with 16 queries, and the scales."""
    check_keys(library(device, kind, size), kind, size, 16, rng)


@each_gfx
@each_size
@each_type
def test_values(kind: str, size: int, device: Device, rng: np.random.Generator) -> None:
    packed, values = rows(kind, rng, size)
    n = valid(kind, size)
    y = np.full((TILE, size), np.nan, np.float32)
    library(device, kind, size).call("lanes_sum_values", packed, packed.strides[0], n, y)
    assert np.array_equal(y[:n], values[:n].astype(np.float16).astype(np.float32))
