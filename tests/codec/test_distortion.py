"""Closed forms beside measured errors, from both sides. Risks: a constant that is not what the code does, a rule with another error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_gguf import codec
from turbo_gguf.codec import scalar, tables
from turbo_gguf.codec.tables import ScalarType, Scale, TurboType

each_type = pytest.mark.parametrize("t", tables.ALL, ids=lambda t: t.name)
each_scale = pytest.mark.parametrize("scale", Scale, ids=lambda s: s.name.lower())


def gaussian(blocks: int, block: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((blocks, block)).astype(np.float32)


@each_type
def test_bits_are_those_of_the_layout(t: TurboType) -> None:
    assert codec.bits_per_value(t) == 8 * codec.quantize(t, np.zeros(t.block)).size / t.block
    assert codec.ratio(t) == 16 / codec.bits_per_value(t) and codec.ratio(t, 8.5) == 8.5 / codec.bits_per_value(t)
    found = codec.expected(t.name)
    assert (found.bits_per_value, found.ratio) == (codec.bits_per_value(t), codec.ratio(t))


@each_type
@each_scale
def test_the_expected_error_is_the_measured_one(t: TurboType, scale: Scale) -> None:
    found = codec.expected(t, scale=scale)
    measured = codec.measure(t, gaussian(1500, t.block), scale=scale).error
    assert measured == pytest.approx(found.error, rel=0.03)
    assert found.bound < measured, "no code is below the bound"
    assert found.bound * 4**found.excess_bits == pytest.approx(found.error)


@pytest.mark.parametrize("t", tables.SCALAR, ids=lambda t: t.name)
def test_a_codebook_with_the_norm_as_its_scale_has_the_error_of_the_integral(t: ScalarType) -> None:
    x = gaussian(20000, t.block).astype(np.float64)
    levels = np.array(t.codebook) / t.int_scale
    d = np.sqrt(np.square(x).mean(1, keepdims=True))
    y = d * levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x / d)]
    found = codec.expected(t).without_search
    assert found is not None
    assert np.square((x - y) / d).mean() == pytest.approx(found, rel=0.01)
    assert codec.expected(t, scale=Scale.LEAST_SQUARES).error < found, "the search pays"


def test_a_trellis_has_no_codebook_of_its_own() -> None:
    assert all(codec.expected(t).without_search is None for t in tables.TRELLIS)


@pytest.mark.parametrize("t", tables.SCALAR, ids=lambda t: t.name)
def test_rules_follow_from_least_squares_block_by_block(t: ScalarType) -> None:
    x = gaussian(200, t.block).astype(np.float64)

    def errors(scale: Scale) -> np.ndarray:
        y = scalar.dequantize(t, scalar.quantize(t, x, scale=scale))
        return np.square(x - y).sum(1) / np.square(x).sum(1)

    least = errors(Scale.LEAST_SQUARES)
    for scale in Scale:
        np.testing.assert_allclose(errors(scale), [codec.rescaled(e, scale) for e in least], rtol=0.01, atol=1e-5)


@given(st.floats(0, 0.99))
def test_rules_have_an_order(error: float) -> None:
    least, norm, product = (codec.rescaled(error, scale) for scale in Scale)
    assert error == least <= norm + 1e-12 and norm <= product + 1e-12


@given(st.floats(0, 8), st.floats(0.1, 4))
def test_a_bit_is_worth_a_factor_of_four(bits: float, more: float) -> None:
    assert codec.bound(bits + more) == pytest.approx(codec.bound(bits) / 4**more)
    assert codec.scalar_limit(bits) / codec.bound(bits) == pytest.approx(2.7207, abs=1e-4)


def test_scalar_codes_come_near_their_limit() -> None:
    ratios = [codec.lloyd_max(bits).error / codec.scalar_limit(bits) for bits in range(1, 9)]
    assert ratios == sorted(ratios) and 0.98 < ratios[-1] < 1


def test_compare() -> None:
    x = np.array([[3.0, 4.0]])
    found = codec.compare(x, [[3.0, 0.0]])
    assert (found.error, found.slope, found.norm, found.values) == (16 / 25, 9 / 25, 3 / 5, 2)
    assert np.isnan(codec.compare(np.zeros(4), np.zeros(4)).error)
    with pytest.raises(ValueError, match="were not read back"):
        codec.compare(x, x[0])


def test_refusals() -> None:
    for error in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            codec.rescaled(error, Scale.MATCHED_NORM)
    with pytest.raises(ValueError, match="no turbo type"):
        codec.expected("f16")
