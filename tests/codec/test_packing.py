"""One door to all types. Risks: rows that depend on their neighbours, a rule that changes the wrong thing, a shape that is lost."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_gguf import codec
from turbo_gguf.codec import scalar, tables, trellis
from turbo_gguf.codec.tables import Scale, TurboType

each_type = pytest.mark.parametrize("t", tables.ALL, ids=lambda t: t.name)
each_scale = pytest.mark.parametrize("scale", Scale, ids=lambda s: s.name.lower())


def gaussian(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("t", tables.SCALAR, ids=lambda t: t.name)
@each_scale
def test_a_scalar_type_has_the_bytes_of_its_reference(t: tables.ScalarType, scale: Scale) -> None:
    x = gaussian(20, 64)
    np.testing.assert_array_equal(codec.quantize(t.name, x, scale=scale), scalar.quantize(t, x, scale=scale))


@pytest.mark.parametrize("t", tables.TRELLIS, ids=lambda t: t.name)
def test_a_trellis_type_has_the_bytes_of_its_reference(t: tables.TrellisType) -> None:
    x = gaussian(10, 64)
    np.testing.assert_array_equal(codec.quantize(t, x), trellis.quantize(t, x))
    np.testing.assert_array_equal(codec.quantize(t, x, scale=Scale.INNER_PRODUCT), trellis.quantize(t, x))


@each_type
def test_without_a_rule_the_one_of_llama_cpp_is_taken(t: TurboType) -> None:
    x = gaussian(10, 64)
    rule = Scale.MATCHED_NORM if t.family == "scalar" else Scale.INNER_PRODUCT
    assert codec.default_scale(t) == rule
    np.testing.assert_array_equal(codec.quantize(t, x), codec.quantize(t, x, scale=rule))


@each_type
@given(shape=st.lists(st.integers(0, 3), max_size=3).map(tuple), blocks=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_leading_shape_and_each_block_by_itself(t: TurboType, shape: tuple[int, ...], blocks: int, seed: int) -> None:
    x = gaussian(*shape, blocks * t.block, seed=seed)
    packed = codec.quantize(t, x)
    assert packed.shape == (*shape, blocks * t.block_bytes) and packed.dtype == np.uint8
    y = codec.dequantize(t, packed)
    assert y.shape == x.shape and y.dtype == np.float32
    alone = codec.quantize(t, x.reshape(-1, t.block)[::-1])[::-1]
    np.testing.assert_array_equal(alone, packed.reshape(-1, t.block_bytes))


@each_type
@each_scale
def test_rules_do_what_they_say(t: TurboType, scale: Scale) -> None:
    """Over many blocks; tests/codec/test_error.py has the scalar types block by block."""
    found = codec.measure(t, gaussian(1500, 64), scale=scale)
    kept = {Scale.LEAST_SQUARES: found.slope / found.norm**2, Scale.MATCHED_NORM: found.norm, Scale.INNER_PRODUCT: found.slope}
    assert kept[scale] == pytest.approx(1, abs=3e-3)
    others = [value for rule, value in kept.items() if rule != scale]
    if t.bits == 2:
        assert all(abs(value - 1) > 0.01 for value in others), "the rules differ"


@each_type
def test_what_is_read_back_is_stored_alike(t: TurboType) -> None:
    """Least squares do not drift: a second pass finds the same levels, but for a scale that has to be rounded again."""
    x = codec.round_trip(t, gaussian(200, 64), scale=Scale.LEAST_SQUARES)
    assert codec.measure(t, x, scale=Scale.LEAST_SQUARES).error < 0.15 * t.block_error


@pytest.mark.parametrize("t", tables.SCALAR, ids=lambda t: t.name)
def test_a_million_values_take_less_than_a_second(t: TurboType) -> None:
    """Of this process, on one core; it takes a tenth to a third."""
    x = gaussian(8192, 128)
    start = time.process_time()
    codec.round_trip(t, x)
    assert time.process_time() - start < x.size / 1e6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="known: turbo2, turbo3, turbo4, turbo2t"):
        codec.quantize("turbo5", np.zeros(64))
    with pytest.raises(ValueError, match="known"):
        codec.dequantize("q4_0", np.zeros(18, np.uint8))
    for x in (np.zeros(31), np.zeros((4, 48)), np.float32(1)):
        with pytest.raises(ValueError, match="no whole number of blocks"):
            codec.quantize("turbo3", x)
    for packed in (np.zeros(15, np.uint8), np.zeros(14), np.uint8(1)):
        with pytest.raises(ValueError, match="no blocks of turbo3, 14 bytes each"):
            codec.dequantize("turbo3", packed)
