"""Rows to blocks of a cache type and back, with any of the three scale rules.

One door to both families. The bytes are those that llama.cpp stores: :mod:`~turbo_gguf.codec.scalar` and
:mod:`~turbo_gguf.codec.trellis` are equal to the C reference bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec import scalar, tables, trellis
from turbo_gguf.codec.tables import ScalarType, Scale, TrellisType, TurboType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def turbo_type(t: TurboType | str) -> TurboType:
    """A type by the name that ``-ctk`` takes.

    Raises:
        ValueError: no such type.
    """
    if not isinstance(t, str):
        return t
    if t not in tables.BY_NAME:
        raise ValueError(f"{t!r} is no turbo type; known: {', '.join(tables.BY_NAME)}")
    return tables.BY_NAME[t]


def default_scale(t: TurboType | str) -> Scale:
    """The rule by which llama.cpp stores a type, unless it is told another one: norms (scalar), inner products (trellis)."""
    return Scale.MATCHED_NORM if isinstance(turbo_type(t), ScalarType) else Scale.INNER_PRODUCT


def quantize(t: TurboType | str, x: npt.ArrayLike, *, scale: Scale | None = None) -> Bytes:
    """Encode rows.

    Args:
        t: a type, or its name.
        x: numbers, shape (..., n) with n a multiple of ``t.block``; converted to binary32. They are stored as they are: see
            :func:`turbo_gguf.codec.rotation.rotate`.
        scale: the rule; ``None``: :func:`default_scale`. llama.cpp knows only the default of a trellis type.

    Returns:
        uint8, shape (..., n / t.block * t.block_bytes). A block that contains a NaN is NaN as a whole. Infinity is stored as the largest
        finite number.

    Raises:
        ValueError: no such type, or rows that are no whole number of blocks.
    """
    found = turbo_type(t)
    rule = default_scale(found) if scale is None else scale
    if isinstance(found, ScalarType):
        return scalar.quantize(found, x, scale=rule)
    return trellis.quantize(replace(found, gain=_gain(found, rule)), x)


def dequantize(t: TurboType | str, packed: npt.ArrayLike) -> Floats:
    """Decode rows of shape (..., bytes) to binary32 of shape (..., values). The rule of their scale need not be known.

    Raises:
        ValueError: no such type, no bytes, or rows that are no whole number of blocks.
    """
    found, rows = turbo_type(t), np.asarray(packed)
    if rows.dtype != np.uint8 or rows.ndim == 0 or rows.shape[-1] % found.block_bytes:
        raise ValueError(f"{rows.dtype} rows of shape {rows.shape} are no blocks of {found.name}, {found.block_bytes} bytes each")
    return scalar.dequantize(found, rows) if isinstance(found, ScalarType) else trellis.dequantize(found, rows)


def round_trip(t: TurboType | str, x: npt.ArrayLike, *, scale: Scale | None = None) -> Floats:
    """What is read back of rows: :func:`dequantize` of :func:`quantize`, of the shape of ``x``."""
    return dequantize(t, quantize(t, x, scale=scale))


def _gain(t: TrellisType, scale: Scale) -> float:
    """What a trellis encoder multiplies values by. Decoded values are shorter than they were by 1 / ``t.gain``, as inner products say."""
    return {Scale.LEAST_SQUARES: 1.0, Scale.MATCHED_NORM: sqrt(t.gain), Scale.INNER_PRODUCT: t.gain}[scale]
