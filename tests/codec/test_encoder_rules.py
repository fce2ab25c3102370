"""What the encoder promises for zeros, tiny and huge rows, NaN and infinity, and that it treats x and -x alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from codec_cases import FLT_MAX, VARIANTS, adversarial_blocks, each_scale, each_search, each_type, gaussian_blocks, load, random_blocks

from turbo_gguf.codec import oracle, scalar
from turbo_gguf.codec.tables import HALF_NAN, QK_SCALAR, SCALAR, ScalarType, Scale


def scales(t: ScalarType, packed: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(packed.reshape(-1, t.block_bytes)[:, :2]).view("<u2").ravel()


@each_type
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 9e-13, 1e-9])
def test_rows_too_small_for_a_scale_are_zero_bytes(t: ScalarType, value: float) -> None:
    packed = load("portable").quantize(t, np.full(QK_SCALAR, value, dtype=np.float32))
    assert not packed.any()
    assert not load("portable").dequantize(t, packed).any()


@each_type
@each_scale
@each_search
def test_finite_input_gives_finite_output(t: ScalarType, scale: Scale, search: bool) -> None:
    x = np.concatenate([adversarial_blocks(), random_blocks(4000)])
    x = x[np.isfinite(x).all(axis=1)]
    o = load("portable")
    packed = o.quantize(t, x, scale=scale, search=search)
    assert np.isfinite(o.dequantize(t, packed)).all()
    assert o.validate(t, packed)


@each_type
def test_a_nan_makes_its_block_nan_and_no_other(t: ScalarType) -> None:
    x = gaussian_blocks(3)
    x[1, 20] = np.nan
    o = load("portable")
    packed = o.quantize(t, x)
    assert scales(t, packed)[1] == HALF_NAN
    assert np.isnan(o.dequantize(t, packed)).all(axis=1).tolist() == [False, True, False]
    assert not o.validate(t, packed)


@each_type
def test_infinity_is_the_largest_number(t: ScalarType) -> None:
    x = gaussian_blocks(1)[0]
    infinite = np.where(np.arange(QK_SCALAR) == 4, -np.inf, x)
    o = load("portable")
    assert np.array_equal(o.quantize(t, infinite), o.quantize(t, np.where(np.arange(QK_SCALAR) == 4, -FLT_MAX, x)))


@each_type
def test_a_huge_row_gets_the_largest_scale(t: ScalarType) -> None:
    packed = load("portable").quantize(t, np.full(QK_SCALAR, FLT_MAX))
    assert scales(t, packed)[0] == 0x7BFF
    assert load("portable").dequantize(t, packed)[0] > 60000


@each_type
@each_scale
def test_the_encoder_is_odd(t: ScalarType, scale: Scale) -> None:
    x = np.concatenate([adversarial_blocks(), random_blocks(1000), gaussian_blocks(1000)])
    x = x[~np.isnan(x).any(axis=1)]
    o = load("portable")
    negated = o.dequantize(t, o.quantize(t, -x, scale=scale))
    assert np.array_equal(negated, -o.dequantize(t, o.quantize(t, x, scale=scale)))


@each_type
def test_small_rows_lose_what_the_fp16_scale_loses(t: ScalarType) -> None:
    """The scale is a multiple of 2^-24 there: at most 2^-25 per codebook unit on top of the codec's own error."""
    for factor in (1e-3, 1e-4, 1e-5, 1e-6):
        x = gaussian_blocks(200) * np.float32(factor)
        decoded = scalar.dequantize(t, scalar.quantize(t, x))
        coarse = np.linalg.norm(x - decoded, axis=1)
        exact = np.linalg.norm(x, axis=1) * np.sqrt(2 * t.block_error)
        assert np.all(coarse <= exact + 2.0**-25 * max(t.codebook) * np.sqrt(QK_SCALAR))


@each_type
def test_encoding_decoded_rows_again_changes_little(t: ScalarType) -> None:
    x = gaussian_blocks(1000)
    once = scalar.dequantize(t, scalar.quantize(t, x))
    twice = scalar.dequantize(t, scalar.quantize(t, once))
    assert ((twice - once) ** 2).sum() < 1e-3 * (once**2).sum()


def test_validation_reads_every_block() -> None:
    o = load("portable")
    for t in SCALAR:
        packed = o.quantize(t, gaussian_blocks(5)).reshape(5, -1)
        assert o.validate(t, packed)
        for bad in (0x7C00, 0xFC00, 0x7E00):
            broken = packed.copy()
            broken[4, :2] = np.array([bad], dtype="<u2").view(np.uint8)
            assert not o.validate(t, broken)
        assert not o.validate(t, packed.ravel()[:-1])


@pytest.fixture
def fresh(tmp_path: Path) -> oracle.Oracle:
    """A library that has not encoded anything yet."""
    return oracle.Oracle(Path(shutil.copy(oracle.build(VARIANTS["portable"]), tmp_path / "libfresh.so")))


@pytest.mark.parametrize(
    ("value", "scale"),
    [(None, Scale.MATCHED_NORM), ("ls", Scale.LEAST_SQUARES), ("matched", Scale.MATCHED_NORM), ("ip", Scale.INNER_PRODUCT)],
)
def test_the_environment_sets_the_scale_rule(
    fresh: oracle.Oracle, monkeypatch: pytest.MonkeyPatch, value: str | None, scale: Scale
) -> None:
    monkeypatch.delenv("GGML_TURBO_SCALE", raising=False)
    if value:
        monkeypatch.setenv("GGML_TURBO_SCALE", value)
    x = gaussian_blocks(16)
    for t in SCALAR:
        assert np.array_equal(fresh.quantize_ref(t, x), fresh.quantize(t, x, scale=scale))
    assert fresh.scale is scale


def test_an_unknown_scale_rule_is_reported(
    fresh: oracle.Oracle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GGML_TURBO_SCALE", "best")
    assert fresh.scale is Scale.MATCHED_NORM
    assert "GGML_TURBO_SCALE=best" in capfd.readouterr().err


def test_the_old_name_of_the_scale_rule_is_read_with_one_warning(
    fresh: oracle.Oracle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GGML_TURBO_SCALE", raising=False)
    monkeypatch.setenv("TURBO_SCALE", "ls")
    assert fresh.scale is fresh.scale is Scale.LEAST_SQUARES
    assert capfd.readouterr().err.count("TURBO_SCALE is now called GGML_TURBO_SCALE") == 1


def test_the_new_name_of_the_scale_rule_wins(
    fresh: oracle.Oracle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GGML_TURBO_SCALE", "ip")
    monkeypatch.setenv("TURBO_SCALE", "ls")
    assert fresh.scale is Scale.INNER_PRODUCT
    assert not capfd.readouterr().err


def test_setting_the_scale_rule_acts_on_the_next_row(fresh: oracle.Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that the first row freezes for the whole process has been a bug elsewhere."""
    monkeypatch.setenv("GGML_TURBO_SCALE", "ip")
    x = gaussian_blocks(16)
    t = SCALAR[0]
    fresh.quantize_ref(t, x)
    for scale in Scale:
        fresh.scale = scale
        assert np.array_equal(fresh.quantize_ref(t, x), fresh.quantize(t, x, scale=scale))
        assert np.array_equal(fresh.quantize_cpu(t, x), fresh.quantize(t, x, scale=scale))
