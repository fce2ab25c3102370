"""Decay: requantization to half of the levels, in place. Zeroing the high bit plane, which holds the signs, has been a bug elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from codec_cases import (
    FINITE_SCALES,
    OTHER_SCALES,
    blocks_of_equal_bytes,
    blocks_with_scales,
    each_scale,
    each_variant,
    gaussian_blocks,
    load,
    stored_blocks,
    with_scale,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from turbo_gguf.codec import scalar
from turbo_gguf.codec.tables import SCALAR, TURBO2, TURBO3, TURBO4, ScalarType, Scale

KEPT = {
    TURBO3: {10: 31, 31: 31, 55: 88, 88: 88},
    TURBO4: {5: 15, 15: 15, 25: 36, 36: 36, 48: 62, 62: 62, 79: 104, 104: 104},
}
"""The magnitude that takes the place of each."""

each_type = pytest.mark.parametrize("t", KEPT, ids=lambda t: t.name)


def levels(t: ScalarType, packed: np.ndarray) -> np.ndarray:
    """Codebook entries, shape (blocks, 32)."""
    return scalar.dequantize(t, with_scale(packed[:, 2:], 0x3C00)).astype(np.int64)


def scales(packed: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(packed[:, :2]).view("<f2").astype(np.float64).ravel()


def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1).astype(np.float64)


def least_squares_step(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return sums(old, new) / sums(new, new)


#
# what it stores
#


def assert_requantized(t: ScalarType, packed: np.ndarray, scale: Scale) -> None:
    """Levels are those of the map, and ``d`` is what the rule makes of old and new levels, but for rounding."""
    decayed = load("portable").decay(t, packed, scale=scale)
    old, new = levels(t, packed), levels(t, decayed)
    kept = np.zeros(max(t.codebook) + 1, dtype=np.int64)
    kept[list(KEPT[t])] = list(KEPT[t].values())
    assert np.array_equal(new, np.sign(old) * kept[np.abs(old)])

    tt, tc, cc = sums(old, old), sums(old, new), sums(new, new)
    ratio = {Scale.LEAST_SQUARES: tc / cc, Scale.MATCHED_NORM: np.sqrt(tt / cc), Scale.INNER_PRODUCT: tt / tc}[scale]
    exact = scales(packed) * ratio
    ulp = np.exp2(np.maximum(np.frexp(exact)[1] - 11, -24))  # of fp16
    assert np.all(np.abs(scales(decayed) - exact) <= 0.5 * ulp * 1.001)  # binary32 comes before


@each_type
@each_scale
def test_decay_of_all_levels_beside_each_other(t: ScalarType, scale: Scale) -> None:
    assert_requantized(t, blocks_of_equal_bytes(t), scale)


@each_type
@each_scale
def test_decay_of_all_kinds_of_finite_scales(t: ScalarType, scale: Scale) -> None:
    assert_requantized(t, blocks_with_scales(t, FINITE_SCALES), scale)


@given(t=st.sampled_from(list(KEPT)), scale=st.sampled_from(list(Scale)), data=st.data())
@settings(max_examples=300, deadline=None)
def test_decay_of_anything(t: ScalarType, scale: Scale, data: st.DataObject) -> None:
    packed = data.draw(hnp.arrays(np.uint8, (2, t.block_bytes)))
    packed[0, 1] &= 0xFB  # a finite d
    decayed = load("native").decay(t, packed, scale=scale)
    assert np.array_equal(decayed, scalar.decay(t, packed, scale=scale))
    finite = np.isfinite(scales(packed))
    assert np.array_equal(decayed[~finite], packed[~finite])
    assert_requantized(t, packed[finite], scale)


@each_variant
@each_type
@each_scale
def test_numpy_decays_like_c(variant: str, t: ScalarType, scale: Scale) -> None:
    packed = stored_blocks(t)
    ours, theirs = scalar.decay(t, packed, scale=scale), load(variant).decay(t, packed, scale=scale)
    wrong = np.flatnonzero((ours != theirs).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} blocks differ, the first is {packed[wrong[0]].tobytes().hex()}"


@each_type
@each_scale
def test_the_second_time_nothing_changes(t: ScalarType, scale: Scale) -> None:
    """Whatever rule the second one has."""
    o = load("portable")
    once = o.decay(t, stored_blocks(t), scale=scale)
    for other in Scale:
        assert np.array_equal(o.decay(t, once, scale=other), once)


@each_type
def test_signs_stay(t: ScalarType) -> None:
    packed = stored_blocks(t)
    decayed = load("portable").decay(t, packed)
    signs = np.s_[:, 10:] if t is TURBO3 else np.s_[:, 2:]
    mask = 0xFF if t is TURBO3 else 0x88
    assert np.array_equal(decayed[signs] & mask, packed[signs] & mask)


@each_type
@each_scale
def test_blocks_that_are_not_finite_stay_and_zeros_stay_zeros(t: ScalarType, scale: Scale) -> None:
    o = load("portable")
    packed = blocks_with_scales(t, OTHER_SCALES)
    assert np.array_equal(o.decay(t, packed, scale=scale), packed)
    cleared = np.zeros((3, t.block_bytes), dtype=np.uint8)
    assert not o.decay(t, cleared, scale=scale).any()
    assert not o.dequantize(t, o.decay(t, blocks_with_scales(t, [0x0000, 0x8000]), scale=scale)).any()


@each_type
def test_rows_are_independent_blocks(t: ScalarType) -> None:
    packed = blocks_with_scales(t, (*FINITE_SCALES, *OTHER_SCALES))[::20][:36]
    expected = scalar.decay(t, packed).ravel()
    for shape in ((36 * t.block_bytes,), (9, 4 * t.block_bytes), (2, 3, 6 * t.block_bytes)):
        assert np.array_equal(scalar.decay(t, packed.reshape(shape)).ravel(), expected)
        assert np.array_equal(load("portable").decay(t, packed.reshape(shape)).ravel(), expected)


def test_types_without_a_bit_to_spare_are_refused() -> None:
    assert [t for t in SCALAR if t.decays] == [t for t in SCALAR if load("portable").decays(t)] == list(KEPT)
    packed = np.zeros((1, TURBO2.block_bytes), dtype=np.uint8)
    for decay in (scalar.decay, load("portable").decay):
        with pytest.raises(ValueError, match="turbo2 does not decay"):
            decay(TURBO2, packed)


#
# why this map
#


def nearest(t: ScalarType, step: Fraction) -> dict[int, int]:
    """For each magnitude the one of the kept ones that, times a step, is nearest: what an encoder would choose."""
    kept = sorted(set(KEPT[t].values()))
    return {m: min(kept, key=lambda c: abs(m - step * c)) for m in t.magnitudes}


def steps(t: ScalarType) -> tuple[Fraction, Fraction]:
    """Between these steps the midpoints of kept magnitudes separate the pairs of the map."""
    pairs = [(Fraction(a + b, 2), a, min(m for m in KEPT[t] if KEPT[t][m] == b)) for a, b in pairwise(sorted(set(KEPT[t].values())))]
    return max(below / middle for middle, below, _ in pairs), min(above / middle for middle, _, above in pairs)


@each_type
def test_the_map_is_the_nearest_level(t: ScalarType) -> None:
    """Between two steps, not outside; nearly all least-squares steps of Gaussian blocks lie between them."""
    low, high = steps(t)
    inside = [low + (high - low) * Fraction(i, 100) for i in range(1, 100)]
    assert all(nearest(t, step) == KEPT[t] for step in inside)
    assert nearest(t, low - Fraction(1, 1000)) != KEPT[t] != nearest(t, high + Fraction(1, 1000))

    packed = scalar.quantize(t, gaussian_blocks(8192))
    step = least_squares_step(levels(t, packed), levels(t, scalar.decay(t, packed)))
    assert np.mean((step > float(low)) & (step < float(high))) > 0.998


@each_type
@each_scale
def test_decay_is_what_the_encoder_makes_of_decoded_blocks(t: ScalarType, scale: Scale) -> None:
    """An encoder for the kept levels, on blocks with an outermost one: its step is relative to that."""
    low, high = steps(t)
    kept = ScalarType(
        type_id=t.type_id,
        bits=t.bits - 1,
        levels=(),
        magnitudes=t.magnitudes[1::2],
        int_scale=t.int_scale,
        ratios=(),
        plain_ratio=round(float((low + high) / 2), 2),
        lloyd_max_error=0,
        block_error=0,
    )
    packed = np.concatenate([scalar.quantize(t, gaussian_blocks(4096)), blocks_with_scales(t, [0x2E66], 4096)])
    packed = packed[np.abs(levels(t, packed)).max(axis=1) == t.magnitudes[-1]]
    assert len(packed) > 4500
    encoded = scalar.quantize(kept, scalar.dequantize(t, packed), scale=scale, search=False)
    decayed = load("portable").decay(t, packed, scale=scale)
    one_ulp = 2.0**-10  # of an fp16 scale; the encoder's integers are rounded levels
    np.testing.assert_allclose(scalar.dequantize(t, decayed), scalar.dequantize(kept, encoded), rtol=1.1 * one_ulp)


def maps_to_half(t: ScalarType) -> list[list[int]]:
    """All idempotent maps of magnitude indices onto half of them."""
    n = len(t.magnitudes)
    found = []
    for kept in combinations(range(n), n // 2):
        choices = [(m,) if m in kept else kept for m in range(n)]
        found += [list(choice) for choice in product(*choices)]
    return found


def errors_of_maps(t: ScalarType, x: np.ndarray, scale: Scale, maps: np.ndarray) -> np.ndarray:
    """Squared error of each map on encoded blocks, with scales fitted anew in binary64."""
    packed = scalar.quantize(t, x, scale=scale)
    old, d = levels(t, packed), scales(packed)[:, None]
    magnitudes = np.array(t.magnitudes, dtype=np.float64)
    here = np.abs(old)[:, :, None] == magnitudes  # block, value, magnitude
    counts = here.sum(axis=1)
    projections = ((np.sign(old) * x)[:, :, None] * here).sum(axis=1)

    new = magnitudes[maps].T  # magnitude, map
    cc, tc, tt = counts @ new**2, (counts * magnitudes) @ new, (counts @ magnitudes**2)[:, None]
    units = d * {Scale.LEAST_SQUARES: tc / cc, Scale.MATCHED_NORM: np.sqrt(tt / cc), Scale.INNER_PRODUCT: tt / tc}[scale]
    errors: np.ndarray = ((x**2).sum(axis=1, keepdims=True) - 2 * units * (projections @ new) + units**2 * cc).sum(axis=0)
    return errors / float((x**2).sum())


@each_type
@each_scale
def test_no_other_map_has_a_smaller_error(t: ScalarType, scale: Scale) -> None:
    """Among all that keep signs and half of the magnitudes and change nothing the second time; the next best is 4 % worse."""
    x = gaussian_blocks(512).astype(np.float64)
    maps = maps_to_half(t)
    assert len(maps) == {TURBO3: 24, TURBO4: 17920}[t]
    errors = errors_of_maps(t, x, scale, np.array(maps))
    ours = maps.index([m | 1 for m in range(len(t.magnitudes))])
    assert errors[ours] * 1.04 < np.delete(errors, ours).min()
    decayed = scalar.dequantize(t, scalar.decay(t, scalar.quantize(t, x, scale=scale), scale=scale))
    assert ((x - decayed) ** 2).sum() / (x**2).sum() == pytest.approx(errors[ours], rel=1e-3)


#
# what is lost
#

COSINE = {TURBO3: (0.938, 0.943), TURBO4: (0.982, 0.987)}
"""Of Gaussian blocks and what is left of them: measured .9409 and .9848; .9870 and .9970 before decay."""


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    a, b = x.astype(np.float64), y.astype(np.float64)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def sign_cleared(t: ScalarType, packed: np.ndarray) -> np.ndarray:
    out = packed.copy()
    if t is TURBO3:
        out[:, 10:] = 0
    else:
        out[:, 2:] &= 0x77
    return out


def low_bit_cleared(t: ScalarType, packed: np.ndarray) -> np.ndarray:
    out = packed.copy()
    out[:, 2 : 10 if t is TURBO3 else 18] &= 0xAA if t is TURBO3 else 0xEE
    return out


BROKEN: dict[str, Callable[[ScalarType, np.ndarray], np.ndarray]] = {
    "nothing": lambda t, packed: packed,
    "signs cleared": sign_cleared,
    "low bits cleared": low_bit_cleared,
    "cleared": lambda t, packed: np.zeros_like(packed),
}


def is_as_known(t: ScalarType, value: float) -> bool:
    low, high = COSINE[t]
    return low <= value <= high


@each_type
@each_scale
def test_cosine_is_the_known_value(t: ScalarType, scale: Scale) -> None:
    x = gaussian_blocks(8192)
    packed = scalar.quantize(t, x, scale=scale)
    assert is_as_known(t, cosine(x, scalar.dequantize(t, load("portable").decay(t, packed, scale=scale))))


@each_type
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_decay_fails(t: ScalarType, name: str) -> None:
    x = gaussian_blocks(8192)
    with np.errstate(invalid="ignore"):
        value = cosine(x, scalar.dequantize(t, BROKEN[name](t, scalar.quantize(t, x))))
    assert not is_as_known(t, value)


@each_type
def test_norms_and_products_are_kept_by_their_rules(t: ScalarType) -> None:
    """Through both roundings of the scale."""
    x = gaussian_blocks(512).astype(np.float64)
    one_ulp = 2.0**-10
    for scale in (Scale.MATCHED_NORM, Scale.INNER_PRODUCT):
        packed = scalar.quantize(t, x, scale=scale)
        old = scalar.dequantize(t, packed).astype(np.float64)
        new = scalar.dequantize(t, load("portable").decay(t, packed, scale=scale)).astype(np.float64)
        kept = (new * new) if scale is Scale.MATCHED_NORM else (old * new)
        np.testing.assert_allclose(kept.sum(axis=1), (old * old).sum(axis=1), rtol=2 * one_ulp)
