"""``--cache-preset`` of llama.cpp's tools. Risks: another cache than the file says, a file for another model, damage that passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_lines import CacheLine, cache_lines
from conftest import Done, Tool
from server import VERBOSE, serve

from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.inputs import headers
from turbo_gguf.tune import preset
from turbo_gguf.tune.preset import Made, Preset

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("cache_folder")]

TYPES = parse_types("turbo3t/turbo2t k=0:q8_0;1,3:turbo4t v=2:turbo3t cal=none sink=8 tail=16")
PROGRAMS = ("llama-completion", "llama-perplexity", "llama-bench")


def written(folder: Path, model: Path, types: CacheSpec = TYPES) -> Path:
    header = headers.read(str(model))
    return preset.write(folder / "model.cache.toml", Preset(types, Made.of(header.name, header.fields)))


def args(program: str, model: Path, text: Path) -> tuple[str | Path, ...]:
    return {
        "llama-completion": ("-m", model, "-p", "def main(argv):\n    ", "-n", "4", "-c", "256", "-no-cnv", "-t", "1", *VERBOSE),
        "llama-perplexity": ("-m", model, "-f", text, "-c", "128", "--chunks", "1", "-t", "1", *VERBOSE),
        "llama-bench": ("-m", model, "-p", "8", "-n", "2", "-r", "1", "-t", "1", "-v"),
    }[program]


def last(done: Done) -> CacheLine:
    assert done.rc == 0, done.text[-3000:]
    return cache_lines(done.text)[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_preset_is_what_its_options_are(tool: Tool, trained: Path, prose: Path, tmp_path: Path, program: str) -> None:
    line = last(tool(program, *args(program, trained, prose), "--cache-preset", written(tmp_path, trained)))
    assert line.types == "turbo3t/turbo2t"
    assert line.settings == {"k": "0:q8_0;1:turbo4t;2:turbo3t;3:turbo4t", "v": "0-1:turbo2t;2:turbo3t;3:turbo2t", "sink": "8", "tail": "16"}


def test_a_variable_names_a_preset(tool: Tool, trained: Path, prose: Path, tmp_path: Path) -> None:
    env = {"TURBO_CACHE_PRESET": str(written(tmp_path, trained))}
    assert last(tool("llama-perplexity", *args("llama-perplexity", trained, prose), env=env)).settings["sink"] == "8"


def test_a_calibration_lies_beside_its_preset(tool: Tool, trained: Path, prose: Path, tmp_path: Path) -> None:
    made = tool("llama-turbo-calibrate", "-m", trained, "-o", tmp_path / "own.gguf", "-n", "64", "-t", "1")
    assert made.rc == 0, made.text
    digest = re.search(r"digest ([0-9a-f]{8})", made.out)
    assert digest
    types = parse_types("turbo3t sink=4 tail=8")
    path = written(tmp_path, trained, types)
    path.write_text(path.read_text().replace("[cache]", '[cache]\ncache-calibration = "own.gguf"'))
    line = last(tool("llama-perplexity", *args("llama-perplexity", trained, prose), "--cache-preset", path))
    assert line.settings["cal"] == digest[1]


def test_what_stands_behind_it_wins(tool: Tool, trained: Path, prose: Path, tmp_path: Path) -> None:
    path = written(tmp_path, trained, parse_types("turbo3t sink=8 tail=16 cal=none"))
    run = args("llama-perplexity", trained, prose)
    behind = last(tool("llama-perplexity", *run, "--cache-preset", path, "-ctk", "turbo4t", "--cache-sink", "2"))
    assert (behind.types, behind.settings) == ("turbo4t/turbo3t", {"sink": "2", "tail": "16"})
    in_front = last(tool("llama-perplexity", *run, "-ctk", "turbo4t", "--cache-sink", "2", "--cache-preset", path))
    assert (in_front.types, in_front.settings) == ("turbo3t", {"sink": "8", "tail": "16"})


def test_bench_has_no_types_beside_it(tool: Tool, trained: Path, prose: Path, tmp_path: Path) -> None:
    path = written(tmp_path, trained)
    done = tool("llama-bench", *args("llama-bench", trained, prose), "--cache-preset", path, "-ctk", "f16")
    assert done.refused
    assert "leave -ctk out" in done.err


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_preset_for_another_model_is_refused(
    tool: Tool, *, trained: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, program: str
) -> None:
    done = tool(program, *args(program, trained, prose), "--cache-preset", written(tmp_path, tiny("head64")))
    assert done.refused, done.text[-2000:]
    assert re.search(r"it is for .+ \(llama with \d+ layers of width \d+\), and .+ is llama with 4 layers of width", done.text)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("format = 1", "format = 2", "line 2: 'format = 2' is not format = 1"),
        ("format = 1", "", "is not format = 1|no format = 1"),
        ("layers = 4", "layers = four", r"line \d+: 'four' is neither"),
        ("layers = 4\n", "", r"no layers in \[model\]"),
        ('"turbo2t"', '"turbo2t', r"line \d+: '\"turbo2t' is no text"),
        ('"turbo2t"', '"turbo9"', "turbo9"),
        ('cache-type-v = "turbo2t"\n', "", r"no cache-type-v in \[cache\]"),
        ('cache-sink = "8"', 'cache-sunk = "8"', "unknown setting 'cache-sunk'"),
        ('cache-sink = "8"', "cache-sink", r"line \d+: 'cache-sink' is no key"),
        ('cache-sink = "8"', 'cache-tail = "8"', "cache-tail is there twice"),
        ("[evidence]", "", r"it ends before \[evidence\]"),
    ],
)
@pytest.mark.parametrize("program", ["llama-perplexity", "llama-bench"])
def test_damage_is_an_error_with_its_line(
    tool: Tool, *, trained: Path, prose: Path, tmp_path: Path, program: str, old: str, new: str, complaint: str
) -> None:
    path = written(tmp_path, trained)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    done = tool(program, *args(program, trained, prose), "--cache-preset", path)
    assert done.refused, done.text[-2000:]
    assert str(path) in done.text or "turbo9" in complaint
    assert re.search(complaint, done.text), done.text[:2000]


def test_a_missing_file_is_an_error(tool: Tool, trained: Path, prose: Path) -> None:
    done = tool("llama-perplexity", *args("llama-perplexity", trained, prose), "--cache-preset", "none.toml")
    assert done.refused
    assert "none.toml: can't be read" in done.text


def test_help_names_it(tool: Tool) -> None:
    assert "--cache-preset FNAME" in tool("llama-perplexity", "--help").text
    assert "--cache-preset" in tool("llama-bench", "--help").text


def test_a_draft_has_types_of_its_own(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The file is for the model alone, whatever shape its draft has."""
    path = written(tmp_path, tiny("layers12"), parse_types("turbo3 k=11:q8_0 cal=none sink=0 tail=16"))
    args = ("-md", str(tiny("head64")), "-c", "256", "--cache-preset", str(path))
    with serve(native_bin, tiny("layers12"), tmp_path, *args) as server:
        assert server.complete("def main(argv):\n    ", 8, n_probs=0)["tokens_predicted"] == 8
    text = server.said()
    begin = text.rindex("loading draft model")
    assert cache_lines(text[:begin])[-1].settings["k"] == "0-10:turbo3;11:q8_0"
    assert all(line.types == "f16" and not line.settings for line in cache_lines(text[begin:]))
