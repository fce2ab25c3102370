"""turbo/scalar.cuh, run lane by lane on the CPU, stores and unpacks the same bits as the C reference."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from lanes_tools import CUDA, Device, each_device, load

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import QK_SCALAR, SCALAR, ScalarType, Scale

sys.path.append(str(Path(__file__).resolve().parents[2] / "codec"))
from codec_cases import adversarial_blocks, gaussian_blocks, random_blocks

each_type = pytest.mark.parametrize("t", SCALAR, ids=lambda t: t.name)
each_scale = pytest.mark.parametrize("scale", Scale, ids=lambda s: s.name.lower())


def heavy_tailed_blocks(count: int) -> np.ndarray:
    return np.random.default_rng(5).standard_t(1.5, (count, QK_SCALAR)).astype(np.float32)


def all_blocks(count: int) -> np.ndarray:
    return np.concatenate([adversarial_blocks(), gaussian_blocks(count), heavy_tailed_blocks(count), random_blocks(count)])


def encode(device: Device, t: ScalarType, x: np.ndarray, scale: Scale) -> np.ndarray:
    packed = np.full((len(x), t.block_bytes), 0xA5, dtype=np.uint8)
    load("codec.cpp", device).call("lanes_encode", t.type_id, x, packed, int(scale), len(x))
    return packed


@each_device
@each_type
@each_scale
def test_encoder_stores_the_bits_of_the_reference(device: Device, t: ScalarType, scale: Scale) -> None:
    x = all_blocks(1500)
    expected = oracle.load().quantize(t, x, scale=scale)
    wrong = np.flatnonzero((encode(device, t, x, scale) != expected).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} of {len(x)} blocks differ, the first is {x[wrong[0]]}"


@each_type
def test_encoder_stores_the_bits_of_the_reference_for_many_blocks(t: ScalarType) -> None:
    x = all_blocks(10_000)
    assert np.array_equal(encode(CUDA, t, x, Scale.MATCHED_NORM), oracle.load().quantize(t, x, scale=Scale.MATCHED_NORM))


@each_type
def test_encoder_does_not_depend_on_which_thread_goes_first(t: ScalarType) -> None:
    x = all_blocks(50)
    forward = encode(CUDA, t, x, Scale.MATCHED_NORM)
    library = load("codec.cpp", CUDA)
    library.set_descending(True)
    try:
        assert np.array_equal(encode(CUDA, t, x, Scale.MATCHED_NORM), forward)
    finally:
        library.set_descending(False)


@each_device
@each_type
@pytest.mark.parametrize("by_quarters", [False, True], ids=["block", "quarters"])
def test_unpacking_equals_the_reference_for_all_bit_patterns(device: Device, t: ScalarType, by_quarters: bool) -> None:
    packed = np.random.default_rng(2).integers(0, 256, (20_000, t.block_bytes), dtype=np.uint8)
    packed[:, 1] &= 0x7B  # a finite d
    values = np.empty((len(packed), QK_SCALAR), dtype=np.float32)
    load("codec.cpp", device).call("lanes_unpack", t.type_id, packed, values, len(packed), by_quarters)
    assert np.array_equal(values, oracle.load().dequantize(t, packed))
