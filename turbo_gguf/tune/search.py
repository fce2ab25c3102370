"""The search: first prices, the best allocation for them, and corrections where it hangs on a price.

Each round measures steps of places that nearly had another type, at the allocation in hand, solves anew, and measures what comes out. It
ends when nothing better is promised, or time is up. What measured least is the winner, so no round makes it worse.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cache.types import cache_type
from turbo_gguf.measure.metrics import KldStats
from turbo_gguf.tune import prices
from turbo_gguf.tune.allocate import Front
from turbo_gguf.tune.places import Allocation, Place, spec_of
from turbo_gguf.tune.prices import Prices

Measure = Callable[[Sequence[CacheSpec]], list[KldStats]]
"""Measures specifications, all on the same tokens."""

STEPS = 12
"""That a round measures."""

ROUNDS = 4

WORTH = 0.01
"""Part of the loss that corrected prices must promise to gain, or no further allocation is measured."""


class Step(NamedTuple):
    """A place that gets another type."""

    place: int
    type: str


class Tried(msgspec.Struct, frozen=True):
    """An allocation that was measured."""

    allocation: Allocation
    stats: KldStats
    expected: float  # loss by the prices before it was measured


class Search:
    """The search on one model, with one set of types and settings."""

    def __init__(
        self,
        where: Sequence[Place],
        types: Sequence[str],
        settings: CacheSpec,
        measure: Measure,
        *,
        say: Callable[[str], None] = lambda text: None,
        until: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what is searched.

        Args:
            where: the places.
            types: candidates.
            settings: of all runs.
            measure: runs specifications.
            say: gets words about progress.
            until: time of ``clock`` after which no further round begins.
            clock: in seconds.
        """
        self.where, self.settings = tuple(where), settings
        self.types = tuple(sorted(types, key=lambda name: cache_type(name).bits))
        self._measure, self._say, self._until, self._clock = measure, say, until, clock
        self._measured: dict[Allocation, KldStats] = {}
        self.prices = self._first_prices()

    def _first_prices(self) -> Prices:
        asked = prices.plan(self.where, self.types, self.settings)
        self._say(f"prices: {len(list(asked.runs))} runs, a place or a side each")
        floor, *rest = self._measure(list(asked.runs))
        found = Prices(self.where, self.types, floor, rest[len(asked.sides) :])
        for (side, name), stats in zip(asked.sides, rest, strict=False):
            found.learn_side(side, name, stats)
        return found

    def spec(self, allocation: Allocation) -> CacheSpec:
        """Of an allocation."""
        return spec_of(self.where, allocation, self.settings)

    def front(self) -> Front:
        """Of the prices as they are."""
        return Front([[place.bytes(name) for name in self.types] for place in self.where], self.prices.rows(self.types))

    def within(self, limit: float) -> Allocation | None:
        """The best allocation of so many bytes by the prices as they are; ``None``: none is so small."""
        choice = self.front().within(limit)
        return None if choice is None else tuple(self.types[option] for option in choice)

    def at_most(self, loss: float) -> Allocation | None:
        """The smallest allocation that loses so much at most, by the prices as they are; ``None``: none does."""
        choice = self.front().at_most(loss)
        return None if choice is None else tuple(self.types[option] for option in choice)

    def best(self, solve: Callable[[], Allocation | None]) -> Tried | None:
        """The winner of all rounds.

        Args:
            solve: gives the best allocation by the prices as they are, such as :meth:`within` of a limit; ``None``: there is none.
        """
        first = solve()
        if first is None:
            return None
        best = self._try(first)
        tried = {first: best}
        for number in range(1, ROUNDS + 1):
            if self._clock() > self._until:
                self._say("time is up: the best so far is taken")
                break
            steps = self._hanging(best.allocation)
            if not steps:
                break
            self._say(f"round {number}: {len(steps)} steps from the best so far")
            self._learn(best, steps)
            again = solve()
            if again is None or again in tried or self.prices.loss(again) > (1 - WORTH) * self.prices.loss(best.allocation):
                break
            tried[again] = found = self._try(again)
            if found.stats.mean.value < best.stats.mean.value:
                best = found
        return best

    def _try(self, allocation: Allocation) -> Tried:
        expected = self.prices.loss(allocation)
        stats = self._stats([allocation])[0]
        self._say(f"expected {expected:.6f}, measured {stats.mean.value:.6f} ± {stats.mean.error:.6f}")
        return Tried(allocation, stats, expected)

    def _stats(self, allocations: Sequence[Allocation]) -> list[KldStats]:
        new = [one for one in allocations if one not in self._measured]
        self._measured |= zip(new, self._measure([self.spec(one) for one in new]), strict=True)
        return [self._measured[one] for one in allocations]

    def _learn(self, best: Tried, steps: Sequence[Step]) -> None:
        after = self._stats([_stepped(best.allocation, step) for step in steps])
        for step, stats in zip(steps, after, strict=True):
            old = best.allocation[step.place]
            self.prices.learn_step(step.place, old, step.type, before=best.stats, after=stats)

    def _hanging(self, allocation: Allocation) -> list[Step]:
        """Steps that nearly were in the allocation: the most gain for a byte more, and the least loss for a byte less."""
        up: list[tuple[float, Step]] = []
        down: list[tuple[float, Step]] = []
        for i, (place, old) in enumerate(zip(self.where, allocation, strict=True)):
            rank = self.types.index(old)
            for way, other in ((up, rank + 1), (down, rank - 1)):
                if not 0 <= other < len(self.types):
                    continue
                new = self.types[other]
                rate = (self.prices.price(i, old).value - self.prices.price(i, new).value) / (place.bytes(new) - place.bytes(old))
                if _stepped(allocation, Step(i, new)) not in self._measured:
                    way.append((rate, Step(i, new)))
        up.sort(key=lambda rated: -rated[0])
        down.sort(key=lambda rated: rated[0])
        return [step for _, step in (*up[: STEPS // 2], *down[: STEPS // 2])]


def _stepped(allocation: Allocation, step: Step) -> Allocation:
    return (*allocation[: step.place], step.type, *allocation[step.place + 1 :])
