"""Numpy packing, unpacking and decay of the scalar types: equal to the C reference (``turbo/scalar.c``) bit for bit.

Rows are the last axis; every row is a whole number of blocks of 32 values. Packed rows are uint8 arrays in the layout that
``turbo/scalar.h`` draws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec.tables import AMAX_MIN_EXP, HALF_MAX, HALF_NAN, QK_SCALAR, T_MAX, ScalarType, Scale

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_FLT_MAX = np.finfo(np.float32).max
_AMAX_MIN = np.float32(2.0**AMAX_MIN_EXP)
_F32_T_MAX = np.float32(T_MAX)


def quantize(t: ScalarType, x: npt.ArrayLike, *, scale: Scale = Scale.LEAST_SQUARES, search: bool = True) -> Bytes:
    """Encode rows.

    Args:
        t: the type.
        x: numbers, shape (..., n) with n a multiple of 32; converted to binary32.
        scale: rule for ``d``.
        search: try several steps per block and keep the best; False takes one fixed step.

    Returns:
        uint8, shape (..., n / 32 * t.block_bytes).
    """
    rows = np.asarray(x, dtype=np.float32)
    if rows.ndim == 0 or rows.shape[-1] % QK_SCALAR:
        raise ValueError(f"rows of shape {rows.shape} are no whole number of blocks of {QK_SCALAR}")
    blocks = rows.reshape(-1, QK_SCALAR)
    index, d = _encode(t, blocks, scale, search)
    return _join(t, d, index).reshape(*rows.shape[:-1], rows.shape[-1] // QK_SCALAR * t.block_bytes)


def dequantize(t: ScalarType, packed: Bytes) -> Floats:
    """Decode rows of shape (..., bytes) to binary32 of shape (..., values)."""
    blocks = np.ascontiguousarray(packed).reshape(-1, t.block_bytes)
    d = _scales(blocks).astype(np.float32)
    levels = np.array(t.codebook, dtype=np.float32)[_unpack(t, blocks[:, 2:])]
    with np.errstate(invalid="ignore"):  # NaN scales
        return (d * levels).reshape(*packed.shape[:-1], packed.shape[-1] // t.block_bytes * QK_SCALAR)


def decay(t: ScalarType, packed: Bytes, *, scale: Scale = Scale.LEAST_SQUARES) -> Bytes:
    """Take one bit off each index of stored rows, shape (..., bytes), and fit the scales anew; blocks that are not finite stay.

    Raises:
        ValueError: the type does not decay.
    """
    if not t.decays:
        raise ValueError(f"{t.name} does not decay")
    out = np.array(packed).reshape(-1, t.block_bytes)
    finite = np.isfinite(_scales(out)[:, 0])
    blocks = out[finite]
    index = _unpack(t, blocks[:, 2:])
    kept = index & np.uint8(0xFE) | index >> np.uint8(t.bits - 1)
    levels = np.array(t.codebook)
    old, new = levels[index], levels[kept]
    tt, tc, cc = ((a * b).sum(axis=1, keepdims=True) for a, b in ((old, old), (old, new), (new, new)))
    d = _scale_in_units(scale, tc.astype(np.float32), cc.astype(np.float32), tt) * _scales(blocks).astype(np.float32)
    out[finite] = _join(t, np.minimum(d, np.float32(HALF_MAX)).astype(np.float16), kept)
    return out.reshape(packed.shape)


def _encode(t: ScalarType, x: Floats, scale: Scale, search: bool) -> tuple[Bytes, npt.NDArray[np.float16]]:
    """Return the index of each value, shape (blocks, 32), and d of each block as fp16, shape (blocks, 1)."""
    magnitude = np.minimum(np.abs(x), _FLT_MAX)  # minimum() keeps NaN
    amax = magnitude.max(axis=1, keepdims=True)
    is_nan = np.isnan(amax)
    usable = ~is_nan & (amax >= _AMAX_MIN)
    amax = np.where(usable, amax, np.float32(1))
    values = np.rint(np.where(usable, magnitude, 0) * (_F32_T_MAX / amax)).astype(np.int64)

    m, tc, cc = _choose_step(t, values, search)
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks that are not usable
        d = _scale_in_units(scale, tc, cc, (values * values).sum(axis=1, keepdims=True)) * (amax / _F32_T_MAX)
    half = np.where(usable, np.minimum(d, np.float32(HALF_MAX)), 0).astype(np.float16)

    n = len(t.magnitudes)
    index = np.where(np.signbit(x), n - 1 - m, n + m)
    index = np.where(half == 0, 0, index).astype(np.uint8)
    half = np.where(is_nan, np.uint16(HALF_NAN).view(np.float16), half)
    return index, half


def _choose_step(t: ScalarType, values: Ints, search: bool) -> tuple[Ints, Floats, Floats]:
    """Try each row of thresholds: return magnitude indices, <t,c> and |c|^2 of the best; the first of equals wins."""
    magnitudes = np.array(t.magnitudes)
    best: tuple[Ints, Floats, Floats, Floats] | None = None
    for thresholds in t.thresholds if search else (t.plain_thresholds,):
        m = np.searchsorted(np.array(thresholds), values, side="left")  # number of thresholds below the value
        c = magnitudes[m]
        tc = (values * c).sum(axis=1, keepdims=True).astype(np.float32)
        cc = (c * c).sum(axis=1, keepdims=True).astype(np.float32)
        tried = (m, tc, cc, tc * tc / cc)
        if best is None:
            best = tried
        else:
            better = tried[3] > best[3]
            best = (
                np.where(better, tried[0], best[0]),
                np.where(better, tried[1], best[1]),
                np.where(better, tried[2], best[2]),
                np.where(better, tried[3], best[3]),
            )
    assert best is not None
    return best[:3]


def _scale_in_units(scale: Scale, tc: Floats, cc: Floats, tt: Ints) -> Floats:
    squares = tt.astype(np.float32)
    ratio: Floats = {
        Scale.LEAST_SQUARES: tc / cc,
        Scale.MATCHED_NORM: np.sqrt(squares / cc),
        Scale.INNER_PRODUCT: squares / tc,
    }[scale]
    return ratio


def _scales(blocks: Bytes) -> npt.NDArray[np.float16]:
    """``d`` of each block, shape (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, :2]).view("<f2")


def _join(t: ScalarType, d: npt.NDArray[np.float16], index: Bytes) -> Bytes:
    """Blocks of scales, shape (blocks, 1), and indices, shape (blocks, 32)."""
    return np.concatenate([d.astype("<f2").view(np.uint8).reshape(-1, 2), _pack(t, index)], axis=1)


def _pack(t: ScalarType, index: Bytes) -> Bytes:
    """Pack indices of shape (blocks, 32) into the bytes after ``d``."""
    if t.bits == 4:
        nibbles: Bytes = index[:, :16] | index[:, 16:] << np.uint8(4)
        return nibbles
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)
    qs: Bytes = np.bitwise_or.reduce((index & np.uint8(3)).reshape(-1, 4, 8) << shifts, axis=1)
    if t.bits == 2:
        return qs
    high = (index >> np.uint8(2)).reshape(-1, 8, 4)  # value i: bit i / 4 of byte i % 4
    return np.concatenate([qs, np.packbits(high, axis=1, bitorder="little")[:, 0]], axis=1)


def _unpack(t: ScalarType, body: Bytes) -> Bytes:
    """Undo :func:`_pack`."""
    if t.bits == 4:
        return np.concatenate([body & np.uint8(15), body >> np.uint8(4)], axis=1)
    low = np.concatenate([body[:, :8] >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=1)
    if t.bits == 2:
        return low
    high = np.unpackbits(body[:, None, 8:], axis=1, bitorder="little").reshape(-1, QK_SCALAR)
    index: Bytes = low | high << np.uint8(2)
    return index
