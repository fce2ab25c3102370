"""The one list of turbo types, with the constants of their formats; ``codegen`` writes all lists in C from here.

A type is a row: :class:`ScalarType` or :class:`TrellisType`. :data:`ALL` has them by ascending id. Kernels, tests, benchmarks and
the driver take their lists from here, directly or through ``ggml-turbo-list.h``; this module imports nothing slow.

A value of a scalar type decodes to ``d * codebook[index]``: ``d`` is the fp16 scale of its block and the codebook holds small
integers, the same ones for float decoding, integer dot products and GPU kernels. They are the Lloyd-Max levels of N(0, 1) times
``int_scale``, rounded; ``int_scale`` is chosen so that rounding costs less than 0.1 % of the squared error
(``docs/design/0001-scalar-formats.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from itertools import pairwise
from math import floor
from typing import ClassVar, TypeAlias

QK_SCALAR = 32
"""Values per block."""

T_MAX = 8191
"""The encoder turns |x| / max|x| into integers from 0 to this: 32 squares of it just fit in an int32."""

AMAX_MIN_EXP = -40
"""A block whose largest magnitude is below 2**AMAX_MIN_EXP is stored as zeros: its scale would round to 0 in fp16."""

HALF_MAX = 65504.0
"""Largest finite fp16 number: scales are clamped to it."""

HALF_NAN = 0x7E00
"""Scale of a block that contains a NaN."""

FLT_MAX_BITS, INFINITY_BITS = 0x7F7FFFFF, 0x7F800000
"""Bits of the largest finite binary32 number, which stands for infinity in all encoders, and of infinity: those of a NaN are above."""


class Scale(IntEnum):
    """How the encoder chooses ``d`` for a block ``x`` with levels ``c``; values as in ``enum ggml_turbo_scale``."""

    LEAST_SQUARES = 0
    """<x,c> / |c|^2: smallest squared error."""
    MATCHED_NORM = 1
    """|x| / |c|: decoded blocks keep their norm."""
    INNER_PRODUCT = 2
    """|x|^2 / <x,c>: <x, decoded x> is |x|^2, so that scores are unbiased."""


SCALES: dict[str, Scale] = {"ls": Scale.LEAST_SQUARES, "matched": Scale.MATCHED_NORM, "ip": Scale.INNER_PRODUCT}
"""By the words of ``GGML_TURBO_SCALE``."""


@dataclass(frozen=True)
class ScalarType:
    """One cache type of the scalar family: an fp16 scale, and for each of 32 values an index into one codebook."""

    family: ClassVar[str] = "scalar"
    block: ClassVar[int] = QK_SCALAR
    """Values of a block."""

    type_id: int
    """``GGML_TYPE_TURBO*_0``: it stands in state and slot files, so it never changes."""
    bits: int
    levels: tuple[float, ...]
    """Positive Lloyd-Max levels of N(0, 1), ascending; the negative ones mirror them."""
    magnitudes: tuple[int, ...]
    """Positive half of the codebook, ascending: ``levels * int_scale`` rounded."""
    int_scale: float
    """Codebook units per standard deviation."""
    ratios: tuple[float, ...]
    """Scale search: where the outermost level is put, as a multiple of max|x| of the block; tried in this order."""
    plain_ratio: float
    """The same without a search: the best single ratio for N(0, 1)."""
    lloyd_max_error: float
    """Squared error of ``levels`` on N(0, 1)."""
    block_error: float
    """Relative squared error of blocks of N(0, 1) data, with scale search, least squares, and the fp16 scale."""

    @property
    def name(self) -> str:
        """Name on the command line of llama.cpp, such as ``turbo3``."""
        return f"turbo{self.bits}"

    @property
    def c_name(self) -> str:
        """Name in C, as in ``block_turbo3_0`` and ``dequantize_row_turbo3_0``."""
        return f"turbo{self.bits}_0"

    @property
    def enum(self) -> str:
        """Name in ``enum ggml_type`` and of constants in C, such as ``TURBO3_0``."""
        return self.c_name.upper()

    @property
    def block_bytes(self) -> int:
        """Size of ``block_turbo*_0``: an fp16 scale and ``bits`` bits for each of 32 values."""
        return 2 + QK_SCALAR * self.bits // 8

    @property
    def codebook(self) -> tuple[int, ...]:
        """All levels, ascending: index 0 is the most negative, so the high index bit is the sign."""
        return tuple(-m for m in reversed(self.magnitudes)) + self.magnitudes

    @property
    def thresholds(self) -> tuple[tuple[int, ...], ...]:
        """For each ratio: the magnitude index of a value is the number of these that its integer (see ``T_MAX``) exceeds."""
        return tuple(self._thresholds(ratio) for ratio in self.ratios)

    @property
    def plain_thresholds(self) -> tuple[int, ...]:
        """Thresholds without a scale search."""
        return self._thresholds(self.plain_ratio)

    @property
    def decays(self) -> bool:
        """Whether decay can take a bit off stored blocks: one bit for the magnitude must be left."""
        return self.bits > 2

    def _thresholds(self, ratio: float) -> tuple[int, ...]:
        step = Fraction(str(ratio)) * T_MAX / self.magnitudes[-1]
        return tuple(floor(step * (a + b) / 2) for a, b in pairwise(self.magnitudes))


TURBO2 = ScalarType(
    type_id=64,
    bits=2,
    levels=(0.452780, 1.510418),
    magnitudes=(3, 10),
    int_scale=6.62,
    ratios=(0.50, 0.60, 0.70, 0.80),
    plain_ratio=0.65,
    lloyd_max_error=0.117482,
    block_error=0.1053,
)
TURBO3 = ScalarType(
    type_id=65,
    bits=3,
    levels=(0.245094, 0.756005, 1.343909, 2.151946),
    magnitudes=(10, 31, 55, 88),
    int_scale=40.91,
    ratios=(0.75, 0.83, 0.92, 1.00),
    plain_ratio=0.90,
    lloyd_max_error=0.034548,
    block_error=0.0257,
)
TURBO4 = ScalarType(
    type_id=66,
    bits=4,
    levels=(0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
    magnitudes=(5, 15, 25, 36, 48, 62, 79, 104),
    int_scale=38.14,
    ratios=(0.90, 0.95, 0.99, 1.04),
    plain_ratio=0.95,
    lloyd_max_error=0.009501,
    block_error=0.0058,
)

SCALAR = (TURBO2, TURBO3, TURBO4)


# --- trellis types --------------------------------------------------------------------------------------------------------

QK_TRELLIS = 64
"""Values per block: stations of its path."""

SEGMENT = 8
"""Stations that share one of the two codebooks."""

N_STATES = 8
"""States of the trellis: the three coded bits before a station."""

LEVEL_STEPS = 64
"""Codebooks hold levels in this part of ``d``."""

N_SCALES = 5
"""Neighbouring scales that the encoder tries."""

SCALE_MIN, SCALE_MAX, SCALE_NAN = 0x08, 0xF7, 0xFF
"""Smallest and largest scale that the encoder writes, upper bytes of normal fp16 numbers, and the one of a block with a NaN."""

TRELLIS_AMAX_MIN_EXP = -18
"""A block whose largest magnitude is below 2**TRELLIS_AMAX_MIN_EXP is stored as zeros: no level of the smallest scale is as small."""

RMS_MAX = 4095
"""For the rms, |x| / max|x| becomes integers up to this: 64 squares of it fit in an int32."""

X_MAX = 1023
"""For the path, values become integers up to this, in parts of a level step."""

DISTANCE_MAX = 255
"""Distances to levels are cut at this, so that their squares fit in 16 bits."""

COST_MAX = 5000
"""What a branch costs more than the cheapest one of its station is cut at this, so that sums over a segment fit in 16 bits."""

X_END = 512
"""From here on costs no longer depend on how large a value is: encoders with tables cut values to -X_END .. X_END - 1."""

CODE_BIAS = (127 - 15) << 3
"""The upper bits of a binary32 number, shifted down to 3 bits of mantissa, less this are those of the fp16 number: a scale's byte."""

AMAX_PART = 4
"""Where the largest magnitude of a block is more than this times its rms, a spike, it decides about the scales that are tried."""


def subset(state: int, bit: int) -> int:
    """Which fourth of the levels a coded bit selects after the three of ``state``, the newest lowest: level index modulo 4."""
    path = state << 1 | bit
    return 2 * ((path ^ path >> 1 ^ path >> 3) & 1) + (path >> 2 & 1)


@dataclass(frozen=True)
class TrellisType:
    """One cache type of the trellis family: 64 values are coded together, as a closed path."""

    family: ClassVar[str] = "trellis"
    block: ClassVar[int] = QK_TRELLIS
    """Values of a block."""
    decays: ClassVar[bool] = False
    """Whether decay can take a bit off stored blocks."""

    type_id: int
    """``GGML_TYPE_TURBO*_T``: it stands in state and slot files, so it never changes."""
    bits: int
    halves: tuple[tuple[int, ...], tuple[int, ...]]
    """Positive levels of the fine and the coarse codebook, ascending, in units of d / LEVEL_STEPS; the negative ones mirror them."""
    reach: float
    """The first scale that the encoder tries, in units of the block's rms."""
    x_steps: int
    """Parts of a level step in which the encoder measures."""
    gain: float
    """What values are multiplied by before they are encoded: 1 / (1 - error), so that <x, decoded x> is |x|^2 on average."""
    block_error: float
    """Relative squared error of blocks of N(0, 1) data."""

    @property
    def name(self) -> str:
        """Name on the command line of llama.cpp, such as ``turbo3t``."""
        return f"turbo{self.bits}t"

    @property
    def c_name(self) -> str:
        """Name in C, as in ``block_turbo3_t`` and ``dequantize_row_turbo3_t``."""
        return f"turbo{self.bits}_t"

    @property
    def enum(self) -> str:
        """Name in ``enum ggml_type`` and of constants in C, such as ``TURBO3_T``."""
        return self.c_name.upper()

    @property
    def block_bytes(self) -> int:
        """Size of ``block_turbo*_t``: a scale, eight choices of a codebook, and ``bits`` bits for each of 64 values."""
        return 2 + QK_TRELLIS * self.bits // 8

    @property
    def x_scale(self) -> float:
        """Integers of the encoder per d of a value."""
        return self.x_steps * LEVEL_STEPS * self.gain

    @property
    def codebooks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """All levels of both codebooks, ascending."""
        first, second = (tuple(-m for m in reversed(half)) + half for half in self.halves)
        return first, second


TURBO2T = TrellisType(
    type_id=67,
    bits=2,
    halves=((9, 27, 49, 81), (13, 37, 69, 127)),
    reach=0.98,
    x_steps=1,
    gain=1.072,
    block_error=0.0694,
)
TURBO3T = TrellisType(
    type_id=68,
    bits=3,
    halves=((4, 12, 21, 30, 40, 52, 68, 94), (5, 16, 27, 39, 53, 71, 89, 127)),
    reach=1.18,
    x_steps=2,
    gain=1.0165,
    block_error=0.0164,
)
TURBO4T = TrellisType(
    type_id=69,
    bits=4,
    halves=(
        (2, 5, 9, 12, 16, 19, 23, 27, 32, 36, 41, 47, 54, 62, 71, 93),
        (3, 7, 12, 17, 22, 27, 33, 39, 44, 50, 57, 66, 77, 85, 105, 127),
    ),
    reach=1.32,
    x_steps=2,
    gain=1.0041,
    block_error=0.0041,
)

TRELLIS = (TURBO2T, TURBO3T, TURBO4T)


# --- the list --------------------------------------------------------------------------------------------------------------

TurboType: TypeAlias = ScalarType | TrellisType

ALL: tuple[TurboType, ...] = tuple(sorted((*SCALAR, *TRELLIS), key=lambda t: t.type_id))
"""All turbo types, by ascending id."""

BY_NAME: dict[str, TurboType] = {t.name: t for t in ALL}

_OF_ONE_CACHE: tuple[tuple[TurboType, TurboType], ...] = ((TURBO4, TURBO3), (TURBO3T, TURBO4T), (TURBO4T, TURBO3T))
"""K and V of different types that are worth a kernel of their own."""

DECODE_PAIRS: tuple[tuple[str, str], ...] = (
    ("f16", "f16"),
    *(("f16", v.name) for v in ALL),
    ("q8_0", "q8_0"),
    *(("q8_0", v.name) for v in SCALAR),
    *((k.name, v.name) for k in ALL for v in ALL if k is v or (k, v) in _OF_ONE_CACHE),
)
"""Types of K and V for which GPU backends compile decode attention by default, grouped by K: 8 instances of a kernel and more for each."""

HEAD_SIZES: tuple[tuple[int, int], ...] = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512), (576, 512))
"""Head sizes of K and V that attention on a GPU is compiled for."""


def enum_of(name: str) -> str:
    """Name in ``enum ggml_type`` of a type of ours or of upstream, such as ``Q8_0`` for ``q8_0``."""
    return BY_NAME[name].enum if name in BY_NAME else name.upper()
