"""Lloyd-Max codebooks: the scalar quantizers of least squared error, in closed form.

A vector that was rotated at random is a uniform point of a sphere, up to its norm. So its values have one known distribution, and one
codebook serves all of them. :class:`Sphere` is that distribution for a dimension, and :class:`Gaussian` its limit for many dimensions.

All values have variance 1: a unit vector ``u`` of dimension n stands for the values ``sqrt(n) * u``.

Sources: S. Lloyd, *Least squares quantization in PCM*, 1957 (IEEE Trans. Inf. Theory 28, 1982); J. Max, *Quantizing for minimum
distortion*, IRE Trans. Inf. Theory 6, 1960; the marginal of a sphere as the source: TurboQuant, arXiv 2504.19874, lemma 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import erf, lgamma, pi, sqrt
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]

MAX_BITS = 8
"""An index is a byte."""

_LLOYD_STEPS = 50
_NEWTON_STEPS = 50
_CONVERGED = 1e-9


class Distribution(Protocol):
    """A symmetric distribution of variance 1. Moments are integrals from 0 to each ``x`` >= 0, ``inf`` allowed, float64 of its shape."""

    def density(self, x: Reals) -> Reals:
        """Density at ``x``."""

    def mass(self, x: Reals) -> Reals:
        """Integral of the density f."""

    def first(self, x: Reals) -> Reals:
        """Integral of x f(x)."""

    def second(self, x: Reals) -> Reals:
        """Integral of x^2 f(x)."""


@dataclass(frozen=True)
class Gaussian:
    """N(0, 1)."""

    def density(self, x: Reals) -> Reals:
        """As :class:`Distribution` says, like all that follow."""
        return np.exp(-x * x / 2) / sqrt(2 * pi)

    def mass(self, x: Reals) -> Reals:
        """P(0 < X < x)."""
        return np.array([erf(float(v) / sqrt(2)) / 2 for v in x.ravel()]).reshape(x.shape)

    def first(self, x: Reals) -> Reals:
        """f(0) - f(x)."""
        return 1 / sqrt(2 * pi) - self.density(x)

    def second(self, x: Reals) -> Reals:
        """By parts: mass(x) - x f(x)."""
        return self.mass(x) - np.where(np.isinf(x), 0, x) * self.density(x)


@dataclass(frozen=True)
class Sphere:
    """One coordinate of a uniform point of the sphere of radius sqrt(n) in n dimensions.

    With u = x / sqrt(n), the density of u is proportional to (1 - u^2)^k for k = (n - 3) / 2.
    """

    dimension: int

    def __post_init__(self) -> None:
        """Refuse a sphere without a density.

        Raises:
            ValueError: fewer than two dimensions.
        """
        if self.dimension < 2:
            raise ValueError(f"a sphere has at least 2 dimensions, not {self.dimension}")

    def density(self, x: Reals) -> Reals:
        """In two dimensions it is infinite at the ends."""
        n = self.dimension
        with np.errstate(divide="ignore"):
            return np.where(x * x < n, self._factor * np.maximum(1 - x * x / n, 0) ** ((n - 3) / 2), 0.0)

    def mass(self, x: Reals) -> Reals:
        """A finite sum: see :func:`_integral`."""
        n = self.dimension
        return sqrt(n) * self._factor * _integral(n - 3, self._unit(x))

    def first(self, x: Reals) -> Reals:
        """In closed form, as the integrand is a derivative."""
        n, u = self.dimension, self._unit(x)
        return n * self._factor * (1 - (1 - u * u) ** ((n - 1) / 2)) / (n - 1)

    def second(self, x: Reals) -> Reals:
        """By parts, as a moment of the sphere of two more dimensions."""
        n, u = self.dimension, self._unit(x)
        return n * sqrt(n) * self._factor * (_integral(n - 1, u) - u * (1 - u * u) ** ((n - 1) / 2)) / (n - 1)

    def _unit(self, x: Reals) -> Reals:
        return np.minimum(np.asarray(x, np.float64) / sqrt(self.dimension), 1.0)

    @property
    def _factor(self) -> float:
        """What makes the integral of the density 1."""
        n = self.dimension
        return float(np.exp(lgamma(n / 2) - lgamma((n - 1) / 2)) / sqrt(pi * n))


def _integral(twice: int, u: Reals) -> Reals:
    """Integral from 0 to ``u`` of (1 - v^2)^(twice / 2), by the recursion over the exponent: all of its terms are positive."""
    u = np.asarray(u, np.float64)
    start = -1 if twice % 2 else 0
    found = np.arcsin(u) if start else u.copy()
    for n in range(start + 2, twice + 1, 2):
        found = (u * (1 - u * u) ** (n / 2) + n * found) / (n + 1)
    return found


@dataclass(frozen=True, eq=False)
class Codebook:
    """A scalar quantizer of values of variance 1 with nearest levels."""

    levels: Reals
    """Ascending, shape (2**bits,), symmetric about 0."""
    error: float
    """Expected squared error on the distribution that it was made for."""

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return len(self.levels).bit_length() - 1

    @property
    def thresholds(self) -> Reals:
        """Middles of neighbouring levels, shape (2**bits - 1,)."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def encode(self, x: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Index of the nearest level of each value, of any shape. A NaN gets the last one."""
        return np.searchsorted(self.thresholds, np.asarray(x)).astype(np.uint8)

    def decode(self, index: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Levels of indices, in binary32 and of their shape."""
        return self.levels.astype(np.float32)[index]


@cache
def lloyd_max(bits: int, dimension: int | None = None) -> Codebook:
    """The codebook of least expected squared error.

    Args:
        bits: of an index, 1 to 8.
        dimension: of the sphere that values are coordinates of, 2 or more; ``None``: they are Gaussian.

    Raises:
        ValueError: another number of bits, or a dimension below 2.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"a codebook has 1 to {MAX_BITS} bits, not {bits}")
    source: Distribution = Gaussian() if dimension is None else Sphere(dimension)
    count = 1 << bits - 1
    # near the optimum: levels of many are spread as the cube root of the density is, a Gaussian of three times the variance
    start = np.array([sqrt(3) * NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)])
    half = start if dimension is None else start * np.sqrt(dimension / (dimension + start * start))
    for _ in range(_LLOYD_STEPS):
        half = _centroids(source, half)[0]
    half = _newton(source, half)
    return Codebook(np.concatenate([-half[::-1], half]), expected_error(half, source))


def expected_error(half: npt.ArrayLike, source: Distribution) -> float:
    """Expected squared error of any symmetric codebook with nearest levels.

    Args:
        half: its positive levels, ascending, shape (levels / 2,).
        source: distribution of the values.
    """
    levels = np.asarray(half, np.float64)
    mass, first, second = (np.diff(moment(_edges(levels))) for moment in (source.mass, source.first, source.second))
    return float(2 * (second - 2 * levels * first + levels * levels * mass).sum())


def _edges(half: Reals) -> Reals:
    """Ends of the cells of positive levels."""
    return np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [np.inf]])


def _centroids(source: Distribution, half: Reals) -> tuple[Reals, Reals]:
    """Means of the cells of positive levels, and their mass."""
    edges = _edges(half)
    mass = np.diff(source.mass(edges))
    return np.diff(source.first(edges)) / mass, mass


def _newton(source: Distribution, half: Reals) -> Reals:
    """Solve "every level is the mean of its cell". Lloyd's own iteration needs as many steps as there are levels, squared."""
    for _ in range(_NEWTON_STEPS):
        means, mass = _centroids(source, half)
        inner = _edges(half)[1:-1]
        density = source.density(inner)
        up, down = density * (inner - means[:-1]) / mass[:-1], density * (means[1:] - inner) / mass[1:]
        slopes = np.diag(np.append(up, 0.0)) + np.diag(np.insert(down, 0, 0.0)) + np.diag(up, 1) + np.diag(down, -1)
        step = np.linalg.solve(np.eye(len(half)) - slopes / 2, half - means)
        half = half - step
        if np.abs(step).max() < _CONVERGED * half[-1]:
            break
    return half
