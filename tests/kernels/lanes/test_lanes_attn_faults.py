"""Decode attention where something is wrong or absent: tiles that nobody sees, NaN in a query, in K or in V."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from lanes_tools import CUDA, HIP32, HIP64, Device, each_device
from test_lanes_attn import Case, Floats, Keys

TILE = 32

PLAIN = Case(n_kv=256, n_cols=4, gqa_ratio=4, n_head_kv=1, n_split=2)
NAN_SCALE = {"turbo3": (0, 2), "q8_0": (0, 2), "f16": (0, 2), "turbo3t": (0, 1)}
"""Bytes of a block that are its scale, or a value: all ones are NaN."""


def inputs(case: Case) -> tuple[Floats, Keys]:
    """Queries, and keys that all queries see."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((case.n_seq, case.n_q, case.n_head_kv * case.gqa_ratio, case.head_size[0]), np.float32)
    keys = Keys.random(case, rng, case.n_kv, (case.type_k, case.type_v))
    keys.mask[:] = 0
    return q, keys


def run(case: Case, device: Device, q: Floats, keys: Keys) -> tuple[Floats, int]:
    """The result, and how many dot products of 4 values the scores took."""
    out = np.full((*q.shape[:3], case.head_size[1]), np.pi, np.float32)
    library = case.library(device)
    before, after = np.zeros(1, np.int64), np.zeros(1, np.int64)
    library.call("lanes_dot_products", before)
    arguments = keys.arguments(case, q, None, out, aligned=True)
    library.call("lanes_decode", ctypes.byref(arguments), None, case.n_seq, case.n_split)
    library.call("lanes_dot_products", after)
    return out, int(after[0] - before[0])


@pytest.mark.parametrize("n_kv", [256, 250])
@pytest.mark.parametrize("visible", [(), (0,), (7,), (2, 3), (1, 4, 6)], ids=str)
@each_device
def test_a_tile_that_nobody_sees_is_not_unpacked(visible: tuple[int, ...], n_kv: int, device: Device) -> None:
    case = replace(PLAIN, n_kv=n_kv)
    q, keys = inputs(case)
    keys.mask[:] = -np.inf
    for tile in visible:
        keys.mask[..., tile * TILE : (tile + 1) * TILE] = 0
    out, dot_products = run(case, device, q, keys)
    of_a_tile = TILE * case.n_cols * case.head_size[0] // 4
    assert dot_products == len(visible) * of_a_tile
    assert np.isfinite(out).all()
    assert out.any() == bool(visible)


def test_a_tile_that_one_of_the_queries_sees_is_unpacked() -> None:
    case = replace(PLAIN, n_q=2, gqa_ratio=2)
    q, keys = inputs(case)
    keys.mask[:, 0, TILE:] = -np.inf
    keys.mask[:, 1, : 2 * TILE] = -np.inf
    keys.mask[:, 1, 3 * TILE :] = -np.inf
    out, dot_products = run(case, CUDA, q, keys)
    assert dot_products == 2 * TILE * case.n_cols * case.head_size[0] // 4
    assert out.any(axis=(2, 3)).all()


@pytest.mark.parametrize("kind", ["turbo3", "turbo3t", "q8_0", "f16"])
@pytest.mark.parametrize("device", [CUDA, HIP64], ids=["cuda", "hip64"])
def test_nan_in_a_query_is_the_result_of_its_head(kind: str, device: Device) -> None:
    case = replace(PLAIN, type_k=kind)
    q, keys = inputs(case)
    q[0, 0, 2, 77] = np.nan
    out, _ = run(case, device, q, keys)
    assert np.isnan(out[0, 0, 2]).all()
    assert np.isfinite(out[0, 0, [0, 1, 3]]).all()


@pytest.mark.parametrize("n_split", [1, 2], ids=["one part", "merged"])
@pytest.mark.parametrize("side", [0, 1], ids=["k", "v"])
@pytest.mark.parametrize("kind", [*NAN_SCALE])
def test_nan_in_the_cache_is_in_the_result(kind: str, side: int, n_split: int) -> None:
    case = replace(PLAIN, type_k="turbo3" if side else kind, type_v=kind if side else "turbo3", n_split=n_split)
    q, keys = inputs(case)
    keys.packed[side][0, 100, 0, slice(*NAN_SCALE[kind])] = 255
    out, _ = run(case, HIP32, q, keys)
    assert np.isnan(out).any(axis=-1).all(), "heads without NaN"


@pytest.mark.parametrize("kind", [*NAN_SCALE])
def test_nan_in_a_key_that_is_masked_is_not_seen(kind: str) -> None:
    """A cell that was never written holds anything."""
    case = replace(PLAIN, type_k=kind)
    q, keys = inputs(case)
    keys.mask[..., 100] = -np.inf
    want, _ = run(case, CUDA, q, keys)
    keys.packed[0][0, 100, 0, slice(*NAN_SCALE[kind])] = 255
    out, _ = run(case, CUDA, q, keys)
    assert np.array_equal(out, want)
