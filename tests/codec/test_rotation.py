"""Walsh-Hadamard rotations. Risks: another order than the graph's, a group across heads, an inverse with its signs on the wrong side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_gguf.codec import group_of, matrix, random_signs, rotate, unrotate


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_the_matrix_is_that_of_the_graph(n: int) -> None:
    """``hadamard_matrix`` in ``overlay/src/turbo/rotation.cpp``."""
    expected = [[(-1) ** (i & j).bit_count() / np.sqrt(n) for j in range(n)] for i in range(n)]
    np.testing.assert_allclose(matrix(n), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("head", "k", "v"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (256, 256, 64), (96, 32, 32), (80, 16, 16), (7, 1, 1)]
)
def test_groups_are_those_of_the_graph(head: int, k: int, v: int) -> None:
    assert (group_of(head, "K"), group_of(head, "V")) == (k, v)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    size=st.sampled_from([1, 2, 8, 32, 96, 160]),
    seed=st.integers(0, 99),
    signed=st.booleans(),
    wide=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_norms_are_kept_and_the_inverse_is_one(shape: tuple[int, ...], size: int, seed: int, signed: bool, wide: bool) -> None:
    x = np.random.default_rng(seed).standard_normal((*shape, size)).astype(np.float64 if wide else np.float32)
    signs = random_signs(size, seed) if signed else None
    y = rotate(x, signs=signs)
    assert y.shape == x.shape and y.dtype == x.dtype
    tolerance = {"atol": 1e-12} if wide else {"atol": 2e-5}
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), **tolerance)
    np.testing.assert_allclose(unrotate(y, signs=signs), x, **tolerance)


def test_each_group_is_rotated_by_itself() -> None:
    x = np.random.default_rng(1).standard_normal((3, 96))
    expected = (x.reshape(3, 3, 32) @ matrix(32)).reshape(3, 96)
    np.testing.assert_allclose(rotate(x), expected, atol=1e-12)
    np.testing.assert_allclose(rotate(x, group=8), (x.reshape(3, 12, 8) @ matrix(8)).reshape(3, 96), atol=1e-12)


def test_signs_come_before_the_matrix() -> None:
    x, signs = np.random.default_rng(2).standard_normal(16), random_signs(16, 3)
    np.testing.assert_allclose(rotate(x, signs=signs), matrix(16) @ (signs * x), atol=1e-12)


def test_signs_spread_a_head_that_the_matrix_alone_gathers() -> None:
    row = matrix(64)[37]
    assert np.abs(rotate(row)).max() == pytest.approx(1)
    assert max(np.abs(rotate(row, signs=random_signs(64, seed))).max() for seed in range(20)) < 0.6


def test_integers_become_float32() -> None:
    assert rotate(np.ones(4, np.int8)).tolist() == [2, 0, 0, 0] and rotate([1, 1]).dtype == np.float32


def test_refusals() -> None:
    for shape, group in (((4, 96), 64), ((8,), 3), ((8,), 0), ((), None), ((4, 0), None)):
        with pytest.raises(ValueError, match="can't be rotated"):
            rotate(np.zeros(shape), group=group)
    with pytest.raises(ValueError, match="no head"):
        group_of(64, "Q")
    with pytest.raises(ValueError, match="no head"):
        group_of(0, "K")
    with pytest.raises(ValueError, match="can't be rotated"):
        matrix(48)
