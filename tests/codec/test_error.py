"""Measured error on Gaussian blocks against the known value, from both sides, with broken codecs that must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from codec_cases import each_scale, each_type, gaussian_blocks
from test_tables import EQUIPROBABLE_4BIT

from turbo_gguf.codec import scalar
from turbo_gguf.codec.tables import QK_SCALAR, TURBO4, ScalarType, Scale

BLOCKS = 8192
TOLERANCE = 0.02


def relative_error(x: np.ndarray, decoded: np.ndarray) -> float:
    wide = x.astype(np.float64)
    return float(((wide - decoded) ** 2).sum() / (wide**2).sum())


def coded(t: ScalarType, x: np.ndarray, scale: Scale = Scale.LEAST_SQUARES, search: bool = True) -> np.ndarray:
    return scalar.dequantize(t, scalar.quantize(t, x, scale=scale, search=search))


def is_as_known(t: ScalarType, error: float) -> bool:
    return abs(error / t.block_error - 1) < TOLERANCE


@each_type
def test_error_is_the_known_value(t: ScalarType) -> None:
    x = gaussian_blocks(BLOCKS)
    error = relative_error(x, coded(t, x))
    assert is_as_known(t, error), error
    assert error > 2 ** (-2 * 8 * t.block_bytes / QK_SCALAR)  # no code of this rate can do better


def test_an_equiprobable_table_fails() -> None:
    wrong = tuple(round(level * 127 / EQUIPROBABLE_4BIT[-1]) for level in EQUIPROBABLE_4BIT)
    t = replace(TURBO4, levels=EQUIPROBABLE_4BIT, magnitudes=wrong)
    x = gaussian_blocks(BLOCKS)
    error = relative_error(x, coded(t, x))
    assert error > 1.2 * TURBO4.block_error
    assert not is_as_known(TURBO4, error)


BROKEN: dict[str, Callable[[ScalarType, np.ndarray], np.ndarray]] = {
    "zeros": lambda t, x: np.zeros_like(x),
    "input itself": lambda t, x: x,
    "sign lost": lambda t, x: np.abs(coded(t, x)),
    "values shifted by one": lambda t, x: np.roll(coded(t, x), 1, axis=1),
    "halves swapped": lambda t, x: np.roll(coded(t, x), 16, axis=1),
    "scale 6 % off": lambda t, x: coded(t, x) * np.float32(1.06),
}


@each_type
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_codec_fails(t: ScalarType, name: str) -> None:
    x = gaussian_blocks(BLOCKS)
    assert not is_as_known(t, relative_error(x, BROKEN[name](t, x)))


@each_type
def test_the_search_pays(t: ScalarType) -> None:
    x = gaussian_blocks(BLOCKS)
    gain = relative_error(x, coded(t, x, search=False)) / relative_error(x, coded(t, x))
    assert gain > 1.03


@each_type
def test_least_squares_has_the_smallest_error_of_every_block(t: ScalarType) -> None:
    x = gaussian_blocks(512)
    best = ((x - coded(t, x)) ** 2).sum(axis=1)
    for scale in (Scale.MATCHED_NORM, Scale.INNER_PRODUCT):
        assert np.all(best <= ((x - coded(t, x, scale)) ** 2).sum(axis=1) * 1.001)


@each_type
def test_matched_norm_keeps_norms_and_inner_product_keeps_products(t: ScalarType) -> None:
    x = gaussian_blocks(512).astype(np.float64)
    half_an_ulp = 2.0**-11
    matched = coded(t, x, Scale.MATCHED_NORM).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(matched, axis=1), np.linalg.norm(x, axis=1), rtol=1.3 * half_an_ulp)
    product = coded(t, x, Scale.INNER_PRODUCT).astype(np.float64)
    np.testing.assert_allclose((product * x).sum(axis=1), (x * x).sum(axis=1), rtol=1.3 * half_an_ulp)


@each_type
@each_scale
def test_error_does_not_depend_on_the_size_of_the_values(t: ScalarType, scale: Scale) -> None:
    """Down to values of 0.01 the fp16 scale costs nothing; at 0.0001 its denormals cost less than 2 % of the error."""
    x = gaussian_blocks(1024)
    expected = relative_error(x, coded(t, x, scale))
    for factor, tolerance in ((1e4, 0.002), (1e2, 0.002), (1e-2, 0.002), (1e-4, 0.02)):
        small = x * np.float32(factor)
        assert relative_error(small, coded(t, small, scale)) == pytest.approx(expected, rel=tolerance)
