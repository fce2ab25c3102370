"""Numpy packing and unpacking of the trellis types: equal to the C reference (``turbo/trellis.c``) bit for bit.

Rows are the last axis; every row is a whole number of blocks of 64 values. Packed rows are uint8 arrays in the layout that
``turbo/trellis.h`` draws. All sums are of integers, so that "the same bits" depends on no compiler and no order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec.tables import (
    AMAX_PART,
    CODE_BIAS,
    COST_MAX,
    DISTANCE_MAX,
    LEVEL_STEPS,
    N_SCALES,
    N_STATES,
    QK_TRELLIS,
    RMS_MAX,
    SCALE_MAX,
    SCALE_MIN,
    SCALE_NAN,
    SEGMENT,
    TRELLIS_AMAX_MIN_EXP,
    X_MAX,
    TrellisType,
    subset,
)

Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

_FLT_MAX = np.finfo(np.float32).max
_CHUNK = 1000  # blocks that are searched together: 100 MB

_STATION = np.arange(QK_TRELLIS)
VALUE_AT = 32 * (_STATION // 32) + 4 * (_STATION % 8) + _STATION // 8 % 4
"""Index within its block of the value at each station of the path."""

_STATE = np.arange(N_STATES)
_BIT = _STATE & 1  # coded bit that leads into a state
_FROM = np.stack([_STATE >> 1, _STATE >> 1 | N_STATES >> 1])  # (2, states): the two states before it
_SUBSET = np.array([[subset(int(s), int(u)) for s, u in zip(states, _BIT, strict=True)] for states in _FROM])


def quantize(t: TrellisType, x: npt.ArrayLike) -> Bytes:
    """Encode rows.

    Args:
        t: the type.
        x: numbers, shape (..., n) with n a multiple of 64; converted to binary32.

    Returns:
        uint8, shape (..., n / 64 * t.block_bytes).
    """
    rows = np.asarray(x, dtype=np.float32)
    if rows.ndim == 0 or rows.shape[-1] % QK_TRELLIS:
        raise ValueError(f"rows of shape {rows.shape} are no whole number of blocks of {QK_TRELLIS}")
    blocks = rows.reshape(-1, QK_TRELLIS)
    packed = [_quantize_blocks(t, blocks[i : i + _CHUNK]) for i in range(0, len(blocks), _CHUNK)]
    shape = (*rows.shape[:-1], rows.shape[-1] // QK_TRELLIS * t.block_bytes)
    return np.concatenate(packed).reshape(shape) if packed else np.empty(shape, np.uint8)


def dequantize(t: TrellisType, packed: Bytes) -> Floats:
    """Decode rows of shape (..., bytes) to binary32 of shape (..., values)."""
    blocks = np.ascontiguousarray(packed).reshape(-1, t.block_bytes)
    selected, index = unpack(t, blocks)
    levels = np.array(t.codebooks, dtype=np.float32)[selected, index] / np.float32(LEVEL_STEPS)
    with np.errstate(invalid="ignore"):  # NaN scales
        return (scale_of(blocks[:, :1]) * levels).reshape(*packed.shape[:-1], packed.shape[-1] // t.block_bytes * QK_TRELLIS)


def scale_of(code: npt.NDArray[np.integer]) -> Floats:
    """The scale that a byte stands for: the upper eight bits of an fp16 number without its sign."""
    return (code.astype(np.uint16) << np.uint16(7)).view(np.float16).astype(np.float32)


def unpack(t: TrellisType, blocks: Bytes) -> tuple[Ints, Ints]:
    """Codebook (1: the coarse one) and level index of each value, both of shape (blocks, 64), from blocks of shape (blocks, bytes)."""
    bits = np.unpackbits(blocks[:, 2:10], axis=1, bitorder="little").astype(np.int32)
    state = sum(np.roll(bits, i + 1, axis=1) << i for i in range(N_STATES.bit_length() - 1))
    index = np.array([[subset(s, u) for u in (0, 1)] for s in range(N_STATES)], dtype=np.int32)[state, bits]
    shift = 2
    if t.bits >= 3:
        pairs = np.stack([blocks[:, 10:26] >> np.uint8(2 * i) & np.uint8(3) for i in range(4)], axis=2).astype(np.int32)
        # byte 8 * half + 4 * (j % 2) + b, field j / 2 -> station 32 * half + 8 * b + j
        index |= pairs.reshape(-1, 2, 2, 4, 4).transpose(0, 1, 3, 4, 2).reshape(-1, QK_TRELLIS) << shift
        shift += 2
    if t.bits != 3:
        index |= np.unpackbits(blocks[:, -8:], axis=1, bitorder="little").astype(np.int32) << shift
    selected = np.repeat(np.unpackbits(blocks[:, 1:2], axis=1, bitorder="little"), SEGMENT, axis=1).astype(np.int32)
    order = np.argsort(VALUE_AT)
    return selected[:, order], index[:, order]


def _pack(t: TrellisType, code: Ints, coarse: Bools, bits: Ints, index: Ints) -> Bytes:
    """Blocks of scale codes (blocks,), codebooks of segments (blocks, 8), and coded bits and level indices by station (blocks, 64)."""
    parts = [code.astype(np.uint8)[:, None], np.packbits(coarse, axis=1, bitorder="little")]
    parts.append(np.packbits(bits.astype(np.uint8), axis=1, bitorder="little"))
    plain = (index >> 2).astype(np.uint8)
    if t.bits >= 3:
        pairs = (plain & np.uint8(3)).reshape(-1, 2, 4, 4, 2).transpose(0, 1, 4, 2, 3)  # half, j % 2, b, j / 2
        shifts = np.array([0, 2, 4, 6], dtype=np.uint8)
        parts.append(np.bitwise_or.reduce(pairs << shifts, axis=4).reshape(-1, 16))
        plain = plain >> np.uint8(2)
    if t.bits != 3:
        parts.append(np.packbits(plain & np.uint8(1), axis=1, bitorder="little"))
    return np.concatenate(parts, axis=1)


def _quantize_blocks(t: TrellisType, x: Floats) -> Bytes:
    magnitude = np.minimum(np.abs(x), _FLT_MAX)  # minimum() keeps NaN
    amax = magnitude.max(axis=1)
    is_nan = np.isnan(amax)
    usable = ~is_nan & (amax >= np.float32(2.0**TRELLIS_AMAX_MIN_EXP))
    values = np.where(usable[:, None], np.copysign(magnitude, x), np.float32(1))[:, VALUE_AT]
    first = _first_code(t, values, np.where(usable, amax, np.float32(1)))

    best = np.full(len(x), np.inf, dtype=np.float32)
    found: Bytes = np.empty((len(x), t.block_bytes), dtype=np.uint8)
    for code in (first + i for i in range(N_SCALES)):
        d = scale_of(code)
        cost, coarse, bits, index = search(t, _integers(t, values, d))
        error = cost.astype(np.float32) * (d * d)
        better = error < best  # the first of equals wins
        best[better] = error[better]
        found[better] = _pack(t, code, coarse, bits, index)[better]
    found[~usable] = 0
    found[is_nan, 0] = SCALE_NAN
    return found


def _first_code(t: TrellisType, values: Floats, amax: Floats) -> Ints:
    """The smallest scale that the search tries, as its byte."""
    t0 = np.rint(np.abs(values) * (np.float32(RMS_MAX) / amax)[:, None]).astype(np.int32)
    squares = (t0 * t0).sum(axis=1, dtype=np.int32).astype(np.float32)
    rms = np.sqrt(squares / np.float32(QK_TRELLIS)) * (amax / np.float32(RMS_MAX))
    with np.errstate(over="ignore"):
        low = np.maximum(rms, amax / np.float32(AMAX_PART)) * np.float32(t.reach)
    code = (low.view(np.int32) >> 20) - CODE_BIAS  # fp32 to the upper bits of fp16, towards zero
    first: Ints = np.clip(code, SCALE_MIN, SCALE_MAX - N_SCALES + 1)
    return first


def _integers(t: TrellisType, values: Floats, d: Floats) -> Ints:
    """Values in parts of a level step."""
    with np.errstate(over="ignore"):
        scaled = values * (np.float32(t.x_scale) / d)[:, None]
    integers: Ints = np.rint(np.clip(scaled, -X_MAX, X_MAX)).astype(np.int32)
    return integers


def search(t: TrellisType, x: Ints) -> tuple[Ints, Bools, Ints, Ints]:
    """Find the cheapest closed path for each row of integers, shape (rows, stations), whole segments.

    The costs are squared distances, cut as :data:`~turbo_gguf.codec.tables.DISTANCE_MAX` and :data:`~turbo_gguf.codec.tables.COST_MAX` say.

    Returns:
        its cost (rows,), whether segments use the coarse codebook (rows, segments), coded bits and level indices (rows, stations).
    """
    n, length = x.shape
    # cost of the nearest level, and its index / 4: (codebooks, subsets, rows, stations)
    nearest = np.empty((2, 4, n, length), dtype=np.int32)
    plain = np.empty((2, 4, n, length), dtype=np.int32)
    for book, codebook in enumerate(t.codebooks):
        for s in range(4):
            distance = np.abs(x[..., None] - t.x_steps * np.array(codebook[s::4], dtype=np.int32))
            plain[book, s] = distance.argmin(axis=-1)
            nearest[book, s] = np.minimum(distance.min(axis=-1), DISTANCE_MAX) ** 2
    least = nearest.min(axis=(0, 1))
    nearest = np.minimum(nearest - least, COST_MAX)

    # a path for each first state (axis 1) and state so far (axis 2)
    start = np.arange(N_STATES)
    unreachable = np.int32(1 << 29)
    cost = np.broadcast_to(np.where(start[:, None] == start, np.int32(0), unreachable), (n, N_STATES, N_STATES))
    from_high = np.empty((2, length, n, N_STATES, N_STATES), dtype=np.bool_)
    coarse = np.empty((length // SEGMENT, n, N_STATES, N_STATES), dtype=np.bool_)
    for segment in range(len(coarse)):
        ends = []
        for book in range(2):
            m = cost
            for i in range(segment * SEGMENT, (segment + 1) * SEGMENT):
                branch = nearest[book, :, :, i].T[:, None, :]
                low = m[..., _FROM[0]] + branch[..., _SUBSET[0]]
                high = m[..., _FROM[1]] + branch[..., _SUBSET[1]]
                from_high[book, i] = high < low
                m = np.minimum(low, high)
            ends.append(m)
        coarse[segment] = ends[1] < ends[0]
        cost = np.minimum(*ends)

    closed = cost[:, start, start]
    first = closed.argmin(axis=1)
    row = np.arange(n)
    chosen = np.empty((n, len(coarse)), dtype=np.bool_)
    bits = np.empty((n, length), dtype=np.int32)
    index = np.empty((n, length), dtype=np.int32)
    state = first
    for segment in reversed(range(len(coarse))):
        chosen[:, segment] = coarse[segment, row, first, state]
        books = chosen[:, segment].astype(np.intp)
        for i in reversed(range(segment * SEGMENT, (segment + 1) * SEGMENT)):
            came = from_high[books, i, row, first, state].astype(np.intp)
            s = _SUBSET[came, state]
            bits[:, i] = _BIT[state]
            index[:, i] = 4 * plain[books, s, row, i] + s
            state = _FROM[came, state]
    return closed[row, first] + least.sum(axis=1, dtype=np.int32), chosen, bits, index
