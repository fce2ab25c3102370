"""Lloyd-Max codebooks. Risks: levels of another distribution, an iteration that stops early, a formula that holds in one dimension."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_gguf.codec import lloyd_max
from turbo_gguf.codec.codebook import Distribution, Gaussian, Sphere, expected_error

MAX_1960 = {
    1: ((0.7980,), 0.3634),
    2: ((0.4528, 1.510), 0.1175),
    3: ((0.2451, 0.7560, 1.344, 2.152), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), 0.009497),
}
"""Table 1 of J. Max, *Quantizing for minimum distortion*: positive levels and squared error."""

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)

dimensions = st.one_of(st.none(), st.integers(2, 300))


def source_of(dimension: int | None) -> Distribution:
    return Gaussian() if dimension is None else Sphere(dimension)


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_codebooks_are_those_of_the_publication(bits: int) -> None:
    levels, error = MAX_1960[bits]
    found = lloyd_max(bits)
    np.testing.assert_allclose(found.levels[len(levels) :], levels, atol=6e-4)
    assert found.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_in_three_dimensions_levels_are_equally_spaced(bits: int) -> None:
    """Archimedes: a coordinate of a sphere in three dimensions is uniform, so the answer is known for any number of bits."""
    found = lloyd_max(bits, 3)
    assert found.error == pytest.approx(4.0**-bits, rel=1e-9)
    np.testing.assert_allclose(found.levels, np.sqrt(3) * (2 * np.arange(2**bits) + 1 - 2**bits) / 2**bits, atol=1e-9)


@given(bits=st.integers(1, 5), dimension=dimensions)
@settings(max_examples=40, deadline=None)
def test_every_level_is_the_mean_of_its_cell(bits: int, dimension: int | None) -> None:
    source, book = source_of(dimension), lloyd_max(bits, dimension)
    half = book.levels[2 ** (bits - 1) :]
    assert (np.diff(book.levels) > 0).all() and (book.levels == -book.levels[::-1]).all() and book.bits == bits
    edges = np.array([0.0, *book.thresholds[2 ** (bits - 1) :], np.inf])
    means = np.diff(source.first(edges)) / np.diff(source.mass(edges))
    np.testing.assert_allclose(half, means, rtol=1e-7)
    assert book.error == pytest.approx(expected_error(half, source))
    gap = np.diff(book.levels).min()
    for i in range(len(half)):
        for step in (-gap / 4, gap / 4):
            moved = half.copy()
            moved[i] += step
            assert expected_error(moved, source) > book.error, "another level is worse"


@given(dimension=dimensions, x=st.floats(0, 6))
@settings(max_examples=50, deadline=None)
def test_moments_are_integrals_of_the_density(dimension: int | None, x: float) -> None:
    source = source_of(dimension)
    end = np.inf if dimension is None else np.sqrt(dimension)
    for moment, whole in ((source.mass, 0.5), (source.second, 0.5)):
        assert float(moment(np.array([end]))[0]) == pytest.approx(whole, abs=1e-9), "a distribution of variance 1"
    stop = min(x, 0.999 * end)  # in two dimensions the density is infinite at the end
    at, weights = (NODES + 1) * stop / 2, WEIGHTS * stop / 2
    density = source.density(at)
    for moment, power in ((source.mass, 0), (source.first, 1), (source.second, 2)):
        assert float(moment(np.array([stop]))[0]) == pytest.approx((weights * density * at**power).sum(), abs=1e-7)


@pytest.mark.parametrize("dimension", [2, 3, 8, 64, None])
def test_the_error_is_that_of_random_vectors(dimension: int | None) -> None:
    """From both sides: within four standard errors of the mean over 200,000 values."""
    rng = np.random.default_rng(1)
    if dimension is None:
        x = rng.standard_normal((200_000, 1))
    else:
        vectors = rng.standard_normal((200_000 // dimension, dimension))
        x = vectors * np.sqrt(dimension) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for bits in (1, 2, 4):
        book = lloyd_max(bits, dimension)
        errors = np.square(x - book.decode(book.encode(x))).mean(1)
        assert abs(errors.mean() - book.error) < 4 * errors.std() / np.sqrt(len(errors))


def test_more_dimensions_come_near_the_gaussian() -> None:
    errors = [lloyd_max(3, n).error for n in (2, 4, 16, 64, 256, 1024)]
    assert errors == sorted(errors) and errors[-1] < lloyd_max(3).error < 1.003 * errors[-1]


@given(shape=st.lists(st.integers(0, 4), max_size=4).map(tuple), bits=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_indices_have_the_shape_of_the_values_and_are_nearest(shape: tuple[int, ...], bits: int) -> None:
    x = np.random.default_rng(2).standard_normal(shape)
    book = lloyd_max(bits)
    index = book.encode(x)
    assert index.shape == book.decode(index).shape == shape and index.dtype == np.uint8
    distance = np.abs(x[..., None] - book.levels)
    np.testing.assert_allclose(np.abs(x - book.levels[index]), distance.min(-1))


def test_refusals() -> None:
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            lloyd_max(bits)
    for dimension in (1, 0, -3):
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            lloyd_max(2, dimension)
