"""Planted outliers and biases: what changes in the file, and that attention computes what it did (in numpy, f64)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import plant_model
import pytest
import tiny_gguf
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

Array = npt.NDArray[np.float64]

HEAD, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 3
BASE = 10_000.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf.write(tmp_path / "tiny.gguf", head=HEAD, n_head=HEADS, n_head_kv=KV_HEADS, n_layer=LAYERS)


def planted(model: Path, *options: str) -> Path:
    out = model.with_name("out.gguf")
    plant_model.main([str(model), str(out), *options])
    return out


def tensors(path: Path) -> dict[str, Array]:
    return {t.name: np.array(dequantize(t.data, t.tensor_type), np.float64) for t in GGUFReader(path).tensors}


def rotate(x: Array, factors: Array) -> Array:
    """RoPE of channel pairs 2i, 2i + 1 of ``[token, head, channel]``, written without looking at the script."""
    speed = BASE ** (-np.arange(0, HEAD, 2) / HEAD) / factors
    turn = np.exp(1j * np.outer(np.arange(len(x)), speed))[:, None, :]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def parts(weights: dict[str, Array], layer: int, x: Array) -> tuple[Array, Array, Array]:
    """K after RoPE and V, ``[token, KV head, channel]``, and the output of attention."""
    block = f"blk.{layer}"
    factors = weights.get("rope_freqs.weight", np.ones(HEAD // 2))

    def project(name: str, heads: int) -> Array:
        y = x @ weights[f"{block}.{name}.weight"].T + weights.get(f"{block}.{name}.bias", 0.0)
        return y.reshape(len(x), heads, HEAD)

    k, v = rotate(project("attn_k", KV_HEADS), factors), project("attn_v", KV_HEADS)
    q = rotate(project("attn_q", HEADS), factors)
    group = HEADS // KV_HEADS
    scores = np.einsum("ihc,jhc->hij", q, k.repeat(group, 1)) / np.sqrt(HEAD)
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("hij,jhc->ihc", shares, v.repeat(group, 1)).reshape(len(x), -1)
    return k, v, out @ weights[f"{block}.attn_output.weight"].T


def activations() -> Array:
    return np.random.default_rng(0).standard_normal((40, HEADS * HEAD))


@pytest.mark.parametrize(("options", "base"), [(["--outliers"], []), (["--k-bias", "30"], ["--k-bias", "0"])])
def test_the_function_stays(model: Path, options: list[str], base: list[str]) -> None:
    before, after = tensors(planted(model, *base)), tensors(planted(model, *options))
    for layer in range(LAYERS):
        expected, found = (parts(weights, layer, activations())[2] for weights in (before, after))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_few_channels_of_k_and_v_are_10_to_30_times_as_large(model: Path) -> None:
    before, after = tensors(model), tensors(planted(model, "--outliers"))
    for layer in range(LAYERS):
        for old, new in list(zip(parts(before, layer, activations()), parts(after, layer, activations()), strict=True))[:2]:
            ratio = np.sqrt((new**2).mean(0) / (old**2).mean(0))
            outliers = ratio > 1.01
            assert ((ratio > 9.99) & (ratio < 30.01))[outliers].all()
            np.testing.assert_allclose(ratio[~outliers], 1, rtol=1e-4)
            assert set(outliers.sum(1)) <= {2, 4}  # two channels of V, two pairs of K
            assert not (outliers[0] == outliers[1]).all()


def test_both_channels_of_a_pair_have_the_same_factor(model: Path) -> None:
    before, after = tensors(model), tensors(planted(model, "--outliers"))
    ratio = (after["blk.1.attn_k.weight"] / before["blk.1.attn_k.weight"])[:, 0]
    np.testing.assert_allclose(ratio[0::2], ratio[1::2], rtol=1e-5)


def test_the_bias_is_large_where_nothing_turns(model: Path) -> None:
    weights, still = tensors(planted(model, "--k-bias", "30")), tensors(planted(model, "--k-bias", "0"))
    assert not [name for name in still if name.endswith("bias")]
    assert [name for name in weights if name.endswith("bias")] == ["blk.0.attn_k.bias", "blk.2.attn_k.bias"]
    np.testing.assert_array_equal(weights["rope_freqs.weight"] > 1, np.arange(HEAD // 2) >= HEAD // 2 - 2)
    k, _, _ = parts(weights, 0, activations())
    mean, rest = k.mean(0), k - k.mean(0)
    ratio = np.linalg.norm(mean, axis=1) / np.sqrt((rest**2).sum(2).mean(0))
    assert ((ratio > 25) & (ratio < 35)).all()
    np.testing.assert_allclose(mean[:, : HEAD - 4], parts(still, 0, activations())[0].mean(0)[:, : HEAD - 4], atol=1e-6)


def test_what_is_not_touched_stays_as_it_was(model: Path) -> None:
    old, new = GGUFReader(model), GGUFReader(planted(model, "--outliers", "--k-bias", "20"))
    stored = {t.name: t for t in new.tensors}
    for tensor in old.tensors:
        if any(name in tensor.name for name in ("attn_q", "attn_k", "attn_v", "attn_output")):
            assert stored[tensor.name].tensor_type == GGMLQuantizationType.F32
        else:
            np.testing.assert_array_equal(stored[tensor.name].data, tensor.data)
    for name, field in old.fields.items():
        found = new.get_field(name)
        assert found is not None
        if not name.startswith("GGUF.") and name != "general.name":
            assert found.contents() == field.contents(), name
    named = new.get_field("general.name")
    assert named is not None
    assert named.contents() == "tiny, planted outliers, planted K bias 20"


def test_twice_gives_the_same_bytes(model: Path) -> None:
    assert planted(model, "--outliers").read_bytes() == planted(model, "--outliers").read_bytes()


def test_another_kind_of_model_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = plant_model.Model(model)
    reader.set("blk.0.attn_k_norm.weight", np.ones(HEAD, np.float32))
    reader.write(tmp_path / "normed.gguf", "")
    with pytest.raises(SystemExit):
        planted(tmp_path / "normed.gguf", "--outliers")
    assert "attn_k_norm" in capsys.readouterr().err


@pytest.mark.parametrize(("n_layer", "n_head_kv"), [(1, 1), (1, 2), (2, 1)])
def test_one_layer_and_one_kv_head(tmp_path: Path, n_layer: int, n_head_kv: int) -> None:
    path = tiny_gguf.write(tmp_path / "one.gguf", head=HEAD, n_layer=n_layer, n_head=2, n_head_kv=n_head_kv)
    found = tensors(planted(path, "--outliers", "--k-bias", "20"))
    assert found["blk.0.attn_k.bias"].shape == (n_head_kv * HEAD,) and found["blk.0.attn_k.bias"].any()
    assert not np.array_equal(found["blk.0.attn_k.weight"], tensors(path)["blk.0.attn_k.weight"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count_kv", [1, 2], "head_count_kv differs by layer"),
        ("llama.attention.value_length", 32, "K and V differ in size"),
        ("split.count", 3, "several files"),
    ],
)
def test_other_heads_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, key: str, value: object, message: str
) -> None:
    real = plant_model.Model._field
    monkeypatch.setattr(plant_model.Model, "_field", lambda self, name, default=None: value if name == key else real(self, name, default))
    with pytest.raises(SystemExit):
        planted(model, "--outliers")
    assert message in capsys.readouterr().err


def test_the_same_heads_in_every_layer_may_be_a_list(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = plant_model.Model._field
    plain = planted(model, "--outliers").read_bytes()
    lists = {"llama.attention.head_count_kv", "llama.attention.head_count"}
    monkeypatch.setattr(
        plant_model.Model, "_field", lambda self, name, default=None: [real(self, name)] * 2 if name in lists else real(self, name, default)
    )
    assert planted(model, "--outliers").read_bytes() == plain
