"""The search on models whose losses are known. Risks: a winner that is not the best, runs that come twice, a search that never ends."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from fake_meter import FLOOR, SHRINK, FakeMeter, bits, model_places, stats

from turbo_gguf.cache.settings import AUTO
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.tune import prices
from turbo_gguf.tune.places import total
from turbo_gguf.tune.search import Search

TYPES = ("turbo2t", "turbo3t", "turbo4t", "q8_0")
SETTINGS = CacheSpec("f16", "f16", calibration=AUTO, sink=4, tail=64)
LAYERS = 3
LOSSES = (0.01, 0.0003, 0.002, 0.00004, 0.0006, 0.0001)


def search(meter: FakeMeter, **options: object) -> Search:
    return Search(model_places(meter.layers), TYPES, SETTINGS, meter, **options)  # type: ignore[arg-type]


def limit(asked: float, layers: int = LAYERS) -> int:
    return int(asked * 64 * 2 * layers / 8)


def truth(meter: FakeMeter, size: int) -> float:
    """The least loss that any allocation has."""
    where = model_places(meter.layers)
    found = search(meter)
    fits = (one for one in itertools.product(TYPES, repeat=len(where)) if total(where, one) <= size)
    return min(meter.loss(found.spec(one)) for one in fits)


@pytest.mark.parametrize("asked", [2.25, 3.0, 3.25, 3.5, 3.75, 4.5, 8.5])
def test_where_losses_add_up_the_first_allocation_is_the_best(asked: float):
    meter = FakeMeter(LAYERS, LOSSES)
    made = search(meter)
    best = made.best(lambda: made.within(limit(asked)))
    assert best is not None
    assert bits(made.spec(best.allocation), LAYERS) <= asked
    assert best.stats.mean.value == pytest.approx(truth(meter, limit(asked)), rel=1e-6)
    assert best.expected == pytest.approx(best.stats.mean.value - FLOOR, rel=0.01)


def test_steps_correct_what_does_not_add_up():
    meter = FakeMeter(LAYERS, LOSSES, coupled=0.8)
    made = search(meter)
    first = made.within(limit(3.25))
    assert first is not None
    before = meter.loss(made.spec(first))
    best = made.best(lambda: made.within(limit(3.25)))
    assert best is not None
    assert best.stats.mean.value <= before
    assert best.stats.mean.value <= 1.05 * truth(meter, limit(3.25))
    assert abs(made.prices.additive["k"] - 1) > 0.1


def test_no_run_comes_twice_in_a_search():
    meter = FakeMeter(LAYERS, LOSSES, coupled=0.8)
    made = search(meter)
    made.best(lambda: made.within(limit(3.25)))
    rounds = [str(types) for types in meter.asked[1 + 2 * len(TYPES) + 2 * LAYERS :]]
    assert len(rounds) == len(set(rounds))


def test_time_ends_the_rounds_and_keeps_the_best():
    meter = FakeMeter(LAYERS, LOSSES, coupled=0.8)
    made = search(meter, until=0.0, clock=lambda: 1.0)
    asked = len(meter.asked)
    best = made.best(lambda: made.within(limit(3.25)))
    assert best is not None
    assert len(meter.asked) == asked + 1


def test_nothing_is_so_small():
    made = search(FakeMeter(LAYERS, LOSSES))
    assert made.best(lambda: made.within(limit(2.0))) is None


def test_the_smallest_for_a_limit_of_loss():
    meter = FakeMeter(LAYERS, LOSSES)
    made = search(meter)
    found = made.at_most(0.0005)
    assert found is not None
    assert meter.loss(made.spec(found)) - FLOOR <= 0.0005
    smaller = made.within(total(made.where, found) - 1)
    assert smaller is not None
    assert meter.loss(made.spec(smaller)) - FLOOR > 0.0005


# --- prices ---------------------------------------------------------------------------------------------------------------


def test_a_place_that_a_single_token_makes_dear_is_drawn_to_the_others():
    usual = [stats(0.001 * n) for n in range(1, 8)]
    outlier = msgspec.structs.replace(stats(0.002), mean=Metric(0.01, 0.008))
    sure = msgspec.structs.replace(stats(0.002), mean=Metric(0.01, 0.0005))
    found = prices.robust(stats(0.0), [*usual, outlier, sure])
    assert [one.value for one in found[:7]] == pytest.approx([0.001 * n for n in range(1, 8)], rel=0.01)
    assert 0.002 <= found[7].value < 0.004
    assert 0.009 < found[8].value <= 0.01


def test_more_bits_never_lose_more():
    table = search(FakeMeter(LAYERS, LOSSES)).prices
    before = table.price(0, "turbo3t").value
    table.learn_step(0, "turbo3t", "turbo4t", before=stats(0.01), after=stats(0.02))
    assert table.price(0, "turbo4t").value <= before
    assert table.price(0, "turbo3t").value == before


def test_types_differ_by_what_all_of_a_side_says():
    table = search(FakeMeter(LAYERS, LOSSES)).prices
    for name in TYPES:
        assert table.ratio("k", name) == pytest.approx(SHRINK[name], rel=0.01)
        assert math.isclose(table.price(2, name).value, LOSSES[2] * SHRINK[name], rel_tol=0.05)
