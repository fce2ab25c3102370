"""Calibration files and the arithmetic behind them: no compiler, no model but a tiny random one, no tool."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import plant_model
import pytest
import tiny_gguf

from turbo_gguf.cache import calibration
from turbo_gguf.cache.calibration import Calibration, LayerCalibration
from turbo_gguf.calibrate import observation, scales, weight_moments
from turbo_gguf.calibrate.observation import LayerShape, Moments, Observation
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.gguf_file import GgufFile

HEADS, HEAD = 2, 8
SHAPE = LayerShape(number=0, n_head=4, n_head_kv=HEADS, head_k=HEAD, head_v=HEAD, n_rot=HEAD, center_k=True, center_v=True)


def found(*shapes: LayerShape, rope: str = "normal", tokens: int = 0) -> Observation:
    return Observation("llama", "tiny", "0123abcd", rope, tokens, shapes or (SHAPE,), {})


def moments(rng: np.random.Generator, mean: float = 0.0) -> Moments:
    """``mean``: of all channels of K; V has twice as much."""

    def squares() -> np.ndarray:
        return rng.uniform(0.5, 2.0, (HEADS, HEAD))

    k_mean = np.full((HEADS, HEAD), mean)
    return Moments(q_sq=squares(), k_sq=squares() + k_mean**2, k_mean=k_mean, v_sq=squares() + 4 * k_mean**2, v_mean=2 * k_mean)


def computed(m: Moments, shape: LayerShape = SHAPE, rope: str = "normal", output: np.ndarray | None = None) -> LayerCalibration:
    outputs = {} if output is None else {shape.number: output}
    return scales.compute(found(shape, rope=rope), {shape.number: m}, outputs).layers[shape.number]


# --- choice of scales --------------------------------------------------------------------------------------------------------


def test_scales_make_the_noise_of_scores_least() -> None:
    """Noise of equal size in every stored channel: no other scales of the same kind give less error of the scores."""
    rng = np.random.default_rng(0)
    m = moments(rng)
    shape = LayerShape(0, 4, HEADS, HEAD, HEAD, n_rot=0, center_k=True, center_v=True)
    best = computed(m, shape, output=rng.uniform(0.5, 2.0, (HEADS, HEAD)))

    def noise(scale: np.ndarray) -> float:
        """Mean square of the stored values times the noise that they cause in a score, of the first head."""
        stored, score = (m.k_sq[0] * scale**2).mean(), (m.q_sq[0] / scale**2).mean()
        return float(stored * score)

    assert best.k_scale is not None
    least = noise(best.k_scale[0])
    for _ in range(200):
        other = best.k_scale[0] * np.exp(rng.normal(0, 0.3, HEAD))
        assert noise(other) > least
    assert least < noise(np.ones(HEAD))


@pytest.mark.parametrize(("rope", "pairs"), [("normal", [(0, 1), (2, 3)]), ("neox", [(0, 2), (1, 3)])])
def test_both_channels_of_a_pair_share_a_scale(rope: str, pairs: list[tuple[int, int]]) -> None:
    shape = LayerShape(0, 4, HEADS, HEAD, HEAD, n_rot=4, center_k=True, center_v=True)
    scale = computed(moments(np.random.default_rng(1)), shape, rope).k_scale
    assert scale is not None
    for a, b in pairs:
        np.testing.assert_array_equal(scale[:, a], scale[:, b])
    assert len(np.unique(scale[0])) == 2 + (HEAD - 4)  # two pairs, and channels that RoPE does not rotate


def test_scales_have_a_geometric_mean_of_one_and_are_clamped() -> None:
    m = moments(np.random.default_rng(2))
    scale = computed(m).k_scale
    assert scale is not None
    np.testing.assert_allclose(np.log(scale).mean(1), 0, atol=1e-6)
    wild = replace(m, q_sq=np.where(np.arange(HEAD) < 2, 1e12, 1.0) * np.ones((HEADS, 1)))
    scale = computed(wild).k_scale
    assert scale is not None
    assert scale.max() <= scales.LARGEST_SCALE
    assert scale.min() >= 1 / scales.LARGEST_SCALE


@pytest.mark.parametrize("dead", ["one channel", "all"])
def test_dead_channels_have_scales(dead: str) -> None:
    m = moments(np.random.default_rng(3))
    k_sq, v_sq = np.array(m.k_sq), np.array(m.v_sq)
    k_sq[:, slice(0, 2) if dead == "one channel" else slice(None)] = 0
    v_sq[:, slice(0, 2) if dead == "one channel" else slice(None)] = 0
    layer = computed(replace(m, k_sq=k_sq, v_sq=v_sq), output=np.ones((HEADS, HEAD)))
    for scale in (layer.k_scale, layer.v_scale):
        assert scale is not None
        assert np.isfinite(scale).all()
        assert (scale > 0).all()


def test_the_means_leave_the_scales_alone() -> None:
    output = np.ones((HEADS, HEAD))
    plain, shifted = moments(np.random.default_rng(4)), moments(np.random.default_rng(4), mean=7.0)
    a, b = computed(plain, output=output), computed(shifted, output=output)
    np.testing.assert_allclose(a.k_scale, b.k_scale, rtol=1e-5)
    np.testing.assert_allclose(a.v_scale, b.v_scale, rtol=1e-5)
    np.testing.assert_allclose(b.k_mean, 7.0)
    np.testing.assert_allclose(b.v_mean, 14.0)


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_layer_that_may_not_be_centered(side: str) -> None:
    shape = replace(SHAPE, center_k=side != "k", center_v=side != "v")
    m, output = moments(np.random.default_rng(5), mean=3.0), np.ones((HEADS, HEAD))
    layer = computed(m, shape, output=output)
    assert getattr(layer, f"{side}_mean") is None
    assert (layer.k_mean is None) + (layer.v_mean is None) == 1
    without_mean = computed(replace(m, **{f"{side}_mean": 0 * m.k_mean}), output=output)
    np.testing.assert_allclose(getattr(layer, f"{side}_scale"), getattr(without_mean, f"{side}_scale"), rtol=1e-6)


def test_without_the_output_projection_v_is_left_alone() -> None:
    assert computed(moments(np.random.default_rng(6))).v_scale is None


# --- the estimate from weights -------------------------------------------------------------------------------------------------


def test_estimate_is_what_noise_gives(tmp_path: Path) -> None:
    weights = weight_moments.Weights(tiny_gguf.write(tmp_path / "tiny.gguf", head=HEAD, n_head=4, n_head_kv=HEADS, n_layer=1))
    told = weight_moments.estimate(found(), weights)[0]
    noise = np.random.default_rng(7).standard_normal((20_000, 4 * HEAD))
    k = (noise @ weights.need("blk.0.attn_k.weight").T).reshape(-1, HEADS, HEAD)
    q = (noise @ weights.need("blk.0.attn_q.weight").T).reshape(-1, HEADS, 2, HEAD)
    np.testing.assert_allclose(told.k_sq, (k**2).mean(0), rtol=0.1)
    np.testing.assert_allclose(told.q_sq, (q**2).mean((0, 2)), rtol=0.1)
    np.testing.assert_array_equal(told.k_mean, 0)
    output = weight_moments.output_sq(found(), weights)[0]
    wo = weights.need("blk.0.attn_output.weight")
    np.testing.assert_allclose(output[1, 3], (wo[:, 2 * HEAD + 3] ** 2).sum() + (wo[:, 3 * HEAD + 3] ** 2).sum())


@pytest.mark.parametrize("rope", ["normal", "neox", "none"])
def test_rope_turns_the_bias(rope: str) -> None:
    """Against a loop over positions with rotation matrices."""
    bias = np.random.default_rng(8).standard_normal((HEADS, HEAD))
    n_rot, speeds = 4, np.array([1.0, 0.1])
    expected = np.array(bias)
    if rope != "none":
        for i in range(n_rot // 2):
            a, b = (2 * i, 2 * i + 1) if rope == "normal" else (i, i + n_rot // 2)
            angles = np.arange(weight_moments.POSITIONS) * speeds[i]
            expected[:, a] = np.mean(np.outer(bias[:, a], np.cos(angles)) - np.outer(bias[:, b], np.sin(angles)), 1)
            expected[:, b] = np.mean(np.outer(bias[:, a], np.sin(angles)) + np.outer(bias[:, b], np.cos(angles)), 1)
    np.testing.assert_allclose(weight_moments._turned(bias, rope, n_rot, speeds), expected, atol=1e-12)


def test_pairs_that_rope_does_not_turn_keep_their_bias(tmp_path: Path) -> None:
    """``rope_freqs.weight`` divides frequencies: the slowest pair stands still here, as in planted models."""
    path = tiny_gguf.write(tmp_path / "tiny.gguf", head=64, n_head=4, n_head_kv=HEADS, n_layer=1)
    model = plant_model.Model(path)
    plant_model.plant_k_bias(model, 30)
    model.write(tmp_path / "biased.gguf", "")
    weights = weight_moments.Weights(tmp_path / "biased.gguf")
    speeds = weights.rope_speeds("llama", 64)
    np.testing.assert_allclose(speeds[:30], 10_000.0 ** (-np.arange(30) / 32))
    shape = LayerShape(0, 4, HEADS, 64, 64, n_rot=64, center_k=True, center_v=True)
    told = weight_moments.estimate(found(shape), weights)[0]
    np.testing.assert_allclose(told.k_mean, weights.need("blk.0.attn_k.bias").reshape(HEADS, 64), rtol=1e-6)


def test_norms_of_k_set_its_level() -> None:
    variance, mean = np.full((HEADS, HEAD), 9.0), np.zeros((HEADS, HEAD))
    for weight in (np.arange(1.0, HEAD + 1), np.tile(np.arange(1.0, HEAD + 1), HEADS)):
        normed, _ = weight_moments._normed(variance, mean, weight)
        np.testing.assert_allclose(normed, np.tile(np.arange(1.0, HEAD + 1) ** 2, (HEADS, 1)))


def test_weights_that_are_not_those_of_plain_attention(tmp_path: Path) -> None:
    weights = weight_moments.Weights(tiny_gguf.write(tmp_path / "tiny.gguf", head=HEAD, n_layer=1))
    with pytest.raises(UsageError, match=r"no tensor blk\.0\.|cannot be calibrated from its weights") as error:
        weight_moments.estimate(found(LayerShape(0, 3, 1, HEAD, HEAD, HEAD, center_k=True, center_v=True)), weights)
    assert error.value.hint == "give a text"


# --- files -----------------------------------------------------------------------------------------------------------------------


def made() -> Calibration:
    rng = np.random.default_rng(9)
    return scales.compute(found(tokens=77), {0: moments(rng, 1.0)}, {0: rng.uniform(0.5, 2.0, (HEADS, HEAD))})


def test_round_trip(tmp_path: Path) -> None:
    path = calibration.write(made(), tmp_path / "a.gguf")
    back = calibration.read(path)
    assert (back.arch, back.name, back.fingerprint, back.tokens) == ("llama", "tiny", "0123abcd", 77)
    for name in ("k_mean", "k_scale", "v_mean", "v_scale"):
        np.testing.assert_array_equal(getattr(back.layers[0], name), getattr(made().layers[0], name))
    assert list(tmp_path.iterdir()) == [path]


SHAPES = {
    "one KV head": [(1, 8, 8)],
    "one layer": [(2, 8, 8)],
    "K and V of other sizes": [(2, 8, 16)],
    "one KV head, K and V of other sizes": [(1, 16, 8), (1, 8, 16)],
    "head counts by layer": [(1, 8, 8), (4, 8, 8), (2, 16, 8)],
}
"""KV heads and head sizes of K and V, by layer."""


def odd(shapes: list[tuple[int, int, int]]) -> Calibration:
    """A calibration of such layers; the second one has no means."""
    rng = np.random.default_rng(3)

    def values(heads: int, size: int) -> np.ndarray:
        return rng.uniform(0.5, 2, (heads, size)).astype(np.float32)

    layers = {
        3 * i: LayerCalibration(None if i == 1 else values(n, k), values(n, k), None if i == 1 else values(n, v), values(n, v))
        for i, (n, k, v) in enumerate(shapes)
    }
    return Calibration("llama", "odd", "0123abcd", 5, layers)


def as_ggml_writes(path: Path) -> Path:
    """The same file without trailing dimensions of 1, as llama.cpp's own writer leaves them out."""
    found = GgufFile(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(str(found.fields["general.type"]))
    writer.add_name(str(found.fields["general.name"]))
    writer.add_uint32("turbo.calibration.version", int(found.fields["turbo.calibration.version"]))
    writer.add_string("turbo.calibration.model", str(found.fields["turbo.calibration.model"]))
    writer.add_uint32("turbo.calibration.tokens", int(found.fields["turbo.calibration.tokens"]))
    for tensor in found.tensors:
        values = np.array(tensor.values())
        writer.add_tensor(tensor.name, values[0] if len(values) == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("by", ["us", "ggml"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_round_trip_of_odd_heads(tmp_path: Path, shapes: list[tuple[int, int, int]], by: str) -> None:
    before = odd(shapes)
    path = calibration.write(before, tmp_path / "a.gguf")
    back = calibration.read(as_ggml_writes(path) if by == "ggml" else path)
    assert back.layers.keys() == before.layers.keys() and calibration.digest(back) == calibration.digest(before)
    for number, layer in before.layers.items():
        for part in ("k_mean", "k_scale", "v_mean", "v_scale"):
            wanted, found = getattr(layer, part), getattr(back.layers[number], part)
            assert (wanted is None) == (found is None)
            if wanted is not None:
                assert found.shape == wanted.shape
                np.testing.assert_array_equal(found, wanted)


def test_an_observation_of_one_kv_head_becomes_a_calibration(tmp_path: Path) -> None:
    """As the tool writes it: [head, 1] has one dimension in the file."""
    writer = gguf.GGUFWriter(tmp_path / "o.gguf", "llama")
    writer.add_type("turbo-observation")
    writer.add_name("tiny")
    writer.add_string("turbo.calibration.model", "0123abcd")
    writer.add_string("turbo.observation.rope", "neox")
    writer.add_uint32("turbo.observation.tokens", 5)
    columns = {"layers": 0, "n_head": 4, "n_head_kv": 1, "head_k": 8, "head_v": 16, "n_rot": 8, "center_k": 1, "center_v": 1}
    for name, value in columns.items():
        writer.add_array(f"turbo.observation.{name}", [value])
    rng = np.random.default_rng(4)
    for name, size in (("q_sq", 8), ("k_sq", 8), ("k_mean", 8), ("v_sq", 16), ("v_mean", 16)):
        writer.add_tensor(f"blk.0.{name}", rng.uniform(1, 2, size).astype(np.float32) * (0.1 if "mean" in name else 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seen = observation.read(tmp_path / "o.gguf")
    made = scales.compute(seen, seen.moments, {0: np.ones((1, 16))})
    layer = calibration.read(calibration.write(made, tmp_path / "c.gguf")).layers[0]
    assert layer.k_mean is not None and layer.v_scale is not None
    assert (layer.k_mean.shape, layer.v_scale.shape) == ((1, 8), (1, 16))


@pytest.mark.parametrize(
    "values", [np.ones((HEADS, HEAD), np.float16), np.ones((1, HEADS, HEAD), np.float32)], ids=["f16", "three dimensions"]
)
def test_tensors_of_another_kind(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(calibration.TYPE)
    writer.add_uint32("turbo.calibration.version", calibration.VERSION)
    writer.add_string("turbo.calibration.model", "0123abcd")
    writer.add_tensor("blk.0.k_scale", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"damaged: blk\.0\.k_scale is F"):
        calibration.read(path)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    assert calibration.write(made(), tmp_path / "a.gguf").read_bytes() == calibration.write(made(), tmp_path / "b.gguf").read_bytes()


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = calibration.write(made(), tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(data), 7):
        cut.write_bytes(data[:size])
        with pytest.raises(UsageError, match=r"calibration .*cut\.gguf"):
            calibration.read(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "model"}, "no calibration"),
        ({"version": 2}, "version 2, known is 1"),
        ({"version": None}, "version None, known is 1"),
    ],
)
def test_other_files(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(str(change.get("type", calibration.TYPE)))
    if (version := change.get("version", 1)) is not None:
        writer.add_uint32("turbo.calibration.version", int(str(version)))
    writer.add_tensor("blk.0.k_scale", np.ones((HEADS, HEAD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=message):
        calibration.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "damaged: no turbo.calibration.model"),
        ({"model": "0123abcd", "tensor": "k_scale"}, "damaged: list index out of range"),
        ({"model": "0123abcd", "tensor": "blk.first.k_scale"}, "damaged: .*'first'"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = tmp_path / "damaged.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(calibration.TYPE)
    writer.add_uint32("turbo.calibration.version", calibration.VERSION)
    if "model" in change:
        writer.add_string("turbo.calibration.model", change["model"])
    writer.add_tensor(change.get("tensor", "blk.0.k_scale"), np.ones((HEADS, HEAD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=message) as error:
        calibration.read(path)
    assert error.value.hint == "write it again: turbo-gguf calibrate"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        calibration.read(tmp_path / "missing.gguf")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory") as error:
        calibration.write(made(), tmp_path / "no" / "a.gguf")
    assert error.value.hint == "name another file with --out"


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = calibration.write(made(), tmp_path / "a.gguf").read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        calibration.write(made(), tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == old


def test_observation_that_is_none(tmp_path: Path) -> None:
    path = calibration.write(made(), tmp_path / "a.gguf")
    with pytest.raises(UsageError, match="not an observation"):
        observation.read(path)
    with pytest.raises(UsageError, match=r"observation .*missing\.gguf: No such file"):
        observation.read(tmp_path / "missing.gguf")
