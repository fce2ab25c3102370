"""What turbo types get by default: the file of an automatic calibration, what is asked for instead, and warnings.

docs/reference/defaults.md is a list of these tests and of those in test_defaults_everywhere.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from cache_lines import cache_lines
from conftest import PLAIN, Tool
from default_settings import READS, TURBO, complete, digest_of, kept, line_of, words
from server import QUIET

pytestmark = pytest.mark.native

WROTE = "llama_turbo_calibrate: wrote "
FAILED = "the next start has to calibrate again: "

# --- our program ----------------------------------------------------------------------------------------------------------------

CHECKS = {
    "contexts": 13,
    "less-error": 3,
    "state": 11,
    "threads": 15,
    "interrupted": 5,
    "sizes": 20,
    "planned": 5,
    "kinds": 15,
    "no-vocabulary": 6,
}
"""Checks that a scenario makes at least: a program that checks nothing passes nothing."""

CASES = (
    *(("head64", scenario) for scenario in CHECKS),
    *(("bias", scenario) for scenario in ("contexts", "less-error", "planned")),
    *((model, "contexts") for model in ("head128", "partial64", "qk-norm", "layers4")),
    *((model, "planned") for model in ("swa6", "hybrid", "sinks")),
    ("layers12", "threads"),
)


@pytest.mark.parametrize(("model", "scenario"), [pytest.param(*case, id="-".join(case)) for case in CASES])
def test_defaults(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str) -> None:
    done = tool("test-turbo-defaults", tiny(model), scenario, "turbo3", "turbo3")
    assert done.rc == 0, done.text
    assert "FAIL" not in done.out
    assert done.out.endswith("all checks passed\n")
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS[scenario]


def test_a_failed_check_is_a_failure(tool: Tool, tiny: Callable[[str], Path]) -> None:
    done = tool("test-turbo-defaults", tiny("swa6"), "contexts", "turbo3", "turbo3")  # has two caches, no one of all layers
    assert done.rc == 1
    assert "FAIL" in done.out


# --- the file -------------------------------------------------------------------------------------------------------------------


def test_second_start_reads_the_file_of_the_first(tool: Tool, tiny: Callable[[str], Path], cache_folder: Path) -> None:
    first = complete(tool, tiny("head64"), *TURBO)
    (file,) = kept(cache_folder)
    assert re.fullmatch(r"turbo-calibration-[0-9a-f]{8}-[0-9a-f]{8}\.gguf", file.name)
    assert READS in first.text and f"{WROTE}{file}" in first.text
    assert line_of(first).settings == {"cal": digest_of(first), "sink": "4", "tail": "12"}
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    second = complete(tool, tiny("head64"), *TURBO)
    assert READS not in second.text
    assert (digest_of(second), second.out) == (digest_of(first), first.out)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert kept(cache_folder) == [file]


def test_one_file_for_all_quantizations(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path) -> None:
    other = tmp_path / "other.gguf"
    assert tool("llama-quantize", tiny("head64"), other, "q8_0").rc == 0
    first, second = (complete(tool, model, *TURBO) for model in (tiny("head64"), other))
    assert digest_of(first) == digest_of(second) and READS not in second.text
    assert len(kept(cache_folder)) == 1


def test_a_file_for_each_shape(tool: Tool, tiny: Callable[[str], Path], cache_folder: Path) -> None:
    """The norms of these models are the same: none of them overwrites what another has made."""
    models = [tiny(name) for name in ("head64", "head128", "layers4", "layers12")]
    digests = [digest_of(complete(tool, model, *TURBO)) for model in models]
    assert len(set(digests)) == len(kept(cache_folder)) == 4
    for model, digest in zip(models, digests, strict=True):
        again = complete(tool, model, *TURBO)
        assert digest_of(again) == digest and READS not in again.text


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "not GGUF", "another model's"])
def test_a_damaged_file_is_made_again(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path, damage: str) -> None:
    digest = digest_of(complete(tool, tiny("head64"), *TURBO))
    (file,) = kept(cache_folder)
    whole = file.read_bytes()
    others = tmp_path / "others"
    if damage == "another model's":
        complete(tool, tiny("qk-norm"), *TURBO, env={"LLAMA_CACHE": str(others)})
    file.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "zeros": bytes(len(whole)),
            "not GGUF": b"GGUF but no more",
            "another model's": kept(others)[0].read_bytes() if kept(others) else b"",
        }[damage]
    )
    again = complete(tool, tiny("head64"), *TURBO)
    assert "; it is made again" in again.text
    assert digest_of(again) == digest
    assert file.read_bytes() == whole and kept(cache_folder) == [file]


def test_a_value_that_is_not_finite_is_made_again(tool: Tool, tiny: Callable[[str], Path], cache_folder: Path) -> None:
    complete(tool, tiny("head64"), *TURBO)
    (file,) = kept(cache_folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    assert "is made again" in complete(tool, tiny("head64"), *TURBO).text
    assert file.read_bytes() == whole


@pytest.mark.parametrize("where", ["below a file", "/proc/no/such/folder", "a folder of that name"])
def test_a_folder_that_keeps_nothing(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path, where: str) -> None:
    folder = where
    if where == "below a file":
        (tmp_path / "file").write_text("")
        folder = str(tmp_path / "file" / "folder")
    elif where == "a folder of that name":
        complete(tool, tiny("head64"), *TURBO)
        (file,) = kept(cache_folder)
        file.unlink()
        file.mkdir()
        (file / "x").write_text("")
        folder = str(cache_folder)
    done = complete(tool, tiny("head64"), *TURBO, env={"LLAMA_CACHE": folder})
    assert done.text.count(FAILED) == 1
    assert "can't be written: " in done.text
    assert digest_of(done)
    assert not list(tmp_path.rglob("*.part"))


def test_where_the_folder_is(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    home, xdg = str(tmp_path / "home"), str(tmp_path / "xdg")
    for env, folder in (
        ({"LLAMA_CACHE": "", "XDG_CACHE_HOME": xdg, "HOME": home}, tmp_path / "xdg" / "llama.cpp"),
        ({"LLAMA_CACHE": "", "XDG_CACHE_HOME": "", "HOME": home}, tmp_path / "home" / ".cache" / "llama.cpp"),
    ):
        complete(tool, tiny("head64"), *TURBO, env=env)
        assert len([file for file in kept(folder) if file.name.startswith("turbo-calibration-")]) == 1


def test_no_folder_at_all(tool: Tool, tiny: Callable[[str], Path]) -> None:
    args = ("-m", tiny("head64"), *TURBO, "-p", "8", "-n", "0", "-r", "1", "-t", "1", "-v")
    done = tool("llama-bench", *args, env=dict.fromkeys(("LLAMA_CACHE", "XDG_CACHE_HOME", "HOME"), ""))
    assert done.rc == 0, done.text
    assert f"{FAILED}no cache folder (set LLAMA_CACHE)" in done.text
    assert digest_of(done)


def start(native_bin: Path, model: Path, folder: Path, name: str) -> subprocess.Popen[bytes]:
    args = ("-p", "once", "-n", "4", "-c", "256", "-no-cnv", "-t", "1", "-lv", "4", *TURBO)
    argv = [native_bin / "llama-completion", "-m", model, *args]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **QUIET}, cwd=folder)


def test_two_processes_at_once(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path) -> None:
    processes = [start(native_bin, tiny("layers12"), tmp_path, str(number)) for number in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    logs = [(tmp_path / f"{number}.log").read_text("utf-8", errors="replace") for number in range(2)]
    assert len({cache_lines(log)[-1].settings["cal"] for log in logs}) == 1
    assert [file.suffix for file in kept(cache_folder)] == [".gguf"]


def test_a_start_that_is_killed_leaves_nothing(
    native_bin: Path, tool: Tool, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path
) -> None:
    process = start(native_bin, tiny("partial128"), tmp_path, "killed")
    log = tmp_path / "killed.log"
    deadline = time.monotonic() + 30
    while READS not in log.read_text("utf-8", errors="replace") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert all(file.suffix == ".gguf" for file in kept(cache_folder))
    assert digest_of(complete(tool, tiny("partial128"), *TURBO))
    assert [file.suffix for file in kept(cache_folder)] == [".gguf"]


# --- what is asked for ----------------------------------------------------------------------------------------------------------

ASKED = {
    "default": ((), {"cal", "sink=4", "tail=12"}),
    "none": (("--cache-calibration", "none"), {"sink=4", "tail=12"}),
    "auto": (("--cache-calibration", "auto"), {"cal", "sink=4", "tail=12"}),
    "no exact tokens": (("--cache-sink", "0", "--cache-tail", "0"), {"cal"}),
    "no sink": (("--cache-sink", "0"), {"cal", "tail=12"}),
    "no tail": (("--cache-tail", "0"), {"cal", "sink=4"}),
    "sizes": (("--cache-sink", "2", "--cache-tail", "80"), {"cal", "sink=2", "tail=80"}),
    "nothing": (("--cache-calibration", "none", "--cache-sink", "0", "--cache-tail", "0"), set[str]()),
    "f16": (("-ctk", "f16", "-ctv", "f16"), set[str]()),
    "q8_0": (("-ctk", "q8_0", "-ctv", "q8_0"), set[str]()),
    "q4_0": (("-ctk", "q4_0", "-ctv", "q4_0", "--cache-calibration", "auto"), {"cal"}),
    "f16, auto": (("-ctk", "f16", "-ctv", "f16", "--cache-calibration", "auto"), {"cal"}),
    "K alone": (("-ctk", "turbo4", "-ctv", "f16"), {"cal", "sink=4", "tail=12"}),
    "V alone": (("-ctk", "q8_0", "-ctv", "turbo2"), {"cal", "sink=4", "tail=12"}),
    "one layer": (("-ctk", "f16", "-ctv", "f16", "--cache-type-v-layers", "-1:turbo3"), {"cal", "sink=4", "tail=12"}),
    "no layer": (("-ctk", "turbo3", "-ctv", "turbo3", "--cache-type-k-layers", "*:f16", "--cache-type-v-layers", "*:q8_0"), set[str]()),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("how", ["options", "variables"])
def test_what_is_asked_for(tool: Tool, tiny: Callable[[str], Path], how: str, asked: str) -> None:
    args, expected = ASKED[asked]
    env: dict[str, str] = {}
    if how == "variables":
        pairs = dict(zip(args[::2], args[1::2], strict=True))
        args = tuple(word for option, value in pairs.items() if not option.startswith("--") for word in (option, value))
        env = {f"TURBO_{option[2:].replace('-', '_').upper()}": value for option, value in pairs.items() if option.startswith("--")}
    done = complete(tool, tiny("head64"), *TURBO, *args, env=env)
    assert words(line_of(done)) == expected
    assert (READS in done.text) == ("cal" in expected)
    assert not [more for more in line_of(done).more if more.startswith("no ")]


def test_a_variable_that_is_empty_means_the_default(tool: Tool, tiny: Callable[[str], Path]) -> None:
    assert words(line_of(complete(tool, tiny("head64"), *TURBO, env=dict.fromkeys(PLAIN, "")))) == {"cal", "sink=4", "tail=12"}


def test_a_file_of_ones_own(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, cache_folder: Path) -> None:
    file = tmp_path / "own.gguf"
    made = tool("llama-turbo-calibrate", "-m", tiny("head64"), "-o", file, "-f", prose, "-n", "512")
    assert made.rc == 0, made.text
    done = complete(tool, tiny("head64"), *TURBO, "--cache-calibration", file)
    assert digest_of(done) in made.out and READS not in done.text and not kept(cache_folder)
    for model, wrong in ((tiny("head128"), file), (tiny("head64"), tmp_path / "missing.gguf"), (tiny("head64"), tiny("head64"))):
        args = ("-m", model, "-p", "once", "-n", "4", "-no-cnv", *TURBO, "--cache-calibration", wrong)
        refused = tool("llama-completion", *args, timeout=60)
        assert refused.refused and f"calibration {wrong}: " in refused.text, refused.text[-2000:]


def test_the_tool_calibrates_as_the_library(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    made = tool("llama-turbo-calibrate", "-m", tiny("head64"), "-o", tmp_path / "a.gguf", "-n", "768")
    assert digest_of(complete(tool, tiny("head64"), *TURBO)) in made.out


@pytest.mark.parametrize("model", ["head64", "sinks", "hybrid"])
def test_threads_change_nothing(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path, model: str) -> None:
    """A state that was saved with a calibration is read with one that was made anew."""
    digests = {
        digest_of(complete(tool, tiny(model), *TURBO, "-t", str(n), "-tb", str(n), env={"LLAMA_CACHE": str(tmp_path / str(n))}))
        for n in (1, 2)
    }
    assert len(digests) == 1


# --- warnings -------------------------------------------------------------------------------------------------------------------

RUINS = "biases of K of up to "
CURE = "is likely to ruin its answers: use --cache-calibration auto, or -ctk q8_0"


def test_biases_of_k_without_a_calibration(tool: Tool, tiny: Callable[[str], Path]) -> None:
    none = ("--cache-calibration", "none")
    for name in ("turbo3", "turbo4t", "q4_0"):
        done = complete(tool, tiny("bias"), "-ctk", name, *none)
        assert RUINS in done.text and f"K in {name} {CURE}" in done.text
    for args in ((), ("-ctk", "q8_0"), ("-ctk", "f16", "-ctv", "turbo3", *none), TURBO, ("-ctk", "q4_0", "--cache-calibration", "auto")):
        assert CURE not in complete(tool, tiny("bias"), *args).text, args
    assert CURE not in complete(tool, tiny("head64"), *TURBO, *none).text


def test_a_calibration_without_a_sink(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    assert tool("llama-turbo-calibrate", "-m", tiny("head64"), "-o", file).rc == 0
    distances = {"far": 9.5, "near": 1.2}
    for name, distance in distances.items():
        args = (*TURBO, "--cache-calibration", with_sink(file, tmp_path / f"{name}.gguf", distance), "--cache-sink")
        for sink in ("0", "1", "4"):
            done = complete(tool, tiny("head64"), *args, sink)
            warns = "is an attention sink of this model (its K lies 9.5 times as far" in done.text and "use --cache-sink 4" in done.text
            assert warns == (name == "far" and sink != "4"), (name, sink)


def with_sink(file: Path, out: Path, distance: float) -> Path:
    """A copy in which token 1 stands out."""
    reader = gguf.GGUFReader(file)
    data = bytearray(file.read_bytes())
    for key, value in (("sink", np.uint32(1)), ("sink_distance", np.float32(distance))):
        field = reader.fields[f"turbo.calibration.{key}"]
        start = field.offset + sum(part.nbytes for part in field.parts[:-1])
        data[start : start + 4] = value.tobytes()
    out.write_bytes(data)
    return out
