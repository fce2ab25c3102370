"""What a cache type costs: bits and error in closed form, and the error of given values beside them.

Errors are relative: E|x - y|^2 / E|x|^2 of values x that are read back as y, on Gaussian values unless values are given.

Sources: C. Shannon, *Coding theorems for a discrete source with a fidelity criterion*, 1959 (the bound); P. Panter and W. Dite,
*Quantization distortion in pulse-count modulation*, Proc. IRE 39, 1951 (scalar codes of many bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, pi, sqrt

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec import codebook, packing
from turbo_gguf.codec.packing import default_scale, turbo_type
from turbo_gguf.codec.tables import ScalarType, Scale, TurboType

F16_BITS = 16.0
"""Bits per value of an f16 cache."""


def bits_per_value(t: TurboType | str) -> float:
    """Bits per value, the share of the scale included."""
    found = turbo_type(t)
    return 8 * found.block_bytes / found.block


def ratio(t: TurboType | str, bits: float = F16_BITS) -> float:
    """How many times smaller than a cache of so many bits per value, f16 by default."""
    return bits / bits_per_value(t)


def bound(bits: float) -> float:
    """Error of Gaussian values that no code of so many bits per value goes below, however many values it codes together: 4^-bits."""
    return float(4.0**-bits)


def scalar_limit(bits: float) -> float:
    """Error that scalar codes of N(0, 1) come near with more and more bits: sqrt(3) pi / 2 times the bound."""
    return sqrt(3) * pi / 2 * bound(bits)


def rescaled(error: float, scale: Scale) -> float:
    """Error under a rule, from the one with least squares.

    Least squares leave <x, y> = |y|^2 = (1 - e)|x|^2. The other rules multiply y: by 1 / sqrt(1 - e), so that its norm is that of x, or by
    1 / (1 - e), so that <x, y> = |x|^2. It is exact for one block, and a little too small for a mean over blocks.

    Args:
        error: e, at least 0 and below 1.
        scale: the rule.

    Raises:
        ValueError: the error is not in this range.
    """
    if not 0 <= error < 1:
        raise ValueError(f"an error with least squares is at least 0 and below 1, not {error}")
    return {Scale.LEAST_SQUARES: error, Scale.MATCHED_NORM: 2 - 2 * sqrt(1 - error), Scale.INNER_PRODUCT: error / (1 - error)}[scale]


@dataclass(frozen=True)
class Expected:
    """A type with a rule, by its constants alone."""

    bits_per_value: float
    ratio: float
    """Times smaller than f16."""
    error: float
    """On Gaussian values."""
    bound: float
    """Of the same bits: see :func:`bound`."""
    without_search: float | None
    """Error of a scalar type whose scale is the norm of its block, an exact integral. ``None``: a trellis type has none."""

    @property
    def excess_bits(self) -> float:
        """Bits per value that a code at the bound would need less."""
        return log2(self.error / self.bound) / 2


def expected(t: TurboType | str, *, scale: Scale | None = None) -> Expected:
    """Bits and error of a type.

    The error follows from ``t.block_error``, a constant that was measured once: the search for the scale of a block, and for a path, has no
    closed form. What has one is the codebook without a search, on the exact marginal of a sphere of 32 dimensions.

    Args:
        t: a type, or its name.
        scale: the rule; ``None``: that of llama.cpp.

    Raises:
        ValueError: no such type.
    """
    found = turbo_type(t)
    rule = default_scale(found) if scale is None else scale
    if isinstance(found, ScalarType):
        least = found.block_error
        levels = np.array(found.magnitudes) / found.int_scale
        alone = codebook.expected_error(levels, codebook.Sphere(found.block))
    else:
        least, alone = found.block_error / (1 + found.block_error), None  # it is that of inner products
    bits = bits_per_value(found)
    return Expected(bits, ratio(found), rescaled(least, rule), bound(bits), alone)


@dataclass(frozen=True)
class Measured:
    """What became of values."""

    error: float
    """|x - y|^2 / |x|^2."""
    slope: float
    """<x, y> / |x|^2: 1 where inner products are right on average."""
    norm: float
    """|y| / |x|."""
    values: int


def compare(x: npt.ArrayLike, y: npt.ArrayLike) -> Measured:
    """Compare values with what was read back, both of one shape. All numbers are NaN where there is nothing but zeros.

    Raises:
        ValueError: shapes differ.
    """
    before, after = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"values of shape {before.shape} were not read back as {after.shape}")
    with np.errstate(invalid="ignore", divide="ignore"):
        power = np.square(before).sum()
        error, slope, squared_norm = np.array([np.square(before - after).sum(), (before * after).sum(), np.square(after).sum()]) / power
    return Measured(float(error), float(slope), float(np.sqrt(squared_norm)), before.size)


def measure(t: TurboType | str, x: npt.ArrayLike, *, scale: Scale | None = None) -> Measured:
    """Store values and read them back; arguments and errors as in :func:`turbo_gguf.codec.packing.quantize`."""
    values = np.asarray(x, np.float32)
    return compare(values, packing.round_trip(t, values, scale=scale))
