"""Walsh-Hadamard rotations of heads, as llama.cpp and our graphs apply them to K and V before they are stored, and with random signs.

A rotation multiplies groups of neighbouring values by the orthonormal matrix ``H[i, j] = (-1)^popcount(i & j) / sqrt(n)``, in Sylvester's
order. It is its own inverse. It makes values of a head nearly Gaussian, unless the head is one that the matrix maps to a few large values.
Random signs before the matrix make that unlikely for every head. The graphs of llama.cpp have none: their rotation is fixed.

Sources: ``docs/design/0004-rotation.md``; random signs: N. Ailon and B. Chazelle, *The fast Johnson-Lindenstrauss transform*, 2009.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]

UPSTREAM_GROUP = 64
"""Upstream rotates head sizes that are multiples of this: V in groups of it, and K in the largest ones that fit."""


def group_of(head_size: int, side: str) -> int:
    """How many neighbouring values the graph rotates together: a power of two that divides the head size.

    Args:
        head_size: values of a head, at least 1.
        side: ``"K"`` or ``"V"``.

    Raises:
        ValueError: another side, or no head.
    """
    if side not in ("K", "V") or head_size < 1:
        raise ValueError(f"there is no head of {head_size} values of {side!r}")
    power = head_size & -head_size
    if power < UPSTREAM_GROUP:
        return power
    return UPSTREAM_GROUP if side == "V" else power


def random_signs(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Signs for :func:`rotate`: 1 or -1 with equal chance, float32 of shape (n,)."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), n)


def rotate(x: npt.ArrayLike, *, group: int | None = None, signs: npt.ArrayLike | None = None) -> Array:
    """Multiply by signs, and rotate groups of the last axis.

    Args:
        x: numbers, shape (..., n); float64 stays, all else becomes float32.
        group: a power of two that divides n; ``None``: the largest one.
        signs: 1 and -1, broadcast against ``x``; ``None``: no signs.

    Returns:
        An array of the shape of ``x``. Norms are kept, up to rounding.

    Raises:
        ValueError: the group is no power of two, or does not divide n.
    """
    values = _floats(x)
    if signs is not None:
        values = values * np.asarray(signs, values.dtype)
    return _transform(values, group)


def unrotate(x: npt.ArrayLike, *, group: int | None = None, signs: npt.ArrayLike | None = None) -> Array:
    """Undo :func:`rotate` with the same group and signs."""
    values = _transform(_floats(x), group)
    return values if signs is None else values * np.asarray(signs, values.dtype)


def matrix(n: int) -> npt.NDArray[np.float64]:
    """The matrix itself, shape (n, n), symmetric.

    Raises:
        ValueError: n is no power of two.
    """
    return np.asarray(_transform(np.eye(n), n), np.float64)


def _floats(x: npt.ArrayLike) -> Array:
    values = np.asarray(x)
    return values if values.dtype == np.float64 else values.astype(np.float32)


def _transform(x: Array, group: int | None) -> Array:
    n = x.shape[-1] if x.ndim else 0
    size = n & -n if group is None else group
    if size < 1 or size & (size - 1) or not n or n % size:
        raise ValueError(f"groups of {size} values can't be rotated in rows of shape {x.shape}")
    values = x.reshape(-1, size)
    width = 1
    while width < size:
        pairs = values.reshape(-1, size // (2 * width), 2, width)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        values = np.stack([first + second, first - second], axis=2)
        width *= 2
    return (values * values.dtype.type(1 / np.sqrt(size))).reshape(x.shape)
