"""Calibration of the KV cache changes nothing but the error of quantization: our test-turbo-calibration, and the tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner, Result
from conftest import Done, Tool

from turbo_gguf.cache import calibration
from turbo_gguf.cli import main
from turbo_gguf.codec import tables

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

CHECKS = {"equal": 23, "stored": 10, "types": 1, "shift": 6, "sequences": 4, "state": 26, "refusals": 29}
"""Checks that a scenario makes at least: a program that checks nothing passes nothing."""

MODELS = (
    *("head64", "head96", "head80", "head128"),  # RoPE of neighbouring channels; a head size that is never rotated
    *("partial64", "partial96"),  # RoPE of channels half a head apart, on a part of it
    *("bias", "qk-norm", "sinks"),
    *("head192-128", "swa", "swa6"),  # two caches
    *("hybrid", "layers4", "one-kv-head", "heads-differ"),
)
TYPES = (*(t.name for t in tables.ALL), "q8_0", "q5_0", "q4_0", "f16", "bf16")


def cases() -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Model, scenario, types of K and V."""
    for model, scenario in product(MODELS, ("equal", "stored", "sequences", "refusals")):
        yield model, scenario, ("f32", "f32")
    for model in MODELS:  # behind a window sums have another order after a state is read, which random scales make large in few bits
        half = model in ("head80", "head192-128", "sinks", "swa", "swa6")
        yield model, "state", ("f16", "f16") if half else ("turbo3", "turbo3")
    for model in ("head64", "head96", "head80", "head128", "partial64", "partial96", "bias", "qk-norm", "swa", "swa6"):
        yield model, "shift", ("f32", "f32")
    for model, name in product(("head64", "head128", "partial64", "swa6", "hybrid"), TYPES):
        yield model, "types", (name, name)
    for pair in (("turbo3", "q4_0"), ("q8_0", "turbo4"), ("f32", "f16")):
        yield "head128", "types", pair
    yield "head96", "types", ("turbo3", "turbo4")


@pytest.mark.parametrize(("model", "scenario", "types"), [pytest.param(*case, id="-".join((*case[:2], *case[2]))) for case in cases()])
def test_calibration(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str, types: tuple[str, str]) -> None:
    done = tool("test-turbo-calibration", tiny(model), scenario, *types)
    assert done.rc == 0, done.text
    assert "FAIL" not in done.out
    assert done.out.endswith("all checks passed\n")
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS[scenario]


def test_two_threads(tool: Tool, tiny: Callable[[str], Path]) -> None:
    done = tool("test-turbo-calibration", tiny("head128"), "shift", "f32", "f32", "-t", "2")
    assert done.rc == 0, done.text


# --- upstream's tiny models of other architectures ------------------------------------------------------------------------------

CALIBRATED = {
    "glm4": "dense",  # sums of the output projection in f32
    "jais2": "dense",
    "qwen3next": "moe",  # gates the output before it is projected; few layers with a KV cache
    "falcon-h1": "dense",  # attention and a recurrent layer side by side
    "gpt-oss": "moe",  # attention sinks
    "llama4": "moe",  # layers without RoPE
    "phi2": "dense",  # biases, one norm for attention and feed-forward
    "bloom": "dense",  # no RoPE
}
"""Name -> what its model is, as upstream calls it. All architectures that upstream makes models of were tried once (0011)."""

REFUSED = {
    "deepseek2": ("moe", "it has multi-head latent attention"),
    "deepseek4": ("moe", "it has multi-head latent attention"),
    "minimax-m3": ("moe", "its architecture has an attention of its own"),
    "qwen4exp": ("moe", "its architecture has an attention of its own"),
    "mamba2": ("dense", "it has no KV cache"),
    "dream": ("dense", "it has no KV cache"),
}


def made_by_upstream(tool: Tool, folder: Path, arch: str, kind: str) -> Path:
    done = tool("test-llama-archs", "-s", "1", "-a", arch, "-o", f"{folder}/")
    path = folder / f"{arch}-{kind}.gguf"
    assert path.is_file(), done.text[-3000:]
    return path


@pytest.mark.parametrize("arch", CALIBRATED)
def test_other_architectures(tool: Tool, tmp_path: Path, arch: str) -> None:
    done = tool("test-turbo-calibration", made_by_upstream(tool, tmp_path, arch, CALIBRATED[arch]), "equal", "f32", "f32")
    assert done.rc == 0, done.text
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS["equal"]


def calibration_without_layers(arch: str, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(calibration.TYPE)
    writer.add_uint32("turbo.calibration.version", calibration.VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", REFUSED)
def test_architectures_that_cannot_be_calibrated(tool: Tool, tmp_path: Path, arch: str) -> None:
    kind, why = REFUSED[arch]
    model = made_by_upstream(tool, tmp_path, arch, kind)
    refused = turbo_gguf("calibrate", model, "--out", tmp_path / "no.gguf")
    assert refused.exit_code == 2, refused.output
    assert f"error: this model can't be calibrated: {why}; log: " in refused.stderr
    assert not (tmp_path / "no.gguf").exists()
    file = calibration_without_layers(arch, tmp_path / "a.gguf")
    done = tool("llama-completion", "-m", model, "-p", "a", "-n", "1", "-no-cnv", "--cache-calibration", str(file))
    assert done.refused, done.text
    assert f"calibration {file}: this model can't be calibrated: {why}" in done.text


# --- turbo-gguf calibrate, and what llama.cpp makes of its file -----------------------------------------------------------------


def turbo_gguf(*args: str | Path) -> Result:
    """Run a command in this process; the programs are built already."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def calibrate(model: Path, folder: Path, *args: str | Path) -> Path:
    """Run ``turbo-gguf calibrate``."""
    folder.mkdir(exist_ok=True)
    out = folder / f"{model.stem}.calibration.gguf"
    done = turbo_gguf("calibrate", model, *args, "--out", out, "--threads", "1")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    return out


def logits_error(tool: Tool, model: Path, text: Path, folder: Path, *args: str) -> float:
    """Mean KL divergence of llama-perplexity against an f16 cache."""
    common = ("-m", model, "-f", text, "-c", "256", "-b", "256", "-t", "1", "-fa", "on", "--chunks", "8")
    base = folder / f"{model.stem}.base"
    if not base.exists():
        done = tool("llama-perplexity", *common, "--kl-divergence-base", str(base))
        assert done.rc == 0, done.text
    for _ in range(5):  # the end of the log may be lost
        done = tool("llama-perplexity", *common, "--kl-divergence-base", str(base), "--kl-divergence", *args)
        assert done.rc == 0, done.text
        if found := re.search(r"Mean +KLD: +([\d.]+)", done.out):
            return float(found[1])
    raise AssertionError(done.text)


@pytest.mark.parametrize("model", ["head64", "head128", "partial64", "bias", "qk-norm", "sinks", "swa6", "hybrid", "head192-128"])
def test_less_error_with_the_same_bits(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, model: str) -> None:
    """The tiny models have outlier channels in K and V, and one a large bias of K: every text shows them."""
    files = {"text": calibrate(tiny(model), tmp_path / "text", prose), "built-in": calibrate(tiny(model), tmp_path / "built-in")}
    for name in ("turbo3", "q4_0"):
        types = ("-ctk", name, "-ctv", name)
        plain = logits_error(tool, tiny(model), prose, tmp_path, *types)
        for source, made in files.items():
            better = logits_error(tool, tiny(model), prose, tmp_path, *types, "--cache-calibration", str(made))
            print(f"{model} {name} {source}: {plain:.5f} -> {better:.5f}")
            assert better < 0.85 * plain, (name, source, plain, better)


SHAPES = {
    "head192-128": ((0, 1), (2, 192), (2, 128)),
    "hybrid": ((1, 2, 4), (2, 64), (2, 64)),
    "one-kv-head": ((0, 1), (1, 64), (1, 64)),
}
"""Model -> layers of its file, shapes of K and of V."""


@pytest.mark.parametrize("model", SHAPES)
def test_a_file_has_the_shape_of_the_model(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, model: str) -> None:
    layers, shape_k, shape_v = SHAPES[model]
    made = calibration.read(calibrate(tiny(model), tmp_path, prose))
    assert tuple(made.layers) == layers
    for layer in made.layers.values():
        assert layer.k_mean is not None and layer.k_map is not None and layer.v_scale is not None
        assert (layer.k_mean.shape, layer.k_map.shape, layer.v_scale.shape) == (shape_k, (*shape_k, shape_k[1]), shape_v)


@pytest.mark.parametrize("model", ["head192-128", "hybrid", "one-kv-head", "heads-differ"])
def test_it_fits_its_model(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, model: str) -> None:
    file = calibrate(tiny(model), tmp_path, prose)
    done = run(tool, "llama-bench", tiny(model), prose, file, "-ctk", "turbo3", "-ctv", "turbo3")
    assert done.rc == 0, done.text
    n = len(calibration.read(file).layers)
    counts = [
        re.findall(r"calibrated K (\d+) (\d+) V (\d+) (\d+) of", line) for line in done.text.splitlines() if "llama_turbo_cache: " in line
    ]
    assert f" cal={calibration.digest(calibration.read(file))} " in done.text
    assert sum(int(found[0][1]) for found in counts) == n, done.text  # scaled layers of K, of all caches


def test_the_same_text_gives_the_same_file(tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    files = [calibrate(tiny("head64"), tmp_path / name, prose, "--tokens", "500") for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = calibrate(tiny("head64"), tmp_path / "c", prose, "--tokens", "900")
    assert other.read_bytes() != files[0].read_bytes()


PROGRAMS = {
    "llama-completion": ("-p", "once", "-n", "4", "-no-cnv"),
    "llama-perplexity": ("-c", "128", "--chunks", "2"),
    "llama-bench": ("-v", "-p", "8", "-n", "0"),
    "llama-cli": ("-p", "once", "-n", "4", "-st"),
}


def run(tool: Tool, program: str, model: Path, prose: Path, file: Path, *args: str) -> Done:
    text = ("-f", prose) if program == "llama-perplexity" else ()
    return tool(program, "-m", model, "-t", "1", *PROGRAMS[program], *text, *args, "--cache-calibration", str(file), timeout=60)


@pytest.mark.parametrize("program", PROGRAMS)
def test_tools_load_it(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, program: str) -> None:
    done = run(tool, program, tiny("head64"), prose, calibrate(tiny("head64"), tmp_path, prose))
    assert done.rc == 0, done.text
    if program == "llama-bench":
        assert "| calibrated K 2 2 V 2 2 of 2" in done.text


@pytest.mark.parametrize("program", [*PROGRAMS, "llama-server"])
def test_tools_refuse_another_models(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, program: str) -> None:
    made = calibrate(tiny("head64"), tmp_path)
    if program == "llama-server":
        done = tool(program, "-m", tiny("head128"), "--cache-calibration", str(made), timeout=60)
    else:
        done = run(tool, program, tiny("head128"), prose, made)
    assert done.refused, done.text
    assert f"calibration {made}: it was made for another model" in done.text or f"{made}: blk.0." in done.text


def test_it_fits_quantizations_of_the_model(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    made = calibrate(tiny("head64"), tmp_path)
    digest = calibration.digest(calibration.read(made))
    for kind in ("q8_0", "q4_0"):
        other = tmp_path / f"{kind}.gguf"
        done = tool("llama-quantize", tiny("head64"), other, kind)
        assert done.rc == 0, done.text
        done = run(tool, "llama-bench", other, prose, made)
        assert done.rc == 0, done.text
        assert f" cal={digest} " in done.text
        theirs = calibration.read(calibrate(other, tmp_path / kind))
        assert theirs.fingerprint == calibration.read(made).fingerprint


# --- the command with input that is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("{missing}",), 2, "no such file"),
        (("{truncated}",), 2, "truncated"),
        (("{model}", "{missing}"), 2, "No such file"),
        (("{model}", "{empty}"), 2, "empty"),
        (("{model}", "{text}", "--tokens", "0"), 2, "0 is not in the range"),
        (("{model}", "{short}"), 2, "the text has 19 tokens, a calibration needs 64"),
        (("{model}", "--out", "{folder}/no/such/folder.gguf"), 2, "No such file or directory"),
        (("{model}", "--out", "/dev/full/x"), 2, "Not a directory"),
    ],
)
def test_bad_input(tiny: Callable[[str], Path], tmp_path: Path, args: tuple[str, ...], code: int, message: str) -> None:
    import tiny_models  # noqa: PLC0415

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("once upon a time " * 50)
    (tmp_path / "short.txt").write_text("once,upon,a,time")
    names = {
        "missing": tmp_path / "missing.gguf",
        "truncated": tiny_models.truncated(tiny("head64"), tmp_path),
        "model": tiny("head64"),
        "empty": tmp_path / "empty.txt",
        "text": tmp_path / "text.txt",
        "short": tmp_path / "short.txt",
        "folder": tmp_path,
    }
    done = turbo_gguf("calibrate", *(arg.format(**names) for arg in args))
    assert done.exit_code == code, done.output
    assert message in done.output
    assert not list(tmp_path.glob("*.calibration.gguf*"))
