"""Types by layer, through our test-turbo-layers, test-turbo-cache with maps, and the tools."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from cache_lines import cache_lines
from conftest import Tool

from turbo_gguf.cache.layer_map import LayerMap
from turbo_gguf.codec import tables

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

CHECKS = {
    "uniform": 12,
    "mixed": 46,
    "modes": 30,
    "state": 33,
    "shift": 24,
    "errors": 80,
    "flash-attn": 4,
    "head-size": 7,
    "contexts": 7,
    "device": 8,
}
"""Checks that a scenario makes at least: a program that checks nothing passes nothing."""

PAIRS = (("turbo4", "turbo2"), ("q8_0", "turbo3"))
"""Types that are far apart, so that a layer with the wrong one shows."""


def cases() -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Model, scenario, types that the maps put into layers."""
    for model, pair in product(("head128", "head96", "partial64", "swa6", "hybrid"), (*PAIRS, ("q4_0", "bf16"), ("f32", "q5_0"))):
        yield model, "uniform", pair
    for model, pair in product(("layers4", "layers12", "swa6", "hybrid"), PAIRS):
        yield model, "mixed", pair
    for model, pair in product(("layers4", "layers12", "swa6", "hybrid"), (("turbo3", "f16"), ("f16", "turbo4"), ("turbo3", "turbo3"))):
        yield model, "modes", pair
    for model, pair in product(("head128", "head96", "layers12", "swa6", "hybrid"), PAIRS):
        yield model, "state", pair
    for model in ("head64", "head96", "head128", "head192", "partial64", "partial96", "partial128", "layers12", "swa"):
        yield model, "shift", ("turbo3", "turbo3")
    for model in ("head64", "layers12", "hybrid"):
        yield model, "errors", ("turbo3", "f16")
    for pair in (*PAIRS, ("turbo3", "q4_0"), ("bf16", "q5_0")):
        yield "head128", "flash-attn", pair
    for model, pair in product(("head80", "head112"), PAIRS):
        yield model, "head-size", pair
    for model, pair in product(("head128", "hybrid"), PAIRS):
        yield model, "contexts", pair
    yield "head128", "device", ("turbo3", "q8_0")
    yield "layers12", "device", ("turbo4", "turbo2")


@pytest.mark.parametrize(("model", "scenario", "types"), [pytest.param(*case, id="-".join((*case[:2], *case[2]))) for case in cases()])
def test_layer_types(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str, types: tuple[str, str]) -> None:
    done = tool("test-turbo-layers", tiny(model), scenario, *types)
    assert done.rc == 0, done.text
    assert "FAIL" not in done.out
    assert done.out.endswith("all checks passed\n")
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) >= CHECKS[scenario]


MAPS = (("0:f16", ""), ("", "1:q8_0"), ("1:turbo2", "0:turbo4"), ("0:q4_0", "0:bf16"))


@pytest.mark.parametrize("maps", MAPS, ids=" ".join)
@pytest.mark.parametrize("scenario", ["rotation", "shift", "sequences", "state"])
@pytest.mark.parametrize("model", ["head96", "head128", "partial128"])
def test_cache_life_with_a_map(tool: Tool, tiny: Callable[[str], Path], model: str, scenario: str, maps: tuple[str, str]) -> None:
    """What holds for a turbo cache holds for one that has other types in some layers."""
    done = tool("test-turbo-cache", tiny(model), scenario, "turbo3", "turbo3", "-ctkl", maps[0], "-ctvl", maps[1])
    assert done.rc == 0, done.text


def test_a_failed_check_is_a_failure(tool: Tool, tiny: Callable[[str], Path]) -> None:
    done = tool("test-turbo-layers", tiny("layers4"), "mixed", "turbo3", "turbo3")
    assert done.rc == 1
    assert "FAIL control: these are far apart" in done.out


@pytest.mark.parametrize(
    "args", [("mixed", "turbo3"), ("mixed", "turbo3", "turbo9"), ("x", "turbo3", "f16"), ("mixed", "f16", "f16", "-ctkl")]
)
def test_usage(tool: Tool, tiny: Callable[[str], Path], args: tuple[str, ...]) -> None:
    done = tool("test-turbo-layers", tiny("head64"), *args)
    assert done.rc == 2
    assert "usage: test-turbo-layers MODEL SCENARIO TYPE_K TYPE_V" in done.err


# --- which layers have a KV cache ------------------------------------------------------------------------------------------------

ARCHS = (
    *("llama", "llama4", "gpt-oss", "gemma3n", "mimo2", "step35"),  # one cache or two, layers that reuse another's
    *("jamba", "falcon-h1", "granitehybrid", "nemotron_h", "plamo2", "qwen3next", "lfm2moe", "minimax-01"),  # recurrent layers
)


@pytest.mark.parametrize("arch", ARCHS)
def test_layers_of_an_architecture(tool: Tool, arch: str) -> None:
    """Upstream's tiny models of all kinds: each layer that has a cache is counted once, from 0, and no other."""
    env = {"TURBO_CACHE_TYPE_K_LAYERS": "0:bf16;*:f32", "TURBO_CACHE_TYPE_V_LAYERS": "-1:bf16;*:f32"}
    done = tool("test-llama-archs", "-s", "1", "-v", "5", "-a", arch, env=env)
    assert done.rc == 0, done.text[-3000:]
    contexts = done.text.split("constructing llama_context")[1:]
    assert contexts
    for log in contexts:
        n_layers = sum(map(int, re.findall(r"llama_kv_cache: size = .* (\d+) layers", log)))
        assert n_layers > 0
        for side, bf16 in (("K", 0), ("V", n_layers - 1)):
            logged = ";".join(line.settings[side.lower()] for line in cache_lines(log))
            named = sorted(LayerMap.parse(logged).pairs(n_layers))
            assert named == [(layer, "bf16" if layer == bf16 else "f32") for layer in range(n_layers)]


# --- the notation, against the driver's own reading of it ----------------------------------------------------------------------


MAP_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", *(t.name for t in tables.ALL))


def random_map(rng: random.Random, n_layers: int) -> str:
    """A valid map of up to four items."""

    def layer() -> int:
        return rng.randrange(-n_layers, n_layers)

    def layers() -> str:
        kind = rng.random()
        if kind < 0.1:
            return "*"
        if kind < 0.5:
            return str(layer())
        first, last = sorted((layer(), layer()), key=lambda number: number % n_layers)
        return f"{first}-{last}"

    def item() -> str:
        names = ",".join(layers() for _ in range(rng.randint(1, 3)))
        return f"{names}:{rng.choice(MAP_TYPES)}"

    return ";".join(item() for _ in range(rng.randint(1, 4)))


@pytest.mark.parametrize("seed", range(12))
def test_a_map_means_what_the_driver_reads(tool: Tool, tiny: Callable[[str], Path], seed: int) -> None:
    rng = random.Random(seed)
    maps = {side: random_map(rng, 12) for side in "KV"}
    env = {f"TURBO_CACHE_TYPE_{side}_LAYERS": text for side, text in maps.items()}
    args = ("-p", "once", "-n", "1", "-c", "128", "-no-cnv", "-t", "1", "-lv", "4", "-ctk", "q5_0")
    done = tool("llama-completion", "-m", tiny("layers12"), *args, env=env)
    assert done.rc == 0, done.text[-3000:]
    for side, base in (("K", "q5_0"), ("V", "f16")):
        logged = cache_lines(done.err)[-1].settings[side.lower()]
        assert LayerMap.parse(logged).expand(12, "none") == LayerMap.parse(maps[side]).expand(12, base), maps
