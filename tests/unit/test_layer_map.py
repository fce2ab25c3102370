"""Layer maps, modes and shares of decay. Risks: off by one from the end, a later item that wins, a layer that is not there."""

from __future__ import annotations

import pytest

from turbo_gguf.cache import decay, layer_map
from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.cache.layer_map import LayerMap
from turbo_gguf.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "b b b b"),
        ("0:x", "x b b b"),
        ("-1:x", "b b b x"),
        ("0,-1:x", "x b b x"),
        ("1-2:x", "b x x b"),
        ("-2--1:x", "b b x x"),
        ("1--2:x", "b x x b"),
        ("-4-1:x", "x x b b"),
        ("0-3:x", "x x x x"),
        ("*:x", "x x x x"),
        ("3,*:x", "x x x x"),
        ("0:x;*:y", "x y y y"),
        ("*:y;0:x", "y y y y"),  # the first that names a layer counts
        ("0-1:x;1-2:y", "x x y b"),
        ("2:x;2:y", "b b x b"),
    ],
)
def test_maps(text: str, expected: str) -> None:
    assert LayerMap.parse(text).expand(4, "b") == tuple(expected.split())


def test_map_of_the_documentation() -> None:
    found = LayerMap.parse("0-1,-2--1:q8_0;*:turbo3").expand(6, "f16")
    assert found == ("q8_0", "q8_0", "turbo3", "turbo3", "q8_0", "q8_0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (";", "'' is not LAYERS:TYPE"),
        ("0:x;", "'' is not LAYERS:TYPE"),
        ("0", "'0' is not LAYERS:TYPE"),
        (":x", "':x' is not LAYERS:TYPE"),
        ("0:", "'0:' is not LAYERS:TYPE"),
        ("a:x", "'a' is no layer N, no range N-M and not *"),
        ("0,:x", "'' is no layer"),
        ("1-:x", "'1-' is no layer"),
        ("1-2-3:x", "'1-2-3' is no layer"),
        ("--1:x", "'--1' is no layer"),
        ("1 :x", "'1 ' is no layer"),
        ("٣:x", "'٣' is no layer"),
    ],
)
def test_wrong_maps_name_the_part(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        LayerMap.parse(text)
    assert words in caught.value.message and repr(text) in caught.value.message and "LAYERS:TYPE" in caught.value.hint


@pytest.mark.parametrize("text", ["4:x", "-5:x", "2-4:x", "-5--1:x", "0,7:x", "*:y;9:x"])
def test_layer_that_the_model_lacks(text: str) -> None:
    with pytest.raises(UsageError, match=r"there is no layer -?\d, the model has 4 layers with a KV cache") as caught:
        LayerMap.parse(text).expand(4, "b")
    assert caught.value.hint == "layers are 0 to 3, or -4 to -1 from the end"


@pytest.mark.parametrize("text", ["2-1:x", "-1--2:x", "-1-0:x"])
def test_range_that_ends_before_it_begins(text: str) -> None:
    with pytest.raises(UsageError, match="ends before it begins"):
        LayerMap.parse(text).expand(4, "b")


def _mode(mode: int, n_layers: int) -> list[str]:
    """K and V of a mode over turbo3, a letter per layer."""
    short = {"turbo4": "4", "turbo3": "3", "turbo2": "2", "q8_0": "8"}
    maps = layer_map.MODES[mode]
    return ["".join(short[name] for name in text.expand(n_layers, "turbo3", clip=True)) for text in maps]


@pytest.mark.parametrize(
    ("mode", "n_layers", "k", "v"),
    [
        (1, 12, "888833338888", "888833338888"),
        (2, 12, "333388888888", "333388888888"),
        (5, 12, "333333333333", "442222222244"),
        (6, 12, "333333333333", "222244444444"),
        (7, 12, "333333333333", "882222222288"),
        (1, 4, "8888", "8888"),
        (2, 4, "8888", "8888"),
        (5, 4, "3333", "4444"),
        (6, 4, "3333", "4444"),
        (7, 5, "33333", "88288"),
        (1, 6, "888888", "888888"),
        (7, 1, "3", "8"),
        (1, 1, "8", "8"),
    ],
)
def test_modes_leave_out_what_the_model_lacks(mode: int, n_layers: int, k: str, v: str) -> None:
    assert _mode(mode, n_layers) == [k, v]


def test_pairs_name_layers_that_are_there_as_often_as_the_map_does() -> None:
    assert list(LayerMap.parse("-8--1:x;0:y").pairs(2, clip=True)) == [(0, "x"), (1, "x"), (0, "y")]
    assert list(LayerMap.parse("5:x;1:y").pairs(2, clip=True)) == [(1, "y")]


@pytest.mark.parametrize(
    ("text", "shortest"),
    [("0-1,-2--1:q8_0;*:turbo3", "0-1,-2--1:q8_0;*:turbo3"), ("0--1:x", "*:x"), ("2-2,3:x", "2,3:x"), ("00:x", "0:x"), ("", "")],
)
def test_maps_are_written_in_their_shortest_form(text: str, shortest: str) -> None:
    assert str(LayerMap.parse(text)) == shortest and LayerMap.parse(shortest) == LayerMap.parse(text)
    assert bool(LayerMap.parse(text)) == bool(text)


def test_a_map_of_layers_has_runs_as_ranges() -> None:
    assert str(LayerMap.of([(0, "x"), (1, "x"), (2, "y"), (4, "y")])) == "0-1:x;2:y;4:y"
    assert not LayerMap.of([])


# --- decay ----------------------------------------------------------------------------------------------------------------


def test_shares() -> None:
    assert DecayShares.parse("balanced") == DecayShares.parse("15,35,50") == DecayShares(hot=15, warm=35, cold=50)
    assert DecayShares.parse("0,0,100").cold == 100
    assert [str(DecayShares.parse(text)) for text in ("15,35,50", "0,0,100")] == ["balanced", "0,0,100"]
    assert all(s.hot + s.warm + s.cold == 100 for s in decay.PRESETS.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("off", "unknown decay 'off'"),
        ("Balanced", "unknown decay"),
        ("50", "unknown decay"),
        ("15,35", "unknown decay"),
        ("15,35,50,0", "unknown decay"),
        ("15, 35, 50", "unknown decay"),
        ("-5,55,50", "unknown decay"),
        ("15,35,51", "the percentages add up to 101, not to 100"),
        ("50,50,0", "nothing is cold"),
    ],
)
def test_wrong_shares(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DecayShares.parse(text)


def _simulated(ctx: int, batch: int, ubatch: int, cold: int) -> int:
    """Batch by batch, as llama-perplexity computes a chunk."""
    stored, decayed = 0, 0
    for begin in range(0, ctx, batch):
        end = min(begin + batch, ctx)
        while stored < end:
            decayed = max(decayed, 32 * ((stored * cold // 100) // 32))
            stored = min(stored + ubatch, end)
    return decayed


@pytest.mark.parametrize("cold", [5, 35, 50, 70, 100])
def test_cells_that_decay_in_a_chunk(cold: int) -> None:
    for ctx in (16, 100, 512, 1000, 1024, 4096):
        for batch in (1, 32, 128, 300, 512, 768, 2048):
            ubatch = min(batch, 512)
            assert decay.cells(ctx, batch, ubatch, cold) == _simulated(ctx, batch, ubatch, cold), (ctx, batch)


def test_cells_of_the_design() -> None:
    """32 floor(floor((C - U) cold / 100) / 32)."""
    assert decay.cells(1024, 128, 128, 50) == 448
    assert decay.cells(2048, 128, 128, 35) == 672
    assert decay.cells(512, 512, 512, 70) == 0
