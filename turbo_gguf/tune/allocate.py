"""The best types under a budget, exactly: a knapsack in which each place takes one of several types, by dynamic programming.

Losses add up (:mod:`turbo_gguf.tune.prices` says how well), so the least loss of the first n places for each number of bytes follows from
that of the first n - 1. One pass gives the whole curve of least loss against bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

MOST_STEPS = 1 << 18
"""Of the curve. Finer ones are rounded to it, so that no budget is ever exceeded; rows of real models need a few thousand."""

Choice = tuple[int, ...]
"""For each place, which of its options."""


class Front:
    """The least loss for each number of bytes."""

    def __init__(self, sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> None:
        """Solve it.

        Args:
            sizes: of each place, bytes of its options.
            losses: of each place, losses of its options.
        """
        self._least = [min(options) for options in sizes]
        extra = [[size - least for size in options] for options, least in zip(sizes, self._least, strict=True)]
        self._step = max(reduce(math.gcd, (size for options in extra for size in options), 0), 1)
        most = sum(max(options) for options in extra)
        self._step *= max(1, math.ceil(most / self._step / MOST_STEPS))
        self._steps = [[math.ceil(size / self._step) for size in options] for options in extra]
        self._length = sum(max(options) for options in self._steps) + 1
        self._sizes, self._losses = sizes, losses
        self._taken: list[npt.NDArray[np.intp]] = []
        best = np.full(self._length, np.inf)
        best[0] = 0.0
        for steps, prices in zip(self._steps, losses, strict=True):
            options = np.full((len(steps), self._length), np.inf)
            for row, (step, price) in enumerate(zip(steps, prices, strict=True)):
                options[row, step:] = best[: self._length - step] + price
            self._taken.append(np.argmin(options, axis=0))
            best = options[self._taken[-1], np.arange(self._length)]
        self._best: npt.NDArray[np.float64] = best

    @property
    def least(self) -> int:
        """Bytes of the smallest choice."""
        return sum(self._least)

    def within(self, limit: float) -> Choice | None:
        """The choice of least loss that takes so many bytes at most, the smallest of several; ``None``: none is so small."""
        room = math.floor((limit - self.least) / self._step)
        if room < 0:
            return None
        return self._choice(int(np.argmin(self._best[: room + 1])))

    def at_most(self, loss: float) -> Choice | None:
        """The smallest choice that loses so much at most, with the least loss for its size; ``None``: none does."""
        fits = np.flatnonzero(self._best <= loss)
        return self._choice(int(fits[0])) if len(fits) else None

    def _choice(self, step: int) -> Choice:
        found = []
        for taken, steps in zip(reversed(self._taken), reversed(self._steps), strict=True):
            option = int(taken[step])
            found.append(option)
            step -= steps[option]
        return tuple(reversed(found))

    def loss(self, choice: Choice) -> float:
        """Of a choice."""
        return sum(losses[option] for losses, option in zip(self._losses, choice, strict=True))
