"""The bit order that ggml-turbo.h draws, on blocks made by hand. Sizes are static_asserts in the header."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from codec_cases import load

from turbo_gguf.codec import reference
from turbo_gguf.codec.tables import TURBO2, TURBO3, TURBO4, TurboType

ONE = [0x00, 0x3C]  # fp16 1.0, little endian
MINUS_TWO = [0x00, 0xC0]


@pytest.fixture(params=["numpy", "c"])
def decode(request: pytest.FixtureRequest) -> Callable[[TurboType, list[int]], list[float]]:
    codec = reference.dequantize if request.param == "numpy" else load("portable").dequantize
    return lambda t, block: codec(t, np.array(block, dtype=np.uint8)).tolist()


def test_turbo2(decode: Callable[[TurboType, list[int]], list[float]]) -> None:
    # byte 0: index 3 for value 0, 2 for value 8, 1 for value 16, 0 for value 24; byte 7: the other way round
    values = decode(TURBO2, [*ONE, 0b00_01_10_11, 0, 0, 0, 0, 0, 0, 0b11_10_01_00])
    expected = [-10.0] * 32
    expected[0], expected[8], expected[16], expected[24] = 10, 3, -3, -10
    expected[7], expected[15], expected[23], expected[31] = -10, -3, 3, 10
    assert values == expected


def test_turbo3(decode: Callable[[TurboType, list[int]], list[float]]) -> None:
    # signs: value 0 (byte 0, bit 0), value 15 (byte 1, bit 7) and value 24 (byte 3, bit 0) are positive
    values = decode(TURBO3, [*ONE, 0b11_00_01_10, 0, 0, 0, 0, 0, 0, 0b00_00_11_01, 0b0000_0001, 0b1000_0000, 0, 0b0000_0001])
    expected = [-88.0] * 32
    expected[0] = 55  # index 2 + 4
    expected[8] = -55  # index 1
    expected[16] = -88  # index 0
    expected[24] = 88  # index 3 + 4
    expected[7] = -55  # index 1
    expected[15] = 88  # index 3 + 4
    assert values == expected


def test_turbo3_signs_are_the_high_bit(decode: Callable[[TurboType, list[int]], list[float]]) -> None:
    for i in range(32):
        signs = [0, 0, 0, 0]
        signs[i // 8] = 1 << i % 8
        assert [j for j, v in enumerate(decode(TURBO3, [*ONE, *[0] * 8, *signs])) if v > 0] == [i]


def test_turbo4(decode: Callable[[TurboType, list[int]], list[float]]) -> None:
    # byte 0: index 15 for value 0, 8 for value 16; byte 15: index 7 for value 15, 1 for value 31
    values = decode(TURBO4, [*MINUS_TWO, 0x8F, *[0] * 14, 0x17])
    expected = [208.0] * 32
    expected[0], expected[16], expected[15], expected[31] = -208, -10, 10, 158
    assert values == expected


@pytest.mark.parametrize("t", [TURBO2, TURBO3, TURBO4], ids=lambda t: t.name)
def test_a_cleared_cache_decodes_to_zeros(decode: Callable[[TurboType, list[int]], list[float]], t: TurboType) -> None:
    assert not any(decode(t, [0] * t.block_bytes))


@pytest.mark.parametrize("t", [TURBO2, TURBO3, TURBO4], ids=lambda t: t.name)
def test_each_value_has_its_place(t: TurboType) -> None:
    """Encode a row that stands out in one value: only that value changes."""
    base = np.tile(np.array([1, -1], dtype=np.float32), 16)
    for i in range(32):
        x = base.copy()
        x[i] *= -1
        decoded = reference.dequantize(t, load("portable").quantize(t, x))
        assert np.array_equal(np.sign(decoded), np.sign(x))
