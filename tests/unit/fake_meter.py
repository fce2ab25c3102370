"""A model whose losses are known: what each place loses in each type, and how much of it comes twice where neighbours are coarse."""

from __future__ import annotations

from collections.abc import Sequence

from measuring import result

from turbo_gguf.cache.spec import CacheSpec, layer_types
from turbo_gguf.cache.types import cache_type
from turbo_gguf.measure.metrics import KldStats
from turbo_gguf.measure.result import Result
from turbo_gguf.tune.places import Place

FLOOR = 0.000002
SHRINK = {
    "f16": 0.0,
    "q8_0": 0.0003,
    "q5_0": 0.016,
    "turbo4t": 0.045,
    "turbo3t": 0.2,
    "turbo2t": 1.0,
    "turbo4": 0.06,
    "turbo3": 0.25,
    "turbo2": 1.2,
}
"""Loss of each type, over that of turbo2t."""


def model_places(layers: int, values: int = 64) -> tuple[Place, ...]:
    """K of so many layers, then V."""
    return tuple(Place(side, layer, values) for side in "kv" for layer in range(layers))


class FakeMeter:
    """Measures specifications of a model of so many layers."""

    def __init__(
        self, layers: int, losses: Sequence[float], *, coupled: float = 0.0, floor: float = FLOOR, own: float = 1.0, long_tail: float = 1.0
    ) -> None:
        """Take what places lose in turbo2t.

        Args:
            layers: of the model.
            losses: of K of all layers, then of V.
            coupled: what two neighbouring layers lose together on top, over the geometric mean of both.
            floor: what f16 loses.
            own: factor of a calibration from a file.
            long_tail: factor of a tail of 128.
        """
        self.layers, self.losses, self.coupled, self.floor = layers, losses, coupled, floor
        self.own, self.long_tail = own, long_tail
        self.asked: list[CacheSpec] = []

    def loss(self, types: CacheSpec) -> float:
        """The truth."""
        sides = layer_types(types, self.layers)
        alone = [self.losses[i] * SHRINK[name] for i, name in enumerate((*sides[0], *sides[1]))]
        pairs = [(alone[i], alone[i + 1]) for i in range(len(alone) - 1) if i + 1 != self.layers]
        factor = self.own if types.calibration is not None and types.calibration.is_file else 1.0
        factor *= {128: self.long_tail, 32: 1.3}.get(types.tail or 0, 1.0)
        return self.floor + factor * (sum(alone) + self.coupled * sum((a * b) ** 0.5 for a, b in pairs))

    def results(self, asked: Sequence[CacheSpec]) -> list[Result]:
        """As a store would have them."""
        self.asked += asked
        return [result("q4_0", loss := self.loss(types), 0.01 * loss) for types in asked]

    def __call__(self, asked: Sequence[CacheSpec]) -> list[KldStats]:
        return [one.stats for one in self.results(asked)]

    def times(self, n: int) -> FakeMeter:
        """The same: it has no noise."""
        return self


def stats(mean: float) -> KldStats:
    """Of a mean."""
    return result("q4_0", mean, 0.01 * mean).stats


def bits(types: CacheSpec, layers: int) -> float:
    """Bits per value, where all places have as many values."""
    k, v = layer_types(types, layers)
    return sum(cache_type(name).bits for name in (*k, *v)) / (2 * layers)
