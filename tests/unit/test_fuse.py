"""Folding a calibration into weights. Risks: a model that computes something else, a part that is folded twice or lost, half a file."""

import re
import struct
from dataclasses import replace
from pathlib import Path

import fused_by_hand as by_hand
import gguf
import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_gguf.cache import calibration as calibrations
from turbo_gguf.cache.calibration import Calibration
from turbo_gguf.cache.spec import parse_types
from turbo_gguf.cli import main
from turbo_gguf.codec.rotation import matrix, rotate
from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.fuse import architectures, file, model
from turbo_gguf.fuse.algebra import LARGEST_EXPONENT, key_exponents, of_queries, scaled, value_fold
from turbo_gguf.fuse.layer import AttentionLayer, Heads
from turbo_gguf.fuse.mixing import mixing
from turbo_gguf.fuse.rows import FLOATS, SCALES, NotExact, Rows, can_decode, encode
from turbo_gguf.inputs.gguf_file import GgufFile
from turbo_gguf.plan import architectures as planned
from turbo_gguf.plan.shape import shape_of

SIZES = (32, 64, 80, 96, 128, 192, 256)

# --- the rotation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_is_orthonormal(size):
    assert np.allclose(mixing(size) @ mixing(size).T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_a_channel_is_spread_with_and_without_the_rotation_of_a_cache(size):
    """With H alone, a cache would rotate it back: all of a channel in one value."""
    for found in (mixing(size), rotate(mixing(size).T, group=min(size & -size, 64)).T):
        assert np.abs(found).max() <= 1 / np.sqrt(min(size & -size, 128) / 2) + 1e-12
    assert np.abs(matrix(size & -size) @ matrix(size & -size)).max() == pytest.approx(1)


def test_in_heads_of_64_all_elements_have_one_size():
    for found in (mixing(64), matrix(64) @ mixing(64)):
        assert np.allclose(np.abs(found), 1 / 8)


def test_there_is_no_head_of_nothing():
    with pytest.raises(ValueError, match="no head of 0"):
        mixing(0)


# --- the algebra ------------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from((4, 6, 8)))
"""KV heads, query heads of each, channels."""


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 1 << 30))
def test_values_come_out_as_they_were(shape, seed):
    n_kv, n_group, size = shape
    rng = np.random.default_rng(seed)
    x, weight, bias = rng.normal(size=(5, 7)), rng.normal(size=(n_kv * size, 7)), rng.normal(size=n_kv * size)
    output = rng.normal(size=(9, n_kv * n_group * size))
    fold = value_fold(np.exp(rng.normal(size=(n_kv, size))), rng.normal(size=(n_kv, size)))
    shares = rng.dirichlet(np.ones(5), size=(n_kv * n_group,))  # sum to one

    def out(v, o):
        heads = np.repeat(v.reshape(5, n_kv, size), n_group, axis=1)
        return np.einsum("ht,thc->hc", shares, heads).reshape(-1) @ o.T

    before = out(x @ weight.T + bias, output)
    after = out(x @ fold.rows(weight).T + fold.bias(bias), fold.columns(output)) + fold.constant(output)
    assert np.allclose(after, before, atol=1e-9)
    assert not np.allclose(after - fold.constant(output), before, atol=1e-9)  # the means are somewhere


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(("norm", "neox", "either", "none")), st.integers(0, 1 << 30))
def test_scores_are_what_they_were_at_all_positions(shape, rope, seed):
    n_kv, n_group, size = shape
    rng = np.random.default_rng(seed)
    n_rot = int(rng.choice(range(2, size + 1, 2)))
    layer = AttentionLayer(0, Heads(n_kv * n_group, n_kv, size, size), {}, architectures.Attention(rope))
    exponents = key_exponents(np.exp(rng.normal(size=(n_kv, size)))[:, :, None] * np.eye(size), layer.pairs(n_rot))
    q, k = rng.normal(size=(3, n_kv * n_group, size)), rng.normal(size=(3, n_kv, size))
    layouts = {"none": [], "either": ["norm", "neox"]}.get(rope, [rope])
    for layout in layouts or [None]:
        before = by_hand.scores(q, k, layout, n_rot)
        after = by_hand.scores(np.ldexp(q, of_queries(exponents, n_kv * n_group)), np.ldexp(k, exponents), layout, n_rot)
        assert np.allclose(after, before, rtol=1e-12, atol=1e-12)


def test_scales_that_differ_in_a_pair_change_scores():
    """What the test above would find."""
    rng = np.random.default_rng(0)
    q, k, exponents = rng.normal(size=(3, 1, 4)), rng.normal(size=(3, 1, 4)), np.array([[1, 0, 0, 0]])
    before, after = (by_hand.scores(np.ldexp(q, -e), np.ldexp(k, e), "neox", 4) for e in (0 * exponents, exponents))
    assert not np.allclose(after, before, atol=1e-3)


def test_scales_of_keys_follow_the_maps():
    scale = np.array([[16.0, 1.0, 1.0, 1 / 16]])
    assert key_exponents(scale[..., None] * np.eye(4), np.arange(4)).tolist() == [[4, 0, 0, -4]]
    assert key_exponents(scale[..., None] * np.eye(4), np.array([0, 0, 1, 1])).tolist() == [[2, 2, -2, -2]]
    two = np.concatenate([scale, 1 / scale])
    assert not key_exponents(two[..., None] * np.eye(4), np.arange(4), shared=True).any()
    huge = np.array([[2.0**40, 2.0**-40]])
    assert np.abs(key_exponents(huge[..., None] * np.eye(2), np.arange(2))).max() == LARGEST_EXPONENT


def test_a_norm_that_all_heads_share_gets_the_scales_of_one():
    assert scaled(np.ones(3), np.array([[1, 2, 3], [1, 2, 3]])).tolist() == [2, 4, 8]
    assert scaled(np.ones(6), np.array([[1, 2, 3], [0, 0, 1]])).tolist() == [2, 4, 8, 1, 1, 2]


# --- rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SCALES))
def test_rows_of_blocks_are_multiplied_exactly(name):
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(1).integers(0, 256, (6, 3 * size), np.uint8)
    blocks = data.reshape(6, 3, size)
    for at in SCALES[name]:
        blocks[..., at : at + 2] = np.random.default_rng(2).uniform(0.5, 1, (6, 3, 1)).astype("<f2").view(np.uint8)
    rows = Rows(name, data.copy())
    before, exponents = rows.values(), np.array([-3, -1, 0, 1, 2, 5])
    rows.multiply(slice(0, 6), exponents)
    assert np.array_equal(rows.values(), np.ldexp(before, exponents[:, None]))
    assert (rows.data != data).mean() < 0.2  # codes are what they were


@pytest.mark.parametrize("name", [*FLOATS, "BF16"])
def test_rows_of_floats_are_multiplied_exactly(name):
    values = np.random.default_rng(0).normal(size=(4, 32))
    rows = Rows(name, encode(values, name))
    before = rows.values()
    rows.multiply(slice(1, 3), np.array([2, -2]))
    assert np.array_equal(rows.values(), np.ldexp(before, np.array([0, 2, -2, 0])[:, None]))


def test_a_factor_that_would_be_rounded_is_refused():
    data = np.zeros((1, 18), np.uint8)
    data[0, :2] = np.array([1], "<u2").view(np.uint8)  # the least there is
    with pytest.raises(NotExact, match="would be rounded"):
        Rows("Q4_0", data).multiply(slice(0, 1), np.array([-1]))
    with pytest.raises(NotExact, match="IQ1_M"):
        Rows("IQ1_M", np.zeros((1, 56), np.uint8)).multiply(slice(0, 1), np.array([1]))


def test_a_value_that_is_too_large_is_refused():
    with pytest.raises(NotExact, match="too large for F16"):
        encode(np.full((1, 32), 1e5), "F16")


def test_what_gguf_reads():
    assert all(map(can_decode, ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_K", "IQ4_XS")))
    assert not can_decode("NO_SUCH_TYPE")


# --- files ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model of two layers, with two KV heads and four query heads."""
    return tiny_gguf.write(tmp_path / "model.gguf", head=64, n_head=4, n_head_kv=2)


def calibrated(path: Path, folder: Path, *, maps: bool = True, seed: int = 5) -> Path:
    """A calibration of random numbers, which is a right one."""
    found, rng = GgufFile(path), np.random.default_rng(seed)
    sizes = {kv.number: kv for cache in shape_of(found.fields, found.tensors).caches for kv in cache.layers}
    return calibrations.write(
        folder / "some.calibration.gguf",
        Calibration(
            arch=found.fields["general.architecture"],
            name="some",
            fingerprint=model._fingerprint(found, {}),
            tokens=7,
            layers={number: by_hand.random_layer(rng, kv.heads, kv.head_k, kv.head_v, maps=maps) for number, kv in sizes.items()},
        ),
    )


def fused(path: Path, folder: Path, calibration: Path | None, **options: str) -> model.Fused:
    return model.fuse(path, calibration, folder / "out.gguf", **options)


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("kind", ["plain", "biases", "merged", "norms", "split"])
def test_each_layer_computes_what_it_did(kind, maps, tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", kind)
    made = fused(path, tmp_path, calibrated(path, tmp_path, maps=maps))
    assert (made.count("V"), made.count("means of V"), made.count("K")) == (2, 2, 2)
    assert not made.left
    x = np.random.default_rng(0).normal(size=(6, by_hand.N_EMBD))
    for number in range(2):
        before, after = (by_hand.attention(GgufFile(p), number, x) for p in (path, made.path))
        assert np.abs(after.out - before.out).max() < 2e-5 * np.abs(before.out).max()
        assert np.abs(after.v - before.v).max() > 0.1  # and something is folded
        assert np.abs(after.k - before.k).max() > 0.1


@pytest.mark.parametrize("maps", [True, False])
def test_what_a_cache_stores_is_that_of_the_calibration_and_once(maps, tmp_path, llama):
    """K is mapped by what is left, V by nothing more; both are those of the whole calibration, rotated."""
    whole = calibrated(llama, tmp_path, maps=maps)
    made = fused(llama, tmp_path, whole)
    before, after = calibrations.read(whole).layers, calibrations.read(made.calibration).layers
    x = np.random.default_rng(0).normal(size=(6, 256))
    for number in range(2):
        old, new = by_hand.attention(GgufFile(llama), number, x), by_hand.attention(GgufFile(made.path), number, x)
        k_before, k_after = by_hand.stored_k(old.k, before[number]), by_hand.stored_k(new.k, after[number])
        assert np.allclose(k_after, k_before @ mixing(64).T, atol=1e-3)
        v_before = (old.v - before[number].v_mean) * before[number].v_scale
        assert np.allclose(new.v, v_before @ mixing(64).T, atol=1e-3)
        assert (after[number].v_mean, after[number].v_scale) == (None, None)


def test_its_calibration_is_the_only_one_that_fits(llama, tmp_path):
    whole = calibrated(llama, tmp_path)
    made = fused(llama, tmp_path, whole)
    found = GgufFile(made.path)
    assert calibrations.read(made.calibration).fingerprint == model._fingerprint(found, {}) != calibrations.read(whole).fingerprint
    assert found.fields["general.name"] == "tiny fused"
    with pytest.raises(UsageError, match="made for another model"):
        model.fuse(by_hand.write(tmp_path / "other.gguf", "plain"), whole, tmp_path / "x.gguf")


def test_the_mark_is_less_than_rounding(llama, tmp_path):
    made = fused(llama, tmp_path, None)
    before, after = (next(t for t in GgufFile(p).tensors if t.name == "output_norm.weight").values() for p in (llama, made.path))
    assert 0 < np.abs(after - before).max() < 2e-7


def test_without_a_calibration_v_is_rotated_and_k_has_maps_that_rotate(llama, tmp_path):
    made = fused(llama, tmp_path, None)
    assert (made.count("V"), made.count("means of V"), made.count("K"), made.is_rotated) == (2, 0, 0, True)
    layer = calibrations.read(made.calibration).layers[0]
    assert np.allclose(layer.k_map, mixing(64), atol=1e-6)
    assert np.allclose(layer.q_map, mixing(64), atol=1e-6)


def test_metadata_are_kept_byte_for_byte(llama, tmp_path):
    found, made = GgufFile(llama), GgufFile(fused(llama, tmp_path, calibrated(llama, tmp_path)).path)
    before, after = file.metadata_of(found), file.metadata_of(made)
    assert {key: after[key] for key in before if key != "general.name"} == {key: before[key] for key in before if key != "general.name"}
    assert made.fields["turbo.fused.version"] == model.VERSION
    assert made.fields["turbo.fused.v_layers"] == made.fields["turbo.fused.k_layers"] == [0, 1]
    assert {made.fields[f"turbo.fused.{key}"] for key in ("v", "v_mean", "k", "is_rotated")} == {1}
    assert not [key for key in made.fields if key.startswith("split.")]


def test_tensors_that_stay_are_kept_byte_for_byte(llama, tmp_path):
    found, made = GgufFile(llama), fused(llama, tmp_path, None)
    after = {tensor.name: tensor for tensor in GgufFile(made.path).tensors}
    same = [t.name for t in found.tensors if model._bytes(t) == model._bytes(after[t.name])]
    assert len(found.tensors) - len(same) == made.n_changed == 2 * 2 + 1


def test_it_is_not_fused_twice(llama, tmp_path):
    made = fused(llama, tmp_path, None)
    with pytest.raises(UsageError, match="fused already"):
        model.fuse(made.path, None, tmp_path / "again.gguf")


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_1"])
def test_a_type_of_few_bits_is_left_or_replaced(kind, tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", "plain", type_name=kind)
    with pytest.raises(
        UsageError, match=rf"nothing can be folded: attn_output.weight is {kind}.*--fallback|attn_v.weight is {kind}.*--fallback"
    ):
        fused(path, tmp_path, None)
    made = fused(path, tmp_path, calibrated(path, tmp_path))  # rows of K keep their codes
    assert (made.count("V"), made.count("K"), made.is_rotated) == (0, 2, False)
    assert calibrations.read(made.calibration).layers[0].v_scale is not None
    made = model.fuse(path, calibrated(path, tmp_path), tmp_path / "f16.gguf", fallback="F16")
    assert (made.count("V"), made.converted[0]) == (2, "blk.0.attn_output.weight")
    x = np.random.default_rng(0).normal(size=(6, by_hand.N_EMBD))
    before, after = (by_hand.attention(GgufFile(p), 0, x) for p in (path, made.path))
    assert np.abs(after.out - before.out).max() < 2e-3 * np.abs(before.out).max()


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.03), ("F16", 2e-3), ("BF16", 0.02)])
def test_other_types_are_rounded_again(kind, error, tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", "plain", type_name=kind)
    made = fused(path, tmp_path, calibrated(path, tmp_path))
    x = np.random.default_rng(0).normal(size=(6, by_hand.N_EMBD))
    before, after = (by_hand.attention(GgufFile(p), 0, x) for p in (path, made.path))
    assert 0 < np.abs(after.out - before.out).max() < error * np.abs(before.out).max()


def test_means_stay_in_the_calibration_where_there_is_no_bias_for_them(tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", "plain", arch="qwen2")
    whole = calibrated(path, tmp_path)
    made = fused(path, tmp_path, whole)
    assert (made.count("V"), made.count("means of V")) == (2, 0)
    before, after = calibrations.read(whole).layers[0], calibrations.read(made.calibration).layers[0]
    assert np.allclose(after.v_mean, (before.v_mean * before.v_scale) @ mixing(64).T, atol=1e-4)
    assert made.left == {"llama.cpp adds no bias to its output projection": ["means of V of layer 0", "means of V of layer 1"]}


@pytest.mark.parametrize(
    ("arch", "words"), [("deepseek2", "multi-head latent attention"), ("gemma3n", "not known here"), ("rwkv7", "not known here")]
)
def test_an_architecture_that_attends_otherwise_is_refused(arch, words, tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", "plain", arch=arch)
    with pytest.raises(UsageError, match=words):
        fused(path, tmp_path, None)


def test_values_that_are_cut_off_are_left(tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", "plain", arch="olmo", clamp=1.0)
    with pytest.raises(UsageError, match="cut off"):
        fused(path, tmp_path, None)


def test_weights_of_another_shape_are_named(tmp_path):
    path = by_hand.write(tmp_path / "model.gguf", "gated")
    with pytest.raises(UsageError, match=r"attn_q.weight is \[256, 512\], its heads need 256 rows"):
        fused(path, tmp_path, None)


def test_all_known_architectures_have_a_cache_of_known_shape():
    assert architectures.KNOWN.keys() <= planned.KNOWN
    assert not architectures.KNOWN.keys() & (planned.LATENT | planned.NO_CACHE | planned.OWN_ATTENTION | planned.RECURRENT)


# --- the command ------------------------------------------------------------------------------------------------------------


def run(*args: str | Path):
    return CliRunner().invoke(main, ["fuse", *map(str, args)])


def test_the_command_says_what_it_did(llama, tmp_path):
    done = run(llama, "--calibration", calibrated(llama, tmp_path), "-o", tmp_path / "out.gguf")
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(tmp_path / "out.gguf"), str(tmp_path / "out.calibration.gguf")]
    assert "folded, of 2 layers: V of 2, means of V of 2, K of 2" in done.stderr
    assert "use: LLAMA_ATTN_ROT_DISABLE=1 llama-server" in done.stderr


def test_serve_takes_its_calibration_and_leaves_the_rotation_to_it(llama, tmp_path):
    made = fused(llama, tmp_path, None)
    ours = ["--cache-calibration", str(made.calibration)]

    def found(types, *options, path=made.path):
        return model.served_with(path, GgufFile(path).fields, parse_types(types), options)

    assert found("turbo4t") == found("turbo4/turbo3 sink=0") == (ours, {"LLAMA_ATTN_ROT_DISABLE": "1"})
    for nothing in (
        found("q8_0"),
        found("turbo4t/f16"),
        found("turbo4t v=0:q8_0"),
        found("turbo4t cal=none"),
        found("turbo4t", "--cache-calibration=auto"),
        found("turbo4t", path=llama),
    ):
        assert nothing == ([], {})
    done = CliRunner().invoke(main, ["serve", str(made.path), "--dry-run", "--type", "turbo4t", "--memory", "64MiB", "--ctx", "512"])
    assert done.exit_code == 0, done.output
    assert re.match(r"LLAMA_ATTN_ROT_DISABLE=1 (\S+/)?llama-server -m", done.stdout), "a build that is here has a path"
    assert done.stdout.rstrip().endswith(" ".join(ours))


def test_bad_input_is_a_usage_error(llama, tmp_path):
    truncated = tmp_path / "cut.gguf"
    truncated.write_bytes(llama.read_bytes()[:-5000])
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"mine")
    beside = tmp_path / "beside.calibration.gguf"
    beside.write_bytes(b"mine")
    for args, words in (
        ((truncated, "-o", tmp_path / "x.gguf"), "truncated"),
        ((llama, "-o", taken), "is there already"),
        ((llama, "-o", tmp_path / "beside.gguf"), "is there already"),
        ((llama, "-o", llama), "is there already"),
        ((llama, "-o", tmp_path / "no" / "x.gguf"), "no such folder"),
        ((llama, "--calibration", llama, "-o", tmp_path / "x.gguf"), "no calibration"),
        ((tmp_path / "none.gguf", "-o", tmp_path / "x.gguf"), "none.gguf"),
    ):
        done = run(*args)
        assert done.exit_code == 2, done.output
        assert words in done.output
    assert (taken.read_bytes(), beside.read_bytes()) == (b"mine", b"mine")
    assert not (tmp_path / "x.gguf").exists()


def test_a_full_disk_leaves_nothing(llama, tmp_path, monkeypatch):
    usage = file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(file.shutil, "disk_usage", lambda path: replace_free(usage, 1000))
    with pytest.raises(EnvironmentMissing, match="no space left"):
        fused(llama, tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}


def replace_free(usage, free):
    return usage._replace(free=free)


def test_a_disk_that_fills_up_leaves_nothing(llama, tmp_path, monkeypatch):
    def fail(tensor, write):
        write(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "_copy", fail)
    with pytest.raises(EnvironmentMissing, match="no space left"):
        fused(llama, tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}


def test_strings_that_are_no_utf8_survive(tmp_path):
    path = tiny_gguf.write(tmp_path / "model.gguf", head=64, n_head=2)
    data = path.read_bytes()
    at = data.index(struct.pack("<Q", 6) + b"<0x7F>") + 8
    path.write_bytes(data[:at] + b"\xff\xfe\xfd\x80\x81\x82" + data[at + 6 :])
    made = fused(path, tmp_path, None)
    assert b"\xff\xfe\xfd\x80\x81\x82" in made.path.read_bytes()


def test_a_calibration_may_lack_layers_and_parts(llama, tmp_path):
    whole = calibrations.read(calibrated(llama, tmp_path))
    some = replace(whole, layers={1: replace(whole.layers[1], v_mean=None, k_mean=None)})
    made = fused(llama, tmp_path, calibrations.write(tmp_path / "some.gguf", some))
    assert (made.count("V"), made.count("means of V"), made.count("K"), made.is_rotated) == (2, 0, 1, True)
    left = calibrations.read(made.calibration).layers
    assert np.allclose(left[0].k_map, mixing(64), atol=1e-6)
    assert left[1].k_mean is None


def test_the_guide_names_the_architectures():
    guide = (
        (Path(__file__).resolve().parents[2] / "docs/guides/fuse.md").read_text().partition("## Architectures")[2].partition("Each of")[0]
    )
    assert set(re.findall(r"[\w-]+(?:\.[\w-]+)?", guide)) == set(architectures.KNOWN)
