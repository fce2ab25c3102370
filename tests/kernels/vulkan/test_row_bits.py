"""Rows of turbo types on lavapipe, bit for bit what the C reference stores and reads: ``row_bits.cpp`` compares them.

Two changed libraries show that it would notice a wrong table, of a decoder and of an encoder.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import gpu_root_tools
import lavapipe_runs
import lavapipe_tools
import pytest
from gpu_root_tools import Done, in_root

from turbo_gguf import patchset
from turbo_gguf.codec import tables
from turbo_gguf.make.upstream import fetch, resolve

pytestmark = pytest.mark.vulkan

SOURCE = Path(__file__).with_name("row_bits.cpp")

FLOATS = ("f32", "f16", "bf16")


@functools.cache
def program() -> Path:
    """The program, compiled against the CPU build; skips the test where there is no root."""
    gpu_root_tools.need_root()
    path = lavapipe_runs.logs("lavapipe") / "row_bits"
    path.parent.mkdir(parents=True, exist_ok=True)
    ggml = patchset.apply(fetch(resolve(None))).path / "ggml"
    libraries = lavapipe_tools.programs()
    options = ["-std=c++17", "-O1", "-DGGML_SHARED", "-DGGML_BACKEND_SHARED", f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"]
    links = [f"-L{libraries}", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run([os.environ.get("CXX", "c++"), *options, SOURCE, "-o", path, *links], check=True)
    return path


def row_bits(*types: str, log: str = "all", **more: str) -> Done:
    """Run it for some types, or all; ``log`` is a part of the name of its log."""
    path = program()
    command = [path, lavapipe_tools.DEVICE, *types]
    return in_root(command, cwd=path.parent, environment=lavapipe_tools.environment(**more), log=path.with_suffix(f".{log}.log"))


@functools.cache
def lines() -> list[str]:
    """What it says of all types: a line for each comparison."""
    done = row_bits()
    assert done.rc in (0, 1), done.err
    return re.findall(r"^(.+ (?:ok|FAIL): .*)$", done.out, re.MULTILINE)


def test_all_bits_are_equal() -> None:
    assert [line for line in lines() if "FAIL" in line] == []


@pytest.mark.parametrize("name", tables.BY_NAME)
def test_every_path_of_a_type_is_compared(name: str) -> None:
    written = [f"SET_ROWS {source} {index} {name}" for source in ("f32", "f16") for index in ("i32", "i64")]
    copied = [f"CPY {source} {name}" for source in FLOATS] + [f"CPY {name} {target}" for target in (*FLOATS, name)]
    rules = [f"rule {rule}: CPY f32 {name}" for rule in tables.Scale] if tables.BY_NAME[name].family == "scalar" else []
    compared = {line.split("  ")[0] for line in lines()}
    assert {*written, *copied, *rules} <= compared


def test_decay_is_compared() -> None:
    expected = {f"decay {t.name} rule {rule}" for t in tables.SCALAR if t.decays for rule in tables.Scale}
    assert {line.split("  ")[0] for line in lines() if line.startswith("decay")} == expected


@pytest.mark.parametrize(("lanes", "name"), [(4, "turbo3t"), (16, "turbo4")])
def test_bits_do_not_depend_on_the_size_of_a_subgroup(lanes: int, name: str) -> None:
    """Lavapipe's is that of the CPU's vectors, and smaller or larger ones can be asked for."""
    done = row_bits(name, log=f"{lanes}-lanes", LP_NATIVE_VECTOR_WIDTH=str(32 * lanes))
    assert f"warp size: {lanes} " in done.err
    assert done.rc == 0, done.out


def test_a_wrong_codebook_is_noticed() -> None:
    broken = lavapipe_runs.broken_library(lavapipe_runs.logs("lavapipe") / "broken-codebook")
    done = row_bits("turbo3t", log="codebook", GGML_BACKEND_PATH=str(broken))
    assert done.rc == 1
    assert re.search(r"CPY turbo3t f32 +FAIL", done.out)
    assert re.search(r"SET_ROWS f32 i32 turbo3t +ok", done.out)  # encoders have tables of their own


def test_a_wrong_threshold_is_noticed() -> None:
    """Of one step and magnitude, by one part in a hundred."""
    threshold = next(t for t in tables.SCALAR if t.name == "turbo3").thresholds[1][-1]
    change = {threshold.to_bytes(4, "little"): (threshold + 55).to_bytes(4, "little")}
    broken = lavapipe_runs.changed_library(lavapipe_runs.logs("lavapipe") / "broken-threshold", change)
    done = row_bits("turbo3", log="threshold", GGML_BACKEND_PATH=str(broken))
    assert done.rc == 1
    assert re.search(r"SET_ROWS f32 i32 turbo3 +FAIL", done.out)
    assert re.search(r"CPY turbo3 f32 +ok", done.out)
