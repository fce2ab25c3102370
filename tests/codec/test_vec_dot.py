"""Integer dot products with Q8_0: against binary64, between implementations, and with the expected one active."""

from __future__ import annotations

import platform

import numpy as np
import pytest
from codec_cases import HAS_AVX2, X86, each_type, each_variant, gaussian_blocks, load, needs_avx2

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import QK_SCALAR, TURBO3, ScalarType

HEAD_SIZES = (32, 64, 96, 128, 160, 192, 256, 576)


def activations(blocks: int, seed: int = 2) -> np.ndarray:
    """Q8_0 blocks with all levels that ggml's encoders write (-127 to 127), the extremes among them."""
    rng = np.random.default_rng(seed)
    y = np.zeros(blocks, dtype=oracle.Q8_0)
    y["d"] = rng.uniform(0.001, 0.1, blocks)
    y["qs"] = rng.integers(-127, 128, (blocks, QK_SCALAR))
    y["qs"][::5] = rng.choice([-127, 127], (len(y["qs"][::5]), QK_SCALAR))
    return y


def expected_dot(variant: str, t: ScalarType, packed: np.ndarray, y: np.ndarray) -> float:
    x = load(variant).dequantize(t, packed).astype(np.float64)
    return float(x @ (y["d"].astype(np.float64)[:, None] * y["qs"]).ravel())


@each_variant
def test_the_expected_implementation_is_active(variant: str) -> None:
    if not X86:
        assert load(variant).isa == ("neon" if platform.machine() in ("aarch64", "arm64") else "generic")
    else:
        assert load(variant).isa == ("avx2" if variant == "avx2" or (variant == "native" and HAS_AVX2) else "generic")


@each_variant
@each_type
@pytest.mark.parametrize("n", HEAD_SIZES)
def test_dot_product_is_that_of_the_decoded_row(variant: str, t: ScalarType, n: int) -> None:
    blocks = n // QK_SCALAR
    o = load(variant)
    for seed in range(5):
        packed = o.quantize(t, gaussian_blocks(blocks, seed)).ravel()
        y = activations(blocks, seed)
        exact = expected_dot(variant, t, packed, y)
        assert o.vec_dot(t, packed, y) == np.float32(exact)  # exact products, binary64 sums, one rounding


@needs_avx2
@each_type
def test_implementations_return_the_same_bits(t: ScalarType) -> None:
    rng = np.random.default_rng(4)
    for blocks in range(1, 20):
        packed = rng.integers(0, 256, (blocks, t.block_bytes), dtype=np.uint8)
        packed[:, 1] &= 0x3F  # finite, positive scales of any size
        y = activations(blocks, blocks)
        results = {variant: load(variant).vec_dot(t, packed, y) for variant in ("portable", "native", "avx2")}
        assert len(set(results.values())) == 1, results


@each_variant
@each_type
def test_the_largest_sums_do_not_saturate(variant: str, t: ScalarType) -> None:
    o = load(variant)
    y = np.zeros(4, dtype=oracle.Q8_0)
    y["d"], y["qs"] = 1.0, 127
    x = np.ones(4 * QK_SCALAR, dtype=np.float32)
    packed = o.quantize(t, x).reshape(4, -1)
    packed[:, 2:] = 0xFF  # the largest level everywhere
    packed[:, :2] = np.array([1.0], dtype="<f2").view(np.uint8)
    assert o.vec_dot(t, packed, y) == 4 * QK_SCALAR * 127 * max(t.codebook)
    y["qs"] = -127
    assert o.vec_dot(t, packed, y) == -4 * QK_SCALAR * 127 * max(t.codebook)
    packed[:, 2:] = 0
    assert o.vec_dot(t, packed, y) == 4 * QK_SCALAR * 127 * max(t.codebook)


@each_variant
@each_type
def test_a_row_of_no_blocks_is_zero(variant: str, t: ScalarType) -> None:
    assert load(variant).vec_dot(t, np.zeros(0, dtype=np.uint8), activations(0)) == 0


@each_variant
@each_type
def test_a_nan_scale_is_not_hidden(variant: str, t: ScalarType) -> None:
    x = gaussian_blocks(5)
    x[2, 3] = np.nan
    o = load(variant)
    assert np.isnan(o.vec_dot(t, o.quantize(t, x), activations(5)))


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="turbo3"):
        load("portable").vec_dot(TURBO3, np.zeros(14, dtype=np.uint8), activations(2))
