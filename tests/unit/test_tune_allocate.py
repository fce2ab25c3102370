"""The knapsack and the specifications that it ends in. Risks: an allocation that is not the best, takes too much, or is written wrongly."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_gguf.cache.settings import AUTO
from turbo_gguf.cache.spec import CacheSpec, layer_types, parse_types
from turbo_gguf.cache.types import SCALAR
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.shape import Cache, Layer, Shape
from turbo_gguf.tune import allocate, rivals
from turbo_gguf.tune.allocate import Front
from turbo_gguf.tune.places import Place, bits, places, spec_of, total

SETTINGS = CacheSpec("f16", "f16", calibration=AUTO, sink=4, tail=64)

options = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 220))
def test_no_choice_is_better(problem: list[list[tuple[int, int]]], limit: int):
    sizes = [[6 * size for size, _ in one] for one in problem]
    losses = [[float(loss) for _, loss in one] for one in problem]
    front = Front(sizes, losses)
    every = [
        (sum(sizes[i][o] for i, o in enumerate(choice)), sum(losses[i][o] for i, o in enumerate(choice)))
        for choice in itertools.product(*(range(len(one)) for one in problem))
    ]
    fits = [(loss, size) for size, loss in every if size <= 6 * limit]
    found = front.within(6 * limit)
    if not fits:
        assert found is None
    else:
        assert found is not None
        assert (front.loss(found), sum(sizes[i][o] for i, o in enumerate(found))) == min(fits)
    least = front.at_most(limit)
    enough = [(size, loss) for size, loss in every if loss <= limit]
    assert (least is None) == (not enough)
    if least is not None:
        assert sum(sizes[i][o] for i, o in enumerate(least)) == min(enough)[0]


def test_a_curve_that_is_too_fine_is_coarsened_and_never_exceeds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocate, "MOST_STEPS", 50)
    sizes, losses = [[100, 201, 397], [101, 200, 399], [99, 203, 401]], [[9.0, 4.0, 1.0]] * 3
    for limit in range(300, 1300, 7):
        found = Front(sizes, losses).within(limit)
        assert found is not None
        assert sum(sizes[i][o] for i, o in enumerate(found)) <= limit


def test_a_specification_gives_each_layer_its_type():
    where = tuple(Place(side, layer, 64) for side in "kv" for layer in range(6))
    allocation = ("turbo3t", "turbo3t", "turbo4t", "turbo3t", "q8_0", "turbo4t", *["turbo2t"] * 6)
    found = spec_of(where, allocation, SETTINGS)
    assert str(found) == "turbo3t/turbo2t k=4:q8_0;2,5:turbo4t cal=auto sink=4 tail=64"
    k, v = layer_types(parse_types(str(found)), 6)
    assert (*k, *v) == allocation


def test_bits_count_layers_by_their_values():
    where = (Place("k", 0, 128), Place("v", 0, 64))
    assert total(where, ("turbo2t", "turbo4t")) == 36 + 34
    assert bits(where, ("turbo2t", "turbo4t")) == pytest.approx((2 * 2.25 + 4.25) / 3)


def shape(**changes: object) -> Shape:
    full, near = Layer(0, 2, 64, 64), Layer(1, 2, 64, 64)
    caches = (Cache((full,)), Cache((near,), window=512))
    known = {"arch": "llama", "n_ctx_train": 8192, "n_embd": 64, "n_ff": 64, "n_head": 2, "n_vocab": 8, "weights": 1}
    return Shape(**{**known, "caches": caches, "numbers": (0, 1), **changes})  # type: ignore[arg-type]


def test_a_layer_with_a_window_weighs_what_it_keeps():
    found = places(shape(), Context(8192))
    assert [(place.side, place.layer, place.values) for place in found] == [("k", 0, 128), ("k", 1, 128), ("v", 0, 128), ("v", 1, 128)]
    assert found[0].cells == 8192
    assert found[1].cells == 1024


def test_rivals_are_all_pairs_of_a_family_near_the_budget():
    where = tuple(Place(side, layer, 64) for side in "kv" for layer in range(2))
    assert {str(pair) for pair in rivals.near(where, 3.75, lambda pair: True)} == {
        "turbo4t/turbo3t", "turbo3t/turbo4t", "turbo3", "turbo4/turbo2", "turbo2/turbo4", "turbo4/turbo3", "turbo3/turbo4",
    }  # fmt: skip
    scalar = rivals.near(where, 3.75, lambda pair: {pair.k, pair.v} <= set(SCALAR))
    assert {str(pair) for pair in scalar} == {"turbo3", "turbo4/turbo2", "turbo2/turbo4", "turbo4/turbo3", "turbo3/turbo4"}
    assert not rivals.near(where, 3.75, lambda pair: False)
    assert [str(pair) for pair in rivals.near(where, 9.0, lambda pair: True)] == ["turbo4"]
    assert math.isclose(rivals.bits_of(where, CacheSpec("turbo4t", "turbo2t")), 3.25)
