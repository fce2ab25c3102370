"""Every encoder stores the same bits: numpy, the C reference, and the CPU backend's, however they were compiled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from codec_cases import adversarial_blocks, each_scale, each_search, each_type, each_variant, gaussian_blocks, load, random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from turbo_gguf.codec import scalar
from turbo_gguf.codec.tables import QK_SCALAR, SCALAR, ScalarType, Scale

GOLDEN = Path(__file__).parent.parent / "data" / "codec" / "golden.json"


def mixed_blocks() -> np.ndarray:
    laplace = np.random.default_rng(5).laplace(size=(1000, QK_SCALAR)).astype(np.float32)
    return np.concatenate([adversarial_blocks(), random_blocks(2000), gaussian_blocks(2000), laplace])


@each_variant
@each_type
@each_scale
@each_search
def test_numpy_encodes_like_c(variant: str, t: ScalarType, scale: Scale, search: bool) -> None:
    x = mixed_blocks()
    ours = scalar.quantize(t, x, scale=scale, search=search)
    theirs = load(variant).quantize(t, x, scale=scale, search=search)
    wrong = np.flatnonzero((ours != theirs).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} blocks differ, the first is {x[wrong[0]]!r}"


@each_variant
@each_type
@each_scale
def test_the_cpu_encoder_is_the_reference(variant: str, t: ScalarType, scale: Scale) -> None:
    o = load(variant)
    before, o.scale = o.scale, scale
    try:
        for x in (mixed_blocks(), gaussian_blocks(32).reshape(4, 256)):
            expected = o.quantize(t, x, scale=scale)
            assert np.array_equal(o.quantize_cpu(t, x), expected)
            assert np.array_equal(o.quantize_ref(t, x), expected)
    finally:
        o.scale = before


@each_variant
@each_type
def test_numpy_decodes_like_c(variant: str, t: ScalarType) -> None:
    """On random bytes: negative, denormal, infinite and NaN scales too."""
    packed = np.random.default_rng(11).integers(0, 256, (4000, t.block_bytes), dtype=np.uint8)
    ours, theirs = scalar.dequantize(t, packed), load(variant).dequantize(t, packed)
    nan = np.isnan(ours)
    assert np.array_equal(nan, np.isnan(theirs))
    assert np.array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@each_type
def test_rows_are_independent_blocks(t: ScalarType) -> None:
    x = gaussian_blocks(12)
    packed = scalar.quantize(t, x)
    assert np.array_equal(packed.ravel(), scalar.quantize(t, x.reshape(3, 128)).ravel())
    assert np.array_equal(packed.ravel(), load("portable").quantize(t, x.reshape(2, 2, 96)).ravel())


@given(
    bits=st.sampled_from([2, 3, 4]),
    scale=st.sampled_from(list(Scale)),
    search=st.booleans(),
    x=hnp.arrays(np.float32, (2, QK_SCALAR), elements=st.floats(width=32), fill=st.floats(width=32)),
)
@settings(max_examples=300, deadline=None)
def test_numpy_encodes_like_c_on_anything(bits: int, scale: Scale, search: bool, x: np.ndarray) -> None:
    t = next(t for t in SCALAR if t.bits == bits)
    packed = scalar.quantize(t, x, scale=scale, search=search)
    o = load("native")
    assert np.array_equal(packed, o.quantize(t, x, scale=scale, search=search))
    assert np.array_equal(scalar.dequantize(t, packed), o.dequantize(t, packed), equal_nan=True)


@pytest.mark.parametrize("codec", ["numpy", "c"])
def test_golden_vectors(codec: str) -> None:
    """Bytes written once: a difference is a changed format, which needs a new type name."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    x = np.frombuffer(bytes.fromhex("".join(golden["x"])), dtype="<f4").reshape(-1, QK_SCALAR)
    quantize = scalar.quantize if codec == "numpy" else load("portable").quantize
    seen = 0
    for case in golden["cases"]:
        t, scale = next(t for t in SCALAR if t.bits == case["bits"]), Scale[case["scale"]]
        packed = quantize(t, x, scale=scale, search=case["search"])
        assert [row.tobytes().hex() for row in packed] == case["blocks"], case
        seen += 1
    assert seen == len(SCALAR) * len(Scale) * 2


@each_type
@pytest.mark.parametrize("shape", [(), (31,), (2, 33)])
def test_rows_that_cannot_be_cut_into_blocks_are_refused(t: ScalarType, shape: tuple[int, ...]) -> None:
    for quantize in (scalar.quantize, load("portable").quantize):
        with pytest.raises(ValueError, match="whole number of blocks"):
            quantize(t, np.ones(shape, dtype=np.float32))
