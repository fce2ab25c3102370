"""The programs that users run, with turbo caches: what they print, what they say they cache, and llama-server over HTTP."""

from __future__ import annotations

import json
import re
import urllib.error
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from cache_lines import cache_lines
from conftest import Tool
from server import VERBOSE, serve, steps

from turbo_gguf.codec import tables

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

PROMPT = "def main(argv):\n    "


def assert_cache(text: str, type_k: str, type_v: str) -> None:
    """The log names the types that are really in the cache, and says that the turbo ones are rotated."""
    assert re.findall(r"K \((\w+)\): .*V \((\w+)\): ", text) == [(type_k, type_v)]
    (line,) = cache_lines(text)
    assert line.types == (type_k if type_k == type_v else f"{type_k}/{type_v}")
    assert not line.settings
    assert not line.more
    for name, rotated in zip((type_k, type_v), line.rotated, strict=True):
        assert rotated == (name not in ("f16", "bf16", "f32"))
    assert re.search(r"flash_attn += enabled", text)


@pytest.mark.parametrize("types", [*((t.name, t.name) for t in tables.ALL), ("turbo3", "f16"), ("q8_0", "turbo2"), ("turbo4t", "turbo3t")])
def test_completion(tool: Tool, trained: Path, types: tuple[str, str]) -> None:
    args = ("-m", trained, "-p", PROMPT, "-n", "32", "--temp", "0", "-no-cnv", "-c", "256", "-t", "1", "-ctk", types[0], "-ctv", types[1])
    done = tool("llama-completion", *args, *VERBOSE)
    assert done.rc == 0, done.text[-3000:]
    assert_cache(done.err, *types)
    assert len(done.out) > len(PROMPT) + 8
    assert tool("llama-completion", *args).out == done.out


@pytest.mark.parametrize(
    ("model", "name"),
    [*product(("head96", "partial128", "swa"), ("turbo2", "turbo4")), *product(("partial128", "swa"), ("turbo2t", "turbo4t"))],
)
def test_context_shift(tool: Tool, tiny: Callable[[str], Path], model: str, name: str) -> None:
    args = ("-m", tiny(model), "-p", PROMPT, "-n", "500", "-c", "256", "--context-shift", "--ignore-eos", "-no-cnv", "-t", "1")
    done = tool("llama-completion", *args, "-ctk", name, "-ctv", name)
    assert done.rc == 0, done.text[-3000:]
    assert re.search(r" eval time = .* 499 runs", done.err), done.err[-2000:]


def test_cli(tool: Tool, trained: Path) -> None:
    args = ("-m", trained, "-p", PROMPT, "-n", "16", "--temp", "0", "-c", "256", "-t", "1", "-st")
    done = tool("llama-cli", *args, "-ctk", "turbo3", "-ctv", "turbo4", *VERBOSE)
    assert done.rc == 0, done.text[-3000:]
    assert_cache(done.text, "turbo3", "turbo4")
    assert "Generation:" in done.out


@pytest.mark.parametrize("types", [("turbo3", "turbo2"), ("turbo4", "f16"), ("turbo4t", "turbo2t")])
def test_perplexity(tool: Tool, trained: Path, prose: Path, types: tuple[str, str]) -> None:
    args = ("-m", trained, "-f", prose, "-c", "256", "--chunks", "2", "-t", "1", "-ctk", types[0], "-ctv", types[1])
    done = tool("llama-perplexity", *args, *VERBOSE)
    assert done.rc == 0, done.text[-3000:]
    assert_cache(done.err, *types)
    assert re.search(r"Final estimate: PPL = \d+\.\d+ \+/- \d+\.\d+", done.text), done.text[-2000:]


def test_bench(tool: Tool, trained: Path) -> None:
    args = ("-m", trained, "-p", "32", "-n", "8", "-d", "0,64", "-t", "1", "-r", "1", "-o", "jsonl", "-v")
    done = tool("llama-bench", *args, "-ctk", "turbo2,turbo4t", "-ctv", "turbo3")
    assert done.rc == 0, done.text[-3000:]
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert {(row["type_k"], row["type_v"], row["n_depth"]) for row in rows} == {
        (k, "turbo3", d) for k in ("turbo2", "turbo4t") for d in (0, 64)
    }
    assert all(row["avg_ts"] > 0 for row in rows)
    assert set(re.findall(r"K \((\w+)\): .*V \((\w+)\): ", done.err)) == {("turbo2", "turbo3"), ("turbo4t", "turbo3")}


@pytest.mark.parametrize("program", ["llama-completion", "llama-server"])
def test_help_names_the_types(tool: Tool, program: str) -> None:
    done = tool(program, "--help")
    assert done.rc == 0
    for flag in ("--cache-type-k", "--cache-type-v"):
        about = re.search(rf"{flag} TYPE(.*?)\n-", done.text, re.DOTALL)
        assert about
        assert {*(t.name for t in tables.ALL), "f16", "q8_0"} <= set(re.findall(r"\w+", about[1]))


# --- types by layer, and decay ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "--cache-type-k-layers": ("TURBO_CACHE_TYPE_K_LAYERS", "0,-1:q8_0;*:turbo3"),
    "--cache-type-v-layers": ("TURBO_CACHE_TYPE_V_LAYERS", "1-2:turbo4"),
    "--cache-decay": ("TURBO_CACHE_DECAY", "balanced"),
}
"""Option, its variable, and a value for the embedded model, which has 4 layers."""

OPTIONS = tuple(word for option, (_, value) in SETTINGS.items() for word in (option, value))
VARIABLES = dict(SETTINGS.values())


def assert_settings(text: str) -> None:
    """The log tells of these settings, with f16 elsewhere; contexts that are made to measure memory come first."""
    line = cache_lines(text)[-1]
    assert line.types == "f16"
    assert line.settings == {"k": "0:q8_0;1-2:turbo3;3:q8_0", "v": "0:f16;1-2:turbo4;3:f16", "decay": "15,35,50"}
    assert line.rotated == (True, True)
    assert line.bits == (6.0, 10.25)
    assert line.more == ("decaying 2/2",)


def tool_args(program: str, model: Path, text: Path) -> tuple[str | Path, ...]:
    """A short run of each tool that logs what it caches."""
    return {
        "llama-completion": ("-m", model, "-p", PROMPT, "-n", "4", "-c", "256", "-no-cnv", "-t", "1", *VERBOSE),
        "llama-cli": ("-m", model, "-p", PROMPT, "-n", "4", "-c", "256", "-st", "-t", "1", *VERBOSE),
        "llama-perplexity": ("-m", model, "-f", text, "-c", "128", "--chunks", "1", "-t", "1", *VERBOSE),
        "llama-bench": ("-m", model, "-p", "8", "-n", "2", "-r", "1", "-t", "1", "-v"),
    }[program]


PROGRAMS = ("llama-completion", "llama-cli", "llama-perplexity", "llama-bench")


@pytest.mark.parametrize("how", ["options", "variables"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_settings(tool: Tool, trained: Path, prose: Path, program: str, how: str) -> None:
    args, env = (OPTIONS, {}) if how == "options" else ((), VARIABLES)
    done = tool(program, *tool_args(program, trained, prose), *args, env=env)
    assert done.rc == 0, done.text[-3000:]
    assert_settings(done.text)


@pytest.mark.parametrize("how", ["option", "variable"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_layer_adaptive(tool: Tool, trained: Path, prose: Path, program: str, how: str) -> None:
    args, env = (("--cache-layer-adaptive", "7"), {}) if how == "option" else ((), {"TURBO_CACHE_LAYER_ADAPTIVE": "7"})
    done = tool(program, *tool_args(program, trained, prose), "-ctk", "turbo3", *args, env=env)
    assert done.rc == 0, done.text[-3000:]
    line = cache_lines(done.text)[-1]
    assert (line.types, line.settings) == ("turbo3/f16", {"k": "0-3:turbo3", "v": "0-3:q8_0"})


def test_an_option_outweighs_its_variable(tool: Tool, trained: Path, prose: Path) -> None:
    args = tool_args("llama-completion", trained, prose)
    done = tool("llama-completion", *args, *OPTIONS, env=dict.fromkeys(VARIABLES, "nonsense"))
    assert done.rc == 0, done.text[-3000:]
    assert_settings(done.text)


def test_no_settings(tool: Tool, trained: Path, prose: Path) -> None:
    for program in PROGRAMS:
        done = tool(program, *tool_args(program, trained, prose), "-ctk", "turbo3", "-ctv", "turbo4")
        assert done.rc == 0, done.text[-3000:]
        assert {(line.types, *line.settings, *line.more, line.bits) for line in cache_lines(done.text)} == {("turbo3/turbo4", (3.5, 4.5))}


def test_types_of_upstream_have_a_line(tool: Tool, trained: Path, prose: Path) -> None:
    done = tool("llama-completion", *tool_args("llama-completion", trained, prose), "-ctk", "q8_0", "-fa", "on")
    assert done.rc == 0, done.text[-3000:]
    line = cache_lines(done.text)[-1]
    assert (line.types, line.settings, line.rotated, line.bits) == ("q8_0/f16", {}, (True, False), (8.5, 16.0))


OLD_NAMES = {
    "TURBO_LAYER_ADAPTIVE": ("TURBO_CACHE_LAYER_ADAPTIVE", "7", {"k": "0-3:turbo3", "v": "0-3:q8_0"}),
    "TURBO_DECAY": ("TURBO_CACHE_DECAY", "0,20,80", {"decay": "0,20,80"}),
}
"""Variables of the last release: their name now, a value, and what the log tells of it."""


@pytest.mark.parametrize("old", OLD_NAMES)
def test_a_variable_by_its_old_name(tool: Tool, trained: Path, prose: Path, old: str) -> None:
    name, value, settings = OLD_NAMES[old]
    args = (*tool_args("llama-completion", trained, prose), "-ctk", "turbo3", "-ctv", "turbo3")
    done = tool("llama-completion", *args, env={old: value})
    assert done.rc == 0, done.text[-3000:]
    assert cache_lines(done.text)[-1].settings == settings
    assert done.text.count(f"{old} is now {name}; the old name will go with the next release") == 1
    done = tool("llama-completion", *args, env={old: "nonsense", name: value})
    assert done.rc == 0, done.text[-3000:]
    assert cache_lines(done.text)[-1].settings == settings
    done = tool("llama-completion", *args, env={old: value, name: ""})
    assert done.rc == 0 and f"{old} is now" not in done.text, done.text[-3000:]
    assert cache_lines(done.text)[-1].settings != settings


def test_a_calibration_by_its_old_name(tool: Tool, trained: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBO_CACHE_CALIBRATION")
    missing = tmp_path / "missing.gguf"
    done = tool("llama-completion", *tool_args("llama-completion", trained, prose), env={"TURBO_CALIBRATION": str(missing)})
    assert done.refused, done.text[-3000:]
    assert "TURBO_CALIBRATION is now TURBO_CACHE_CALIBRATION" in done.text
    assert f"calibration {missing}: No such file" in done.text


@pytest.mark.parametrize("program", [*PROGRAMS, "llama-server"])
def test_help_names_the_settings(tool: Tool, program: str) -> None:
    done = tool(program, "--help")
    assert done.rc == 0
    for option, variable in (
        *((option, name) for option, (name, _) in SETTINGS.items()),
        ("--cache-layer-adaptive", "TURBO_CACHE_LAYER_ADAPTIVE"),
    ):
        about = re.search(rf"^ *{option} (.*?)^ {{0,2}}-", done.text, re.DOTALL | re.MULTILINE)
        assert about
        assert f"(env: {variable})" in about[1]


@pytest.mark.parametrize("types", [("turbo3", "turbo3"), ("turbo4", "turbo2"), ("turbo3", "f16"), ("turbo4t", "turbo3t")])
def test_server_slots(native_bin: Path, trained: Path, tmp_path: Path, types: tuple[str, str]) -> None:
    begin = "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n"
    further = begin + "        print(name)\n"
    cache = ("-ctk", types[0], "-ctv", types[1], "-c", "512", "--slot-save-path", str(tmp_path))
    with serve(native_bin, trained, tmp_path, *cache) as server:
        server.complete(begin, 1)
        saved = server.call("/slots/0?action=save", {"filename": "slot"})
        assert saved["n_saved"] > 0
        first = server.complete(further, 16)

        server.call("/slots/0?action=erase", {})
        server.complete("something else entirely", 4)
        fresh = server.complete(further, 1)
        assert fresh["timings"]["prompt_n"] > first["timings"]["prompt_n"]  # nothing of the text was in the cache

        restored = server.call("/slots/0?action=restore", {"filename": "slot"})
        assert restored["n_restored"] == saved["n_saved"]
        again = server.complete(further, 16)
        assert again["timings"]["prompt_n"] == first["timings"]["prompt_n"]  # the text was in the cache
        assert again["content"] == first["content"]
        assert steps(again) == steps(first)
    assert_cache(server.said(), *types)


def test_server_refuses_a_slot_of_another_type(native_bin: Path, trained: Path, tmp_path: Path) -> None:
    def cache(name: str) -> tuple[str, ...]:
        return ("-ctk", name, "-ctv", name, "-c", "512", "--slot-save-path", str(tmp_path))

    with serve(native_bin, trained, tmp_path, *cache("turbo3")) as server:
        server.complete(PROMPT, 1)
        server.call("/slots/0?action=save", {"filename": "slot"})
    with serve(native_bin, trained, tmp_path, *cache("turbo4")) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.call("/slots/0?action=restore", {"filename": "slot"})
        assert refused.value.code == 400
        assert server.complete(PROMPT, 4)["content"]


@pytest.mark.parametrize("name", ["turbo2", "turbo4", "turbo3t"])
def test_server_context_shift(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    with serve(native_bin, tiny("head128"), tmp_path, "-ctk", name, "-ctv", name, "-c", "256", "--context-shift") as server:
        answer = server.complete(PROMPT, 400, n_probs=0)
    assert answer["tokens_predicted"] == 400
    assert answer["truncated"] is True


@pytest.mark.parametrize("how", ["options", "variables"])
def test_server_settings(native_bin: Path, trained: Path, tmp_path: Path, how: str) -> None:
    args, env = (OPTIONS, {}) if how == "options" else ((), VARIABLES)
    with serve(native_bin, trained, tmp_path, "-c", "512", *args, env=env) as server:
        assert server.complete(PROMPT, 200, n_probs=0)["tokens_predicted"] == 200
    text = server.said()
    assert_settings(text)
    # prompt and answer are less than 256 tokens, so that the oldest half has 96 in steps of 32
    assert re.findall(r"llama_turbo_cache: decay: (\d+) passes, (\d+) cells of K, (\d+) cells of V", text)[-1] == ("3", "96", "96")


def test_server_slots_with_a_map(native_bin: Path, trained: Path, tmp_path: Path) -> None:
    """A slot that was saved with a map fits the same map, in whatever words, and no other one."""

    def cache(map_k: str, map_v: str) -> tuple[str, ...]:
        types = ("--cache-type-k-layers", map_k, "--cache-type-v-layers", map_v)
        return (*types, "-c", "512", "--slot-save-path", str(tmp_path), "--cache-decay", "0,20,80")

    with serve(native_bin, trained, tmp_path, *cache("0:q8_0;*:turbo3", "*:turbo4")) as server:
        first = server.complete(PROMPT, 100)
        assert server.call("/slots/0?action=save", {"filename": "slot"})["n_saved"] > 100
        more = server.complete(PROMPT + first["content"], 8)

    with serve(native_bin, trained, tmp_path, *cache("1--1:turbo3;0:q8_0", "0-3:turbo4")) as server:
        server.call("/slots/0?action=restore", {"filename": "slot"})
        again = server.complete(PROMPT + first["content"], 8)
        assert steps(again) == steps(more)
        assert again["timings"]["prompt_n"] == more["timings"]["prompt_n"] < 10  # the rest was in the slot

    with serve(native_bin, trained, tmp_path, *cache("1:q8_0;*:turbo3", "*:turbo4")) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.call("/slots/0?action=restore", {"filename": "slot"})
        assert refused.value.code == 400
        assert server.complete(PROMPT, 4)["content"]


@pytest.mark.parametrize("maps", [("11:q8_0;*:turbo3", "0-10:turbo3;11:q8_0"), ("1:q8_0;*:turbo3", "0:turbo3;1:q8_0;2-11:turbo3")], ids=str)
def test_server_with_a_draft(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path, maps: tuple[str, str]) -> None:
    """The settings are those of the model, whatever layers its draft has, also while the memory of both is measured."""
    settings = ("--cache-type-k-layers", maps[0], "--cache-decay", "balanced", "--cache-tail", "16", "-fit", "on", "-lv", "5")
    with serve(native_bin, tiny("layers12"), tmp_path, "-md", str(tiny("head64")), "-c", "256", *settings) as server:
        assert server.complete(PROMPT, 32, n_probs=0)["tokens_predicted"] == 32
    text = server.said()
    measured = text.split("getting device memory data for the extra model")[1:]
    assert measured
    assert all(not cache_lines(part)[0].settings for part in measured)
    assert "failed to measure" not in text
    begin = text.rindex("loading draft model")
    assert cache_lines(text[:begin])[-1].settings["k"] == maps[1]
    assert cache_lines(text[begin:])
    assert all(not line.settings for line in cache_lines(text[begin:]))


def test_server_with_itself_as_draft(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A model keeps its settings where its file is that of its draft, too."""
    settings = ("--cache-type-k-layers", "11:q8_0;*:turbo3", "--cache-tail", "16")
    with serve(native_bin, tiny("layers12"), tmp_path, "-md", str(tiny("layers12")), "-c", "256", *settings) as server:
        assert server.complete(PROMPT, 8, n_probs=0)["tokens_predicted"] == 8
    text = server.said()
    begin = text.rindex("loading draft model")
    assert cache_lines(text[:begin])[-1].settings["k"] == "0-10:turbo3;11:q8_0"
    assert all(not line.settings for line in cache_lines(text[begin:]))
