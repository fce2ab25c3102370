"""Which tile of upstream's kernel for matrix cores serves a slice of a prefill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from lanes_tools import CUDA, HIP32, Device, load

from turbo_gguf.codec import tables

MLA = (576, 512)
"""Upstream's kernel takes V from K here."""

Tile = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """What a device allows."""

    device: Device
    max_columns: int = 64
    max_head: int = 512


AMPERE, TURING, RDNA3, CDNA = Gpu(CUDA), Gpu(CUDA, max_columns=32), Gpu(HIP32, max_head=256), Gpu(HIP32)


def tile(gpu: Gpu, head_size: tuple[int, int], n_q: int = 512, gqa_ratio: int = 8, softcap: bool = False) -> Tile | None:
    """Queries and heads of the tile, None: the slice goes to the tile kernel."""
    found = np.zeros(4, np.int64)
    load("prefill_tiles.cpp", gpu.device).call(
        "lanes_choose_tile", *head_size, n_q, gqa_ratio, softcap, gpu.max_columns, gpu.max_head, found
    )
    if not found.any():
        return None
    assert tuple(found[:2]) == head_size
    queries, heads = (int(x) for x in found[2:])
    assert gqa_ratio % heads == 0
    return queries, heads


@pytest.mark.parametrize("head_size", [size for size in tables.HEAD_SIZES if size != MLA], ids=str)
@pytest.mark.parametrize(
    ("gpu", "largest"), [(AMPERE, 512), (TURING, 512), (RDNA3, 256), (CDNA, 512)], ids=["ampere", "turing", "rdna3", "cdna"]
)
def test_heads_of_a_group_of_eight_have_a_tile(gpu: Gpu, largest: int, head_size: tuple[int, int]) -> None:
    found = tile(gpu, head_size)
    if head_size[0] > largest:
        assert found is None
        return
    assert found is not None
    queries, heads = found
    assert queries * heads <= gpu.max_columns
    assert heads == (8 if head_size == (192, 128) else 4)


@pytest.mark.parametrize(
    ("gpu", "head_size", "n_q", "gqa_ratio", "expected"),
    [
        (AMPERE, (128, 128), 512, 4, (16, 4)),
        (AMPERE, (128, 128), 8, 4, (8, 4)),
        (AMPERE, (128, 128), 9, 4, (16, 4)),
        (AMPERE, (96, 96), 512, 7, (64, 1)),
        (AMPERE, (64, 64), 512, 2, (64, 1)),
        (AMPERE, (192, 128), 512, 4, None),
        (AMPERE, (512, 512), 512, 2, None),
        (TURING, (128, 128), 512, 4, (8, 4)),
        (TURING, (128, 128), 512, 1, None),
        (RDNA3, (128, 128), 512, 4, (16, 4)),
        (RDNA3, (96, 96), 512, 6, (32, 2)),
        (RDNA3, (128, 128), 512, 1, None),
        (CDNA, (512, 512), 512, 8, (8, 4)),
    ],
)
def test_tiles(gpu: Gpu, head_size: tuple[int, int], n_q: int, gqa_ratio: int, expected: Tile | None) -> None:
    assert tile(gpu, head_size, n_q, gqa_ratio) == expected


def test_v_that_upstream_would_take_from_k_has_no_tile() -> None:
    assert tile(AMPERE, MLA, gqa_ratio=16) is None


@pytest.mark.parametrize(("head_size", "served"), [((128, 128), True), ((256, 256), True), ((512, 512), True), ((192, 128), False)])
def test_a_soft_cap_has_a_tile_where_upstream_compiles_it(head_size: tuple[int, int], served: bool) -> None:
    assert (tile(AMPERE, head_size, softcap=True) is not None) == served
