"""What each type loses in each place: a few measurements, and what follows from them.

Small errors of different places are independent, so their KL divergences add up. So one run per place tells its part: that place alone in
the *probe*, a type of few bits, and everything else in f16. Types differ by nearly the same factor in every place, so runs with all K, or
all V, in a type give those factors. What an allocation depends on is measured where it is used (:mod:`turbo_gguf.tune.search`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import msgspec

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cache.types import cache_type
from turbo_gguf.measure.metrics import KldStats, Metric
from turbo_gguf.tune.places import SIDES, Allocation, Place, spec_of

EXACT = "f16"
"""The type of places that are not looked at."""

_LEAST_SPREAD = 0.3
"""Of the ratio of means to medians, relative: medians are never believed more than this."""

_LEAST_ERROR = 0.1
"""Of a measured step, relative."""

_GUESSED = 0.3
"""Relative error of a price that follows from another type's."""


class Plan(msgspec.Struct, frozen=True):
    """Runs that give first prices."""

    floor: CacheSpec  # everything in f16
    probes: tuple[CacheSpec, ...]  # a place each
    sides: dict[tuple[str, str], CacheSpec]  # all of a side in a type, by side and type

    @property
    def runs(self) -> Iterator[CacheSpec]:
        """All of them."""
        yield self.floor
        yield from self.sides.values()
        yield from self.probes


def plan(where: Sequence[Place], types: Sequence[str], settings: CacheSpec) -> Plan:
    """What to run.

    Args:
        where: the places.
        types: candidates; the one of the fewest bits is the probe.
        settings: of all runs, with everything written out: f16 has no defaults.
    """
    probe = min(types, key=lambda name: cache_type(name).bits)

    def only(taken: Sequence[Place], name: str) -> CacheSpec:
        return spec_of(where, tuple(name if place in taken else EXACT for place in where), settings)

    sides = {
        (side, name): only([place for place in where if place.side == side], name)
        for side in SIDES
        for name in types
        if any(place.side == side for place in where)
    }
    return Plan(only([], probe), tuple(only([place], probe) for place in where), sides)


class Prices:
    """The loss of each type in each place, in nats, with standard errors. Measured steps correct it."""

    def __init__(self, where: Sequence[Place], types: Sequence[str], floor: KldStats, probes: Sequence[KldStats]) -> None:
        """Take the runs of a plan; :meth:`learn_side` takes those of the sides.

        Args:
            where: the places.
            types: candidates.
            floor: of the run with everything in f16.
            probes: of the runs with one place in the probe.
        """
        self.where, self.types = tuple(where), tuple(sorted(types, key=lambda name: cache_type(name).bits))
        self._probe = robust(floor, probes)
        self._floor = floor.mean.value
        self._side: dict[tuple[str, str], float] = {}
        self._known: dict[tuple[int, str], Metric] = {}

    def learn_side(self, side: str, name: str, stats: KldStats) -> None:
        """Take the run with all of a side in a type."""
        self._side[side, name] = max(stats.mean.value - self._floor, 0.0)

    @property
    def additive(self) -> dict[str, float]:
        """Of each side: the loss of all places in the probe at once, over the sum of what they lose alone."""
        probe = self.types[0]
        alone = {side: sum(p.value for place, p in zip(self.where, self._probe, strict=True) if place.side == side) for side in SIDES}
        return {side: self._side[side, probe] / alone[side] for side in SIDES if (side, probe) in self._side and alone[side] > 0}

    def ratio(self, side: str, name: str) -> float:
        """What a type loses on a side, over what the probe loses there."""
        probe = self._side[side, self.types[0]]
        return self._side[side, name] / probe if probe else 1.0

    def price(self, place: int, name: str) -> Metric:
        """The loss of a type in a place."""
        if (place, name) in self._known:
            return self._known[place, name]
        probe, ratio = self._probe[place], self.ratio(self.where[place].side, name)
        guessed = 0.0 if name == self.types[0] else _GUESSED * probe.value
        return Metric(probe.value * ratio, ratio * math.hypot(probe.error, guessed))

    def rows(self, types: Sequence[str]) -> list[list[float]]:
        """Losses of some types in all places."""
        return [[self.price(i, name).value for name in types] for i in range(len(self.where))]

    def loss(self, allocation: Allocation) -> float:
        """What an allocation is expected to lose."""
        return sum(self.price(i, name).value for i, name in enumerate(allocation))

    def learn_step(self, place: int, old: str, new: str, *, before: KldStats, after: KldStats) -> None:
        """Take a measured step of a place from one type to another.

        The price of the new type moves, weighted by the errors of the two. Both runs are of the same tokens, so what differs in their
        errors is what a few tokens bring: it is the error of the step.
        """
        start, guess = self.price(place, old), self.price(place, new)
        step = after.mean.value - before.mean.value
        expected = guess.value - start.value
        few = math.sqrt(abs(after.mean.error**2 - before.mean.error**2))
        own = math.hypot(few, _LEAST_ERROR * step)
        prior = math.hypot(guess.error, start.error) or own or 1.0
        weight = prior**2 / (prior**2 + own**2)
        moved = expected + weight * (step - expected)
        cheaper = cache_type(new).bits > cache_type(old).bits
        moved = min(moved, 0.0) if cheaper else max(moved, 0.0)  # more bits never lose more
        error = prior * own / math.hypot(prior, own) if own else 0.0
        self._known[place, old] = start
        self._known[place, new] = Metric(max(start.value + moved, 0.0), error)


def robust(floor: KldStats, probes: Sequence[KldStats]) -> list[Metric]:
    """Means above the floor, each drawn to what its median says.

    A few tokens carry most of a mean, so that of few tokens is unsure where one of them is far out. Its error says how much, and the ratio
    of means to medians is about the same in all places. So logarithms of both are weighted by their errors.
    """
    means = [max(one.mean.value - floor.mean.value, 0.0) for one in probes]
    medians = [max(one.median.value - floor.median.value, 0.0) for one in probes]
    logs = [math.log(mean / median) for mean, median in zip(means, medians, strict=True) if mean > 0 and median > 0]
    if len(logs) < 3:
        return [Metric(mean, one.mean.error) for mean, one in zip(means, probes, strict=True)]
    middle = statistics.median(logs)
    doubt = max(_LEAST_SPREAD, 1.4826 * statistics.median(abs(x - middle) for x in logs))
    found = []
    for mean, median, one in zip(means, medians, probes, strict=True):
        error = one.mean.error / mean if mean else 0.0
        if not (mean and median and error):
            found.append(Metric(mean, one.mean.error))
            continue
        weight = doubt**2 / (doubt**2 + error**2)
        value = mean**weight * (median * math.exp(middle)) ** (1 - weight)
        found.append(Metric(value, value * math.sqrt(weight) * error))
    return found
