"""QJL: vectors as the signs of a random projection, from which inner products with other vectors are estimated without bias.

Of a vector x, the signs of S x and the norm are stored. For any q that is not quantized ("asymmetric"),

    factor * |x| / m * <S q, sign(S x)>    has the expectation    <q, x>

where S has m rows. It is the inner product of q with :func:`decode` of what is stored. No cache type uses it: ``docs/lab/0020-qjl.md``
says why.

Sources: *QJL: 1-bit quantized JL transform for KV cache quantization with zero overhead*, arXiv 2406.03482, definition 3.1 and lemma 3.2;
*TurboQuant*, arXiv 2504.19874, definition 1 and lemma 4. The factor and the variance of orthogonal rows are derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec.codebook import Sphere

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

NORM_BITS = 16
"""A norm is an fp16 number."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A random matrix, and what makes the estimate unbiased."""

    matrix: Floats
    """Shape (rows, n)."""
    factor: float
    """1 / E|<s, u>| for a row s and any unit vector u."""
    orthogonal: bool
    """Whether rows are orthogonal, in groups of n, or independent and Gaussian."""

    @property
    def rows(self) -> int:
        """Signs of a vector."""
        return len(self.matrix)

    @property
    def dimension(self) -> int:
        """Values of a vector."""
        return int(self.matrix.shape[1])

    @property
    def bits_per_value(self) -> float:
        """Signs and the norm, by value of a vector."""
        return (self.rows + NORM_BITS) / self.dimension


class Signs(NamedTuple):
    """What is stored of vectors of shape (..., n)."""

    bits: Bytes
    """A bit for each row, 1: not negative, lowest bit first; shape (..., rows / 8), rounded up."""
    norm: npt.NDArray[np.float16]
    """Shape (...)."""


def projection(dimension: int, rows: int | None = None, *, orthogonal: bool = False, seed: int = 0) -> Projection:
    """Draw a projection.

    Args:
        dimension: values of a vector, n, at least 2.
        rows: signs of a vector, m; ``None``: as many as values.
        orthogonal: rows are those of random rotations, times sqrt(n), instead of Gaussian. The estimate varies less.
        seed: the same one draws the same matrix.

    Raises:
        ValueError: no row, fewer than two dimensions, or orthogonal rows that are neither at most n nor a multiple of n.
    """
    count = dimension if rows is None else rows
    if dimension < 2 or count < 1:
        raise ValueError(f"there is no projection of {dimension} values to {count} signs")
    rng = np.random.default_rng(seed)
    if not orthogonal:
        return Projection(rng.standard_normal((count, dimension)).astype(np.float32), sqrt(pi / 2), False)
    if count > dimension and count % dimension:
        raise ValueError(f"{count} orthogonal rows are neither at most {dimension} nor a multiple of it")
    rotations = [_rotation(rng, dimension) for _ in range(-(-count // dimension))]
    matrix = sqrt(dimension) * np.concatenate(rotations)[:count]
    mean = 2 * float(Sphere(dimension).first(np.array([np.inf]))[0])
    return Projection(matrix.astype(np.float32), 1 / mean, True)


def _rotation(rng: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    """A uniform random orthogonal matrix (F. Mezzadri, *How to generate random matrices from the classical compact groups*, 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return np.asarray(q * np.sign(np.diagonal(r)), np.float64)


def encode(p: Projection, x: npt.ArrayLike) -> Signs:
    """Signs and norms of vectors.

    Args:
        p: of ``n`` values.
        x: shape (..., n), norms at most 65504.

    Raises:
        ValueError: vectors of another length.
    """
    vectors = _vectors(p, x)
    bits = np.packbits(vectors @ p.matrix.T >= 0, axis=-1, bitorder="little")
    return Signs(bits, np.linalg.norm(vectors, axis=-1).astype(np.float16))


def decode(p: Projection, signs: Signs) -> Floats:
    """The vectors that stand for what is stored, shape (..., n): their inner product with any q is the estimate."""
    found: Floats = (_signed(p, signs) @ p.matrix) * _weight(p, signs)[..., None]
    return found


def estimate(p: Projection, q: npt.ArrayLike, signs: Signs) -> Floats:
    """Estimates of inner products, from the signs: what :func:`decode` gives, in another order of operations.

    Args:
        p: what the signs were made with.
        q: shape (..., queries, n).
        signs: of vectors of shape (..., keys, n).

    Returns:
        Shape (..., queries, keys).

    Raises:
        ValueError: queries of another length.
    """
    turned = _vectors(p, q) @ p.matrix.T
    signed = np.swapaxes(_signed(p, signs), -1, -2)
    return np.asarray((turned @ signed) * _weight(p, signs)[..., None, :], np.float32)


def variance(p: Projection, q: npt.ArrayLike, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Variance of the estimate over all projections like this one, exact but for the rounding of the norm.

    Gaussian rows: ``(pi / 2 |q|^2 |x|^2 - <q, x>^2) / m``. With orthogonal rows, the decoded vector has a part along x and one across it,
    which is uniform in direction; both have a second moment in closed form.

    Args:
        p: of ``n`` values; only its shape and kind count.
        q: shape (..., n).
        x: shape (..., n), broadcast against ``q``.

    Returns:
        float64, shape (...).
    """
    a, b = np.asarray(q, np.float64), np.asarray(x, np.float64)
    qq, xx, squared = np.square(a).sum(-1), np.square(b).sum(-1), np.square((a * b).sum(-1))
    m, n = p.rows, p.dimension
    if not p.orthogonal:
        found = (pi / 2 * qq * xx - squared) / m
    else:
        group = min(m, n)
        along = p.factor**2 * (1 + (group - 1) * 2 / pi) / group
        across = p.factor**2 * n / group - along
        found = ((along - 1) * squared + across / (n - 1) * (qq * xx - squared)) * group / m
    return np.asarray(found, np.float64)


def _vectors(p: Projection, x: npt.ArrayLike) -> Floats:
    vectors: Floats = np.asarray(x, np.float32)
    if vectors.ndim == 0 or vectors.shape[-1] != p.dimension:
        raise ValueError(f"vectors of shape {vectors.shape} do not have the {p.dimension} values of the projection")
    return vectors


def _signed(p: Projection, signs: Signs) -> Floats:
    """1 and -1, shape (..., rows)."""
    bits = np.unpackbits(signs.bits, axis=-1, count=p.rows, bitorder="little")
    return np.float32(2) * bits - np.float32(1)


def _weight(p: Projection, signs: Signs) -> Floats:
    found: Floats = signs.norm.astype(np.float32) * np.float32(p.factor / p.rows)
    return found
