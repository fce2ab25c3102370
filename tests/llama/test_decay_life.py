"""Temporal decay: which cells decay, in every situation of a cache's life, through our test-turbo-decay and llama-perplexity."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from cache_lines import cache_lines
from conftest import Tool

from turbo_gguf.cache import decay

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

CHECKS = {
    "by-hand": 6,
    "chunks": 60,
    "state": 22,
    "twice": 3,
    "rewrite": 11,
    "sequences": 15,
    "shift": 11,
    "quality": 4,
    "graph": 2,
    "none": 17,
    "errors": 22,
    "device": 7,
}
"""Checks that a scenario makes at least: a program that checks nothing passes nothing."""

PAIRS = (("turbo3", "turbo4"), ("turbo4", "turbo3"))
ONE_SIDE = (("turbo3", "f16"), ("q8_0", "turbo4"))
LIFE = ("by-hand", "state", "twice", "rewrite", "sequences", "shift")


def cases() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Model, scenario, types and maps."""
    for scenario, pair in product(LIFE, (*PAIRS, *ONE_SIDE)):
        yield "head128", scenario, pair
    for model, scenario in product(("head64", "head96", "partial64"), LIFE):
        yield model, scenario, PAIRS[0]
    for scenario in ("state", "sequences", "shift"):
        yield "swa6", scenario, PAIRS[0]
    for model, pair in product(("head128", "swa6", "hybrid", "head192-128"), (PAIRS[0], ONE_SIDE[1])):
        yield model, "chunks", pair
    # turbo2 and q8_0 stay as they are in the first layer, others decay in the second one; and in every third layer
    yield "head128", "chunks", ("turbo3", "turbo3", "-ctkl", "0:turbo2", "-ctvl", "0:q8_0;1:turbo4")
    yield "swa6", "chunks", ("turbo2", "turbo2", "-ctkl", "1,4:turbo3", "-ctvl", "0-3:turbo4")
    yield "hybrid", "chunks", ("f16", "turbo3", "-ctkl", "-1:turbo3", "-ctvl", "1:q4_0")
    for scenario in ("by-hand", "state"):
        yield "head128", scenario, ("turbo3", "turbo3", "-ctkl", "0:turbo2", "-ctvl", "0:f16;1:turbo4")
    for pair in (*PAIRS, ("turbo3", "turbo3"), ("turbo4", "turbo4")):
        yield "head128", "quality", pair
    for model in ("head128", "swa6", "hybrid"):
        yield model, "graph", PAIRS[0]
    for scenario in ("none", "errors", "device"):
        yield "head128", scenario, PAIRS[0]
    yield "head128", "device", ONE_SIDE[1]


@pytest.mark.parametrize(("model", "scenario", "args"), [pytest.param(*case, id="-".join((*case[:2], *case[2]))) for case in cases()])
def test_decay_life(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str, args: tuple[str, ...]) -> None:
    done = tool("test-turbo-decay", tiny(model), scenario, *args)
    assert done.rc == 0, done.text
    assert "FAIL" not in done.out
    assert done.out.endswith("all checks passed\n")
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS[scenario]


@pytest.mark.parametrize("scenario", ["twice", "rewrite", "shift"])
def test_two_threads(tool: Tool, tiny: Callable[[str], Path], scenario: str) -> None:
    done = tool("test-turbo-decay", tiny("head128"), scenario, "turbo3", "turbo4", "-t", "2")
    assert done.rc == 0, done.text


@pytest.mark.parametrize("scale", ["ls", "ip"])
def test_other_scale_rules(tool: Tool, tiny: Callable[[str], Path], scale: str) -> None:
    for scenario in ("by-hand", "twice", "chunks"):
        done = tool("test-turbo-decay", tiny("head64"), scenario, "turbo3", "turbo4", env={"TURBO_SCALE": scale})
        assert done.rc == 0, done.text


def test_a_failed_check_is_a_failure(tool: Tool, tiny: Callable[[str], Path]) -> None:
    done = tool("test-turbo-decay", tiny("head64"), "chunks", "turbo2", "turbo2")
    assert done.rc == 1
    assert "FAIL" in done.out


@pytest.mark.parametrize("args", [("chunks", "turbo3"), ("chunks", "f16", "f16"), ("x", "turbo3", "turbo3")])
def test_usage(tool: Tool, tiny: Callable[[str], Path], args: tuple[str, ...]) -> None:
    done = tool("test-turbo-decay", tiny("head64"), *args)
    assert done.rc == 2
    assert "usage: test-turbo-decay MODEL SCENARIO TYPE_K TYPE_V" in done.err


# --- what llama-perplexity counts ----------------------------------------------------------------------------------------------

CHUNKS = 3


def counted(text: str) -> tuple[int, int, int]:
    """Passes, cells of K and cells of V, from the last line of the log."""
    found = re.findall(r"llama_turbo_cache: decay: (\d+) passes, (\d+) cells of K, (\d+) cells of V", text)
    assert len(found) == 1, text[-2000:]
    passes, cells_k, cells_v = map(int, found[0])
    return passes, cells_k, cells_v


def perplexity(tool: Tool, model: Path, text: Path, *args: str, env: dict[str, str] | None = None) -> str:
    """The log of a run over the first chunks of a text."""
    done = tool("llama-perplexity", "-m", model, "-f", text, "--chunks", str(CHUNKS), "-t", "1", "-lv", "4", *args, env=env)
    assert done.rc == 0, done.text[-3000:]
    assert re.search(r"Final estimate: PPL = \d+\.\d+ \+/- \d+\.\d+", done.text)
    return done.text


@pytest.mark.parametrize("case", [("conservative", 64), ("balanced", 96), ("aggressive", 128), ("80,0,20", 32), ("0,0,100", 192)])
@pytest.mark.parametrize("how", ["option", "variable"])
def test_perplexity_counts(tool: Tool, trained: Path, prose: Path, case: tuple[str, int], how: str) -> None:
    """192 of 256 tokens are stored when the last ubatch comes, and the passes before it each saw 64 more."""
    shares, cells = case
    cold = decay.DecayShares.parse(shares).cold
    assert cells == 32 * (192 * cold // 100 // 32) == decay.cells(256, 64, 64, cold)
    boundaries = {32 * (stored * cold // 100 // 32) for stored in (0, 64, 128, 192)}

    args, env = (("--cache-decay", shares), {}) if how == "option" else ((), {"TURBO_CACHE_DECAY": shares})
    text = perplexity(tool, trained, prose, "-c", "256", "-b", "64", "-ub", "64", "-ctk", "turbo3", "-ctv", "turbo4", *args, env=env)
    assert counted(text) == (CHUNKS * len(boundaries - {0}), CHUNKS * cells, CHUNKS * cells)


@pytest.mark.parametrize(("batch", "ubatch"), [(128, 32), (96, 64), (256, 48), (200, 200)])
def test_perplexity_in_other_pieces(tool: Tool, trained: Path, prose: Path, batch: int, ubatch: int) -> None:
    pieces = ("-c", "256", "-b", str(batch), "-ub", str(ubatch))
    text = perplexity(tool, trained, prose, *pieces, "-ctk", "turbo3", "-ctv", "turbo3", "--cache-decay", "aggressive")
    assert counted(text)[1:] == (CHUNKS * decay.cells(256, batch, ubatch, 70),) * 2


def test_perplexity_of_several_sequences_at_once(tool: Tool, trained: Path, prose: Path) -> None:
    """Three chunks in one batch: a third of each ubatch belongs to each of them."""
    pieces = ("-c", "256", "-b", "768", "-ub", "96")
    text = perplexity(tool, trained, prose, *pieces, "-ctk", "turbo4", "-ctv", "turbo4", "--cache-decay", "balanced")
    assert "n_seq=3" in text
    assert counted(text)[1:] == (CHUNKS * 32 * ((256 - 32) * 50 // 100 // 32),) * 2


@pytest.mark.parametrize(
    ("args", "sides"),
    [
        (("-ctk", "turbo3", "-ctv", "turbo2"), (1, 0)),
        (("-ctk", "f16", "-ctv", "turbo4"), (0, 1)),
        (("-ctk", "f16", "-ctv", "q8_0", "--cache-type-k-layers", "-1:turbo3", "--cache-type-v-layers", "0:turbo4"), (1, 1)),
        (("-ctk", "turbo2", "-ctv", "turbo2", "--cache-layer-adaptive", "5"), (0, 1)),
    ],
    ids=["K", "V", "map", "mode"],
)
def test_perplexity_counts_each_side(tool: Tool, trained: Path, prose: Path, args: tuple[str, ...], sides: tuple[int, int]) -> None:
    """Cells are counted once, whatever the number of layers; a side that has none counts none."""
    text = perplexity(tool, trained, prose, "-c", "256", "-b", "64", "-ub", "64", "--cache-decay", "balanced", *args)
    assert counted(text)[1:] == tuple(CHUNKS * 96 * side for side in sides)


def test_perplexity_is_worse_with_decay_and_nothing_else(tool: Tool, trained: Path, prose: Path) -> None:
    """Decay costs quality; without it, or where nothing can decay, every digit is the same."""

    def estimate(*args: str) -> str:
        text = perplexity(tool, trained, prose, "-c", "256", "-b", "64", "-ub", "64", *args)
        found: list[str] = re.findall(r"Final estimate: PPL = (\S+)", text)
        return found[0]

    turbo = ("-ctk", "turbo3", "-ctv", "turbo3")
    plain = estimate(*turbo)
    assert estimate(*turbo, "--cache-decay", "off") == plain
    assert estimate(*turbo, "--cache-decay", "balanced") != plain
    assert estimate("-ctk", "turbo2", "-ctv", "q8_0", "--cache-decay", "balanced") == estimate("-ctk", "turbo2", "-ctv", "q8_0")


MODES = {
    "1": ("0-3:q8_0", "0-3:q8_0"),
    "2": ("0-3:q8_0", "0-3:q8_0"),
    "5": ("0-3:turbo3", "0-3:turbo4"),
    "6": ("0-3:turbo3", "0-3:turbo4"),
    "7": ("0-3:turbo3", "0-3:q8_0"),
}
"""K and V by layer. The embedded model has 4 layers, so that a mode is one type in all of them."""


@pytest.mark.parametrize("mode", MODES)
def test_perplexity_in_each_mode(tool: Tool, trained: Path, prose: Path, mode: str) -> None:
    text = perplexity(tool, trained, prose, "-c", "256", "-ctk", "turbo3", "-ctv", "turbo3", "--cache-layer-adaptive", mode)
    settings = cache_lines(text)[-1].settings
    assert (settings["k"], settings["v"]) == MODES[mode]
