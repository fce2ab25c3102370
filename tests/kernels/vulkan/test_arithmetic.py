"""Division and square root of the shaders, as C++: rounded to the nearest on devices that are wrong by some units in the last place."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from turbo_gguf.assets import patches_dir

SHADERS = patches_dir() / "overlay" / "ggml" / "src" / "ggml-vulkan" / "vulkan-shaders"
SOURCE = Path(__file__).with_name("arithmetic.cpp")
(OFF,) = map(int, re.findall(r"TURBO_OFF = (\d+);", (SHADERS / "turbo-arithmetic.glsl").read_text(encoding="utf-8")))


@functools.cache
def program(folder: Path) -> Path:
    """The compiled program."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = folder / "arithmetic"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-Wno-attributes", f"-I{SHADERS}", SOURCE, "-o", path],
        check=True,
    )
    return path


@pytest.mark.parametrize("units", [0, 1, 3, OFF - 1])
def test_the_device_may_be_wrong_by_some_units(units: int, tmp_path: Path) -> None:
    done = subprocess.run([program(tmp_path), str(units)], capture_output=True, text=True, check=False)
    assert done.stdout == "0 wrong\n"


def test_what_is_wrong_by_more_is_noticed(tmp_path: Path) -> None:
    done = subprocess.run([program(tmp_path), str(4 * OFF)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
