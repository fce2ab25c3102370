"""Rotation, context shift, sequences, state and sliding windows with turbo caches, through our test-turbo-cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from conftest import Tool

from turbo_gguf.codec import tables

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

TURBO = tuple(t.name for t in tables.SCALAR)
TRELLIS = tuple(t.name for t in tables.TRELLIS)
OTHERS = ("f16", "bf16", "q8_0", "q5_0", "q4_0")

TURBO_PAIRS = tuple(product(TURBO, TURBO))
MIXED_PAIRS = tuple(product(TURBO, OTHERS)) + tuple(product(OTHERS, TURBO))
FEW_PAIRS = (*((t, t) for t in TURBO), ("turbo3", "f16"), ("q8_0", "turbo4"), ("bf16", "turbo2"))
TRELLIS_PAIRS = (
    *((t, t) for t in TRELLIS),
    ("turbo4t", "turbo3t"),
    ("turbo3t", "turbo2"),
    ("turbo4", "turbo3t"),
    ("turbo3t", "f16"),
    ("q8_0", "turbo4t"),
)

SCENARIOS = ("rotation", "shift", "sequences", "state")

CHECKS = {"rotation": 14, "shift": 9, "sequences": 20, "state": 24, "swa": 17}
"""Checks that a scenario makes at least: a program that checks nothing passes nothing."""


def cases() -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Model, scenario, types of K and V: every pair at one head size, a few pairs at the others."""
    for scenario, pair in product(SCENARIOS, TURBO_PAIRS):
        yield "head128", scenario, pair
    for scenario, pair in product(("rotation", "shift", "state"), MIXED_PAIRS):
        yield "head128", scenario, pair
    for model, scenario, pair in product(("head64", "head96", "head192", "head256"), SCENARIOS, FEW_PAIRS):
        yield model, scenario, pair
    for model, scenario, pair in product(("partial64", "partial96", "partial128"), ("rotation", "shift"), FEW_PAIRS):
        yield model, scenario, pair
    for model, scenario, pair in product(("head64", "head128", "head192", "head256"), SCENARIOS, TRELLIS_PAIRS):
        yield model, scenario, pair
    for model, scenario, pair in product(("partial64", "partial128", "head192-128", "swa"), ("rotation", "shift"), TRELLIS_PAIRS):
        yield model, scenario, pair
    for model, scenario, pair in product(("head192-128", "swa"), ("rotation", "sequences", "state", "swa"), FEW_PAIRS):
        yield model, scenario, pair


@pytest.mark.parametrize(("model", "scenario", "types"), [pytest.param(*case, id="-".join((*case[:2], *case[2]))) for case in cases()])
def test_cache_life(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str, types: tuple[str, str]) -> None:
    done = tool("test-turbo-cache", tiny(model), scenario, *types)
    assert done.rc == 0, done.text
    assert "FAIL" not in done.out
    assert done.out.endswith("all checks passed\n")
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS[scenario]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_threads(tool: Tool, tiny: Callable[[str], Path], scenario: str) -> None:
    done = tool("test-turbo-cache", tiny("head128"), scenario, "turbo3", "turbo2", "-t", "2")
    assert done.rc == 0, done.text


def test_a_failed_check_is_a_failure(tool: Tool, tiny: Callable[[str], Path]) -> None:
    done = tool("test-turbo-cache", tiny("head128"), "swa", "turbo3", "turbo3")
    assert done.rc == 1
    assert "FAIL the model has a sliding window" in done.out


@pytest.mark.parametrize(
    "args", [("rotation", "turbo3"), ("rotation", "turbo3", "turbo9"), ("rotation", "f16", "f16"), ("x", "turbo3", "f16")]
)
def test_usage(tool: Tool, tiny: Callable[[str], Path], args: tuple[str, ...]) -> None:
    done = tool("test-turbo-cache", tiny("head64"), *args)
    assert done.rc == 2
    assert "usage: test-turbo-cache MODEL SCENARIO TYPE_K TYPE_V" in done.err
