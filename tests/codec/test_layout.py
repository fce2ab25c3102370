"""The bit order that turbo/scalar.h draws, on blocks made by hand. Sizes are static_asserts in the header."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from codec_cases import load

from turbo_gguf.codec import scalar
from turbo_gguf.codec.tables import TURBO2, TURBO3, TURBO4, ScalarType

ONE = [0x00, 0x3C]  # fp16 1.0, little endian
MINUS_TWO = [0x00, 0xC0]


@pytest.fixture(params=["numpy", "c"])
def decode(request: pytest.FixtureRequest) -> Callable[[ScalarType, list[int]], list[float]]:
    codec = scalar.dequantize if request.param == "numpy" else load("portable").dequantize
    return lambda t, block: codec(t, np.array(block, dtype=np.uint8)).tolist()


def test_turbo2(decode: Callable[[ScalarType, list[int]], list[float]]) -> None:
    # byte 0: index 3 for value 0, 2 for value 8, 1 for value 16, 0 for value 24; byte 7: the other way round
    values = decode(TURBO2, [*ONE, 0b00_01_10_11, 0, 0, 0, 0, 0, 0, 0b11_10_01_00])
    expected = [-10.0] * 32
    expected[0], expected[8], expected[16], expected[24] = 10, 3, -3, -10
    expected[7], expected[15], expected[23], expected[31] = -10, -3, 3, 10
    assert values == expected


def test_turbo3(decode: Callable[[ScalarType, list[int]], list[float]]) -> None:
    # signs: value 0 (byte 0, bit 0), value 24 (byte 0, bit 6), value 15 (byte 3, bit 3) and value 30 (byte 2, bit 7) are positive
    values = decode(TURBO3, [*ONE, 0b11_00_01_10, 0, 0, 0, 0, 0, 0, 0b00_00_11_01, 0b0100_0001, 0, 0b1000_0000, 0b0000_1000])
    expected = [-88.0] * 32
    expected[0] = 55  # index 2 + 4
    expected[8] = -55  # index 1
    expected[16] = -88  # index 0
    expected[24] = 88  # index 3 + 4
    expected[7] = -55  # index 1
    expected[15] = 88  # index 3 + 4
    expected[30] = 10  # index 0 + 4
    assert values == expected


def test_turbo3_signs_are_the_high_bit(decode: Callable[[ScalarType, list[int]], list[float]]) -> None:
    for byte in range(4):
        for bit in range(8):
            signs = [0, 0, 0, 0]
            signs[byte] = 1 << bit
            positive = [i for i, v in enumerate(decode(TURBO3, [*ONE, *[0] * 8, *signs])) if v > 0]
            assert positive == [byte + 4 * bit]


def test_turbo3_indices_four_at_a_time(decode: Callable[[ScalarType, list[int]], list[float]]) -> None:
    """The identity that SIMD and GPU decoders rest on: a shift and a mask bring the sign bits beside the low bits."""
    body = np.random.default_rng(12).integers(0, 256, 12, dtype=np.uint8)
    low, sign = body[:8].view("<u4"), body[8:].view("<u4")[0]
    values = decode(TURBO3, [*ONE, *body.tolist()])
    for p in range(4):
        for h in range(2):
            four = low[h] >> (2 * p) & 0x03030303 | (sign >> (2 * p + h) & 0x01010101) << 2
            indices = [int(four) >> 8 * k & 0xFF for k in range(4)]
            assert values[8 * p + 4 * h :][:4] == [TURBO3.codebook[i] for i in indices]


def test_turbo4(decode: Callable[[ScalarType, list[int]], list[float]]) -> None:
    # byte 0: index 15 for value 0, 8 for value 16; byte 15: index 7 for value 15, 1 for value 31
    values = decode(TURBO4, [*MINUS_TWO, 0x8F, *[0] * 14, 0x17])
    expected = [208.0] * 32
    expected[0], expected[16], expected[15], expected[31] = -208, -10, 10, 158
    assert values == expected


@pytest.mark.parametrize("t", [TURBO2, TURBO3, TURBO4], ids=lambda t: t.name)
def test_a_cleared_cache_decodes_to_zeros(decode: Callable[[ScalarType, list[int]], list[float]], t: ScalarType) -> None:
    assert not any(decode(t, [0] * t.block_bytes))


@pytest.mark.parametrize("t", [TURBO2, TURBO3, TURBO4], ids=lambda t: t.name)
def test_each_value_has_its_place(t: ScalarType) -> None:
    """Encode a row that stands out in one value: only that value changes."""
    base = np.tile(np.array([1, -1], dtype=np.float32), 16)
    for i in range(32):
        x = base.copy()
        x[i] *= -1
        decoded = scalar.dequantize(t, load("portable").quantize(t, x))
        assert np.array_equal(np.sign(decoded), np.sign(x))
