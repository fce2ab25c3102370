"""The rotation that goes into weights. llama.cpp may rotate on top of it, and what is stored is well mixed all the same.

A cache rotates by the Walsh-Hadamard matrix H, which is its own inverse. Weights that have H in them would be rotated back by it. The
matrix here is another one: with H behind it, it spreads a channel as evenly as without. In groups of 4^k values it is H D H, where D are
signs whose Walsh spectrum is flat (a bent function: O. Rothaus, *On "bent" functions*, 1976). Then all its elements have one size, like
those of H D.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec.rotation import matrix

Matrix = npt.NDArray[np.float64]


def mixing(head_size: int) -> Matrix:
    """An orthonormal matrix for heads of this size, ``[to, from]``. It mixes groups: the largest power of two that divides the size.

    Raises:
        ValueError: no head.
    """
    if head_size < 1:
        raise ValueError(f"there is no head of {head_size} values")
    group = head_size & -head_size
    return np.asarray(np.kron(np.eye(head_size // group), _mixed(group)), np.float64)


def _mixed(n: int) -> Matrix:
    bits = n.bit_length() - 1
    if bits % 2:
        return np.asarray(np.kron(matrix(2), _mixed(n // 2)), np.float64)
    return matrix(n) @ (_bent(bits)[:, None] * matrix(n))


def _bent(bits: int) -> npt.NDArray[np.float64]:
    """Signs of the numbers below 2^bits: by the products of the bits of their two halves."""
    number = np.arange(1 << bits)
    half = bits // 2
    return np.array([-1.0 if int(x & (x >> half) & ((1 << half) - 1)).bit_count() % 2 else 1.0 for x in number])
