"""The tables are what the theory says; a table of equiprobable-bin means shipped elsewhere for months with twice the error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from codec_cases import each_type

from turbo_gguf.codec.codebook import Gaussian, expected_error, lloyd_max
from turbo_gguf.codec.tables import QK_SCALAR, SCALAR, T_MAX, TURBO4, ScalarType

EQUIPROBABLE_4BIT = (0.078, 0.237, 0.402, 0.576, 0.767, 0.987, 1.266, 1.968)
"""Positive means of 16 equally likely bins of N(0, 1): the wrong table."""


def squared_error(levels: Sequence[float]) -> float:
    return expected_error(levels, Gaussian())


def differs_from_lloyd_max(levels: Sequence[float]) -> float:
    found = lloyd_max(len(levels).bit_length()).levels
    return float(np.abs(found[len(levels) :] - levels).max())


@each_type
def test_levels_are_lloyd_max(t: ScalarType) -> None:
    assert differs_from_lloyd_max(t.levels) < 1e-5
    assert squared_error(t.levels) == pytest.approx(t.lloyd_max_error, abs=1e-6)


def test_an_equiprobable_table_is_recognised() -> None:
    """Negative control of the test above, and the size of the mistake."""
    assert differs_from_lloyd_max(EQUIPROBABLE_4BIT) > 0.04
    assert squared_error(EQUIPROBABLE_4BIT) > 1.5 * TURBO4.lloyd_max_error


@each_type
def test_rounding_levels_to_integers_is_free(t: ScalarType) -> None:
    assert t.magnitudes == tuple(round(level * t.int_scale) for level in t.levels)
    rounded = tuple(m / t.int_scale for m in t.magnitudes)
    assert squared_error(rounded) < 1.001 * squared_error(t.levels)


@each_type
def test_codebook_is_ascending_odd_and_fits_int8(t: ScalarType) -> None:
    assert len(t.codebook) == 2**t.bits
    assert list(t.codebook) == sorted(set(t.codebook))
    assert t.codebook == tuple(-c for c in reversed(t.codebook))
    assert max(t.codebook) <= 127


@each_type
def test_pair_sums_of_the_integer_dot_product_fit_int16(t: ScalarType) -> None:
    assert 2 * max(t.codebook) * 127 < 2**15
    assert 2 * max(t.codebook) ** 2 < 2**15


@each_type
def test_thresholds_ascend_below_the_largest_value(t: ScalarType) -> None:
    for thresholds in (*t.thresholds, t.plain_thresholds):
        assert len(thresholds) == 2 ** (t.bits - 1) - 1
        assert list(thresholds) == sorted(set(thresholds))
        assert thresholds[0] > 0
        assert thresholds[-1] < T_MAX  # the largest value of a block can reach the outermost level


@each_type
def test_the_step_ratios_straddle_the_single_one(t: ScalarType) -> None:
    assert list(t.ratios) == sorted(set(t.ratios))
    assert t.ratios[0] <= t.plain_ratio <= t.ratios[-1]


def test_sums_fit_int32() -> None:
    assert QK_SCALAR * T_MAX**2 < 2**31
    assert QK_SCALAR * (T_MAX + 1) ** 2 >= 2**31


def test_sizes_are_those_of_the_design() -> None:
    assert {"turbo2": 10, "turbo3": 14, "turbo4": 18}.items() <= {t.name: t.block_bytes for t in SCALAR}.items()
