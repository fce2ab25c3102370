"""Exact sink and tail of the KV cache: our test-turbo-exact, and the tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from cache_lines import cache_lines
from conftest import Tool
from test_calibration import PROGRAMS, calibrate, made_by_upstream

from turbo_gguf.codec import tables

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

CHECKS = {"equal": 9, "window": 4, "batches": 4, "shift": 4, "sequences": 10, "removal": 4, "state": 60, "refusals": 19}
"""Checks that a scenario makes at least: a program that checks nothing passes nothing."""

TYPES = (*(t.name for t in tables.ALL), "q8_0", "q5_0", "q4_0", "iq4_nl", "q5_1", "f16", "bf16", "f32")
COARSE = ("turbo2", "turbo3t", "q4_0")
MODELS = {  # name -> a type that its head size allows
    **dict.fromkeys(("head64", "head128", "partial64", "qk-norm", "sinks", "head192-128", "hybrid", "layers4"), "turbo3t"),
    **dict.fromkeys(("head96", "partial96", "swa", "swa6"), "turbo3"),
    "bias": "turbo4",
    "head80": "f16",
}
FORGETS_A_TAIL = [name for name in MODELS if name != "hybrid"]  # recurrent layers can't
TWO_LAYERS = [
    name for name in FORGETS_A_TAIL if name not in ("swa6", "layers4", "head80")
]  # behind more, what batches round differently grows
OF_ONE_SIZE = [name for name in MODELS if name not in ("head192-128", "head80")]  # K and V; and not f16, which is exact everywhere


def cases() -> Iterator[tuple[str, str, str]]:
    """Model, scenario, type."""
    for scenario, name in product(("equal", "window", "shift"), TYPES):
        if (scenario, name) != ("window", "f16"):
            yield "head64", scenario, name
    for scenario, name in product(("batches", "sequences", "removal", "state"), COARSE):
        yield "head64", scenario, name
    for scenario, models in {
        "equal": MODELS,
        "window": OF_ONE_SIZE,
        "sequences": MODELS,
        "state": MODELS,
        "refusals": ("head64", "swa"),
        "shift": FORGETS_A_TAIL,
        "removal": FORGETS_A_TAIL,
        "batches": TWO_LAYERS,
    }.items():
        for model in models:
            yield model, scenario, MODELS[model]


@pytest.mark.parametrize(("model", "scenario", "name"), dict.fromkeys(cases()))
def test_exact(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str, name: str) -> None:
    done = tool("test-turbo-exact", tiny(model), scenario, name, name)
    assert done.rc == 0, done.text
    assert "FAIL" not in done.out
    assert done.out.endswith("all checks passed\n")
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS[scenario]


@pytest.mark.parametrize("scenario", ["equal", "window", "state"])
@pytest.mark.parametrize("args", [("q8_0", "turbo3t"), ("f16", "turbo2"), ("turbo3", "turbo3", "-ctkl", "0:q8_0;*:turbo4")], ids=str)
def test_pairs_and_types_by_layer(tool: Tool, tiny: Callable[[str], Path], scenario: str, args: tuple[str, ...]) -> None:
    done = tool("test-turbo-exact", tiny("layers4"), scenario, *args, "-t", "2")
    assert done.rc == 0, done.text


# --- other architectures --------------------------------------------------------------------------------------------------------

ATTENDS = {"glm4": "dense", "qwen3next": "moe", "falcon-h1": "dense", "gpt-oss": "moe", "llama4": "moe", "phi2": "dense", "bloom": "dense"}
REFUSED = {
    "deepseek2": ("moe", "it has multi-head latent attention"),
    "minicpm3": ("dense", "it has multi-head latent attention"),
    "minimax-m3": ("moe", "its architecture has an attention of its own"),
    "qwen4exp": ("moe", "its architecture has an attention of its own"),
}


@pytest.mark.parametrize("arch", ATTENDS)
def test_other_architectures(tool: Tool, tmp_path: Path, arch: str) -> None:
    done = tool("test-turbo-exact", made_by_upstream(tool, tmp_path, arch, ATTENDS[arch]), "equal", "q8_0", "q4_0")
    assert done.rc == 0, done.text


@pytest.mark.parametrize("arch", REFUSED)
def test_architectures_that_are_refused(tool: Tool, tmp_path: Path, arch: str) -> None:
    kind, why = REFUSED[arch]
    model = made_by_upstream(tool, tmp_path, arch, kind)
    done = tool("llama-completion", "-m", model, "-p", "a", "-n", "1", "-no-cnv", "--cache-tail", "8")
    assert done.refused, done.text
    assert f"this model can't have an exact sink and tail: {why}: leave out --cache-sink and --cache-tail" in done.text


def test_deep_models_have_room_in_their_graph(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    """Upstream's room is 8 nodes per tensor and a prime number for nodes and leafs: 255 tensors, as Llama 3.2 3B has, get the least."""
    model = tiny("layers28")
    settings = ("--cache-calibration", str(calibrate(model, tmp_path, prose)), "--cache-sink", "4", "--cache-tail", "8")
    args = ("-m", model, "-ctk", "turbo3t", "-ctv", "turbo3t", "-no-cnv", "-n", "2", "-p", "word " * 40)
    done = tool("llama-completion", *args, *settings)
    assert done.rc == 0, done.text


# --- programs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_tools_have_it(tool: Tool, tiny: Callable[[str], Path], prose: Path, program: str) -> None:
    text = ("-f", prose) if program == "llama-perplexity" else ()
    args = ("-m", tiny("head64"), "-t", "1", *PROGRAMS[program], *text)
    done = tool(program, *args, "--cache-sink", "4", "--cache-tail", "32", "-ctk", "turbo3", "-ctv", "turbo3", timeout=60)
    assert done.rc == 0, done.text
    if program == "llama-bench":
        assert all(line.settings == {"sink": "4", "tail": "32"} for line in cache_lines(done.text))
        assert cache_lines(done.text)[0].more[0].startswith("copies ")
    done = tool(program, *args, "--cache-tail", "all", timeout=60)
    assert done.refused, done.text
    assert "--cache-tail all: not a number of tokens from 0 to 16777216" in done.text


def test_more_exact_tokens_less_error(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    from test_calibration import logits_error  # noqa: PLC0415

    types = ("-ctk", "turbo2", "-ctv", "turbo2")
    errors = [
        logits_error(tool, tiny("head64"), prose, tmp_path, *types, "--cache-sink", sink, "--cache-tail", tail)
        for sink, tail in (("0", "0"), ("0", "32"), ("32", "64"), ("0", "256"))
    ]
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2] > 5 * errors[3], errors
