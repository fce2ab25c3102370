"""Keys as a codebook part and the signs of what it leaves: scores without bias, as TurboQuant's variant for inner products has them.

A vector of n values is stored with b bits a value as

- its norm, and for each value the index of a Lloyd-Max level with b - 1 bits, of the exact marginal of a unit sphere (:func:`encode_unit`);
- the norm of what that leaves, and one sign for each row of a random projection of it (:mod:`turbo_gguf.codec.qjl`).

The score of a query is that of the codebook part, plus the estimate for the rest. V has no scores, so it is stored by the codebook alone,
with b bits. Vectors are rotated before, as :mod:`turbo_gguf.codec.rotation` does.

Source: *TurboQuant: online vector quantization with near-optimal distortion rate*, arXiv 2504.19874, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec import qjl
from turbo_gguf.codec.codebook import lloyd_max
from turbo_gguf.codec.qjl import NORM_BITS, Projection, Signs

Floats = npt.NDArray[np.float32]


class Unit(NamedTuple):
    """Vectors of shape (..., n) by the codebook alone."""

    indices: npt.NDArray[np.uint8]
    """A level for each value, not packed, shape (..., n)."""
    norm: npt.NDArray[np.float16]
    """Shape (...)."""


class Keys(NamedTuple):
    """Vectors of shape (..., n) by codebook and signs."""

    unit: Unit
    rest: Signs


def bits_of_unit(bits: int, dimension: int) -> float:
    """Bits per value of :func:`encode_unit`: indices and a norm."""
    return bits + NORM_BITS / dimension


def bits_of_keys(bits: int, p: Projection) -> float:
    """Bits per value of :func:`encode` with indices of so many bits less 1: indices, signs and two norms."""
    return bits_of_unit(bits - 1, p.dimension) + p.bits_per_value


def encode_unit(x: npt.ArrayLike, bits: int) -> Unit:
    """Norms, and nearest levels of ``sqrt(n) x / |x|``.

    Args:
        x: shape (..., n) with n at least 2, norms at most 65504.
        bits: of an index, 1 to 8.

    Raises:
        ValueError: another number of bits, or fewer than two values.
    """
    vectors = np.asarray(x, np.float32)
    if vectors.ndim == 0:
        raise ValueError("a number is no vector")
    n = vectors.shape[-1]
    book = lloyd_max(bits, n)
    norm = np.linalg.norm(vectors, axis=-1)
    scaled = vectors * (np.float32(np.sqrt(n)) / np.where(norm > 0, norm, np.float32(1)))[..., None]
    return Unit(book.encode(scaled), norm.astype(np.float16))


def decode_unit(code: Unit, bits: int) -> Floats:
    """Vectors of shape (..., n), binary32."""
    n = code.indices.shape[-1]
    found: Floats = lloyd_max(bits, n).decode(code.indices) * (code.norm.astype(np.float32) / np.float32(np.sqrt(n)))[..., None]
    return found


def encode(x: npt.ArrayLike, bits: int, p: Projection) -> Keys:
    """Keys with ``bits`` bits a value in all, if ``p`` has as many rows as values: one less for the codebook.

    Args:
        x: shape (..., n).
        bits: 2 to 9.
        p: projection of n values.

    Raises:
        ValueError: as :func:`encode_unit` and :func:`turbo_gguf.codec.qjl.encode`.
    """
    vectors = np.asarray(x, np.float32)
    unit = encode_unit(vectors, bits - 1)
    return Keys(unit, qjl.encode(p, vectors - decode_unit(unit, bits - 1)))


def decode(keys: Keys, bits: int, p: Projection) -> Floats:
    """The vectors whose inner products with queries are the scores, shape (..., n)."""
    return decode_unit(keys.unit, bits - 1) + qjl.decode(p, keys.rest)


def scores(q: npt.ArrayLike, keys: Keys, bits: int, p: Projection) -> Floats:
    """Inner products of queries with keys, unbiased over projections.

    Args:
        q: shape (..., queries, n), rotated as the keys were.
        keys: of vectors of shape (..., keys, n).
        bits: as for :func:`encode`.
        p: what the keys were made with.

    Returns:
        Shape (..., queries, keys).
    """
    queries = np.asarray(q, np.float32)
    found: Floats = queries @ np.swapaxes(decode_unit(keys.unit, bits - 1), -1, -2) + qjl.estimate(p, queries, keys.rest)
    return found
