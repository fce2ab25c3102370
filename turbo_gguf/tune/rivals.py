"""What a user could type by hand: one type for K and one for V, whatever the layer. A search has to beat the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cache.types import SCALAR, TRELLIS
from turbo_gguf.tune.places import Place, bits

NEAR = 0.25
"""Bits per value by which a rival may differ from the budget: neighbouring pairs of a family lie half a bit apart."""


def bits_of(where: Sequence[Place], types: CacheSpec) -> float:
    """Bits per value of a type of K and a type of V."""
    return bits(where, tuple(types.k if place.side == "k" else types.v for place in where))


def near(where: Sequence[Place], budget: float, can_have: Callable[[CacheSpec], bool]) -> list[CacheSpec]:
    """All pairs of types of one family that take about so many bits per value, as a user types them.

    Args:
        where: the places.
        budget: bits per value.
        can_have: whether the model can have a pair.
    """
    pairs = [pair for family in (TRELLIS, SCALAR) for k, v in product(family, repeat=2) if can_have(pair := CacheSpec(k, v))]
    distances = [abs(bits_of(where, pair) - budget) for pair in pairs]
    if not distances:
        return []
    widest = max(NEAR, min(distances)) + 1e-9
    return [pair for pair, distance in zip(pairs, distances, strict=True) if distance <= widest]
