"""Attention with scores by integer dot products, on a driver for CPUs that computes them but says that they are slow.

Risk: a scalar type is unpacked to int8 by code that no other test runs, since upstream leaves these shaders to devices with fast ones.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import gpu_root_tools
import lavapipe_runs
import lavapipe_tools
import pytest
from backend_jobs import SCALAR, SMALL, Outcome, assert_equals_cpu, attention
from gpu_root_tools import REPOSITORY, checked, in_root

pytestmark = pytest.mark.vulkan

LAYER = "VK_LAYER_TURBO_int_dot"
SOURCES = REPOSITORY / "dev" / "vulkan"

PAIRS = {("turbo2", "f16"), ("turbo3", "turbo3"), ("turbo4", "turbo3t")}
JOBS = {
    "64": attention("64", SMALL + "nb=1,", pairs=PAIRS),
    "256": attention("256", SMALL + "nb=1,", pairs={("turbo3", "turbo3")}),
}
"""A head of 64 is cut into parts of a block for each lane, one of 256 into whole blocks."""


@functools.cache
def folder() -> Path:
    """Folder of all logs; skips the test where there is no root."""
    gpu_root_tools.need_root()
    return lavapipe_runs.logs("int-dot")


@functools.cache
def with_layer() -> dict[str, str]:
    """Variables with which a device says that its integer dot products are fast."""
    layer = folder() / "layer"
    layer.mkdir(parents=True, exist_ok=True)
    for name in ("int_dot.c", "int_dot.json"):
        shutil.copy(SOURCES / name, layer)
    compiler = '"$(hipconfig -l)/clang" -Wall -Werror -shared -fPIC -o int_dot.so int_dot.c'
    checked(in_root(["bash", "-c", compiler], cwd=layer, log=layer / "compile.log"), "compiling the layer")
    return {"VK_ADD_LAYER_PATH": str(layer), "VK_INSTANCE_LAYERS": LAYER}


@functools.cache
def outcome(size: str) -> Outcome:
    """The cases of a head size."""
    return lavapipe_runs.run_job(JOBS[size], folder() / size, **with_layer())


@pytest.mark.parametrize("more", [True, False], ids=["with-layer", "without"])
def test_the_layer_is_what_makes_the_difference(more: bool) -> None:
    command = ("test-backend-ops", "test", "-b", lavapipe_tools.DEVICE, "-o", "CONT", "-p", "nothing")
    done = lavapipe_tools.lavapipe(*command, cwd=folder() / f"device-{more}", **(with_layer() if more else {}))
    assert f"int dot: {int(more)}" in done.out + done.err


@pytest.mark.parametrize("size", JOBS)
def test_attention_equals_cpu(size: str) -> None:
    assert_equals_cpu(outcome(size))
    assert {case.parameters["type_K"] for case in outcome(size).cases} == (set(SCALAR) if size == "64" else {"turbo3"})
