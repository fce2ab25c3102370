"""Where a KV cache has a type of its own: K or V of one layer. An allocation gives each of them a type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from turbo_gguf.cache.layer_map import Item, LayerMap
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import UsageError
from turbo_gguf.plan import memory
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.shape import Layer, Shape

Allocation = tuple[str, ...]
"""A type for each place."""

SIDES = ("k", "v")


class Place(msgspec.Struct, frozen=True):
    """K or V of one layer."""

    side: str  # "k" or "v"
    layer: int  # as layer maps count
    values: int  # of a token
    cells: int = 1  # of all its streams

    def bytes(self, name: str) -> int:
        """What it takes in a type."""
        return memory.row_bytes(name, self.values) * self.cells

    def __str__(self) -> str:
        """``K of layer 3``."""
        return f"{self.side.upper()} of layer {self.layer}"


def places(shape: Shape, context: Context) -> tuple[Place, ...]:
    """All places of a model: K of all layers that layer maps count, then V.

    Raises:
        UsageError: the model has none that can have a type of its own.
    """
    if shape.refusal:
        raise UsageError(f"turbo types can't be had on this model: {shape.refusal}")
    found: dict[int, tuple[Layer, int]] = {}
    for cache in shape.caches:
        size, streams = memory.cells(cache, context)
        found |= {layer.number: (layer, size * streams) for layer in cache.layers if not cache.indexer}
    held = [(i, *found[number]) for i, number in enumerate(shape.numbers) if number in found]
    made = [Place(side, i, getattr(layer, side), cells) for side in SIDES for i, layer, cells in held]
    return tuple(place for place in made if place.values)


def total(where: Sequence[Place], allocation: Allocation) -> int:
    """Bytes of an allocation."""
    return sum(place.bytes(name) for place, name in zip(where, allocation, strict=True))


def values(where: Sequence[Place]) -> int:
    """Values of all cells."""
    return sum(place.values * place.cells for place in where)


def bits(where: Sequence[Place], allocation: Allocation) -> float:
    """Bits per value of an allocation, on average over all values of the cache, without copies of exact tokens."""
    return 8 * total(where, allocation) / values(where)


def spec_of(where: Sequence[Place], allocation: Allocation, settings: CacheSpec) -> CacheSpec:
    """The cache specification of an allocation: on each side the most frequent type, and a map of the layers that have another.

    Args:
        where: the places.
        allocation: their types.
        settings: what else the cache is to have; its types do not matter.
    """
    named: dict[str, str] = {}
    maps: dict[str, LayerMap | None] = {}
    for side in SIDES:
        types = {place.layer: name for place, name in zip(where, allocation, strict=True) if place.side == side}
        counts = Counter(types.values()) or Counter([settings.k])
        base = max(counts, key=lambda name: (counts[name], cache_type(name).bits))
        named[side] = base
        others = sorted({name for name in types.values() if name != base}, key=lambda name: -cache_type(name).bits)
        items = [_item([layer for layer, own in types.items() if own == name], name) for name in others]
        maps[f"layers_{side}"] = LayerMap(tuple(items)) if items else None
    return msgspec.structs.replace(settings, **named, **maps, adaptive=None)


def _item(layers: Sequence[int], name: str) -> Item:
    """Ascending layers and their type: all runs in one item."""
    runs = LayerMap.of([(layer, name) for layer in layers]).items
    return Item(tuple(layers for run in runs for layers in run.ranges), name)
