"""Layer maps: cache types by layer, in the notation of llama.cpp's (patched) ``--cache-type-k-layers``.

::

    0-1,-2--1:q8_0;*:turbo3

Items are separated by ``;``. Each names layers, a type and all layers with ``*``; layers are single ones or ranges, separated by
commas. Counted are the layers that have a KV cache, from 0, negative ones from the end. The first item that names a layer counts.

The code shares nothing with that of llama.cpp, on purpose: what a log says about the layers is compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from turbo_gguf.cache.written import Written
from turbo_gguf.errors import UsageError

_RANGE = re.compile(r"(-?[0-9]+)(?:-(-?[0-9]+))?")
_HINT = "a map is LAYERS:TYPE;... with layers N, ranges N-M, lists N,M or *; -1 is the last: 0-1,-2--1:q8_0;*:turbo3"


class Item(msgspec.Struct, frozen=True):
    """Layers that get a type."""

    ranges: tuple[tuple[int, int], ...]  # first and last layer, as written
    type: str

    def __str__(self) -> str:
        """``0-1,-1:q8_0``."""
        return f"{','.join(_written(*layers) for layers in self.ranges)}:{self.type}"


class LayerMap(Written):
    """A map. Which layers there are, and which types, is not known here."""

    __slots__ = ("items",)

    def __init__(self, items: tuple[Item, ...] = ()) -> None:
        self.items = items

    @classmethod
    def parse(cls, text: str) -> LayerMap:
        """Read a map; an empty one has no items.

        Raises:
            UsageError: names the part that is wrong.
        """
        return cls(tuple(_item(part, text) for part in text.split(";")) if text else ())

    @classmethod
    def of(cls, types: Sequence[tuple[int, str]]) -> LayerMap:
        """The map that names these layers, in ascending order, each once: runs of equal types are ranges."""
        runs: list[list[tuple[int, str]]] = []
        for (before, old), (layer, new) in pairwise([(-2, ""), *types]):
            if layer == before + 1 and new == old:
                runs[-1].append((layer, new))
            else:
                runs.append([(layer, new)])
        return cls(tuple(Item(((run[0][0], run[-1][0]),), run[0][1]) for run in runs))

    def __str__(self) -> str:
        """The notation."""
        return ";".join(map(str, self.items))

    @property
    def types(self) -> tuple[str, ...]:
        """The types that it names."""
        return tuple(item.type for item in self.items)

    def pairs(self, n_layers: int, *, clip: bool = False) -> Iterator[tuple[int, str]]:
        """Each layer that the map names with its type, as often and in the order in which it is named.

        Args:
            n_layers: layers of the model that have a KV cache.
            clip: leave out layers that the model lacks.

        Raises:
            UsageError: the map names a layer that the model lacks.
        """
        for item in self.items:
            for first, last in item.ranges:
                for layer in _layers(first, last, n_layers, text=str(self), clip=clip):
                    yield layer, item.type

    def expand(self, n_layers: int, base: str, *, clip: bool = False) -> tuple[str, ...]:
        """Type of each layer; ``base`` where the map names none.

        Raises:
            UsageError: as :meth:`pairs`.
        """
        found: dict[int, str] = {}
        for layer, name in self.pairs(n_layers, clip=clip):
            found.setdefault(layer, name)
        return tuple(found.get(layer, base) for layer in range(n_layers))


def _written(first: int, last: int) -> str:
    if (first, last) == (0, -1):
        return "*"
    return str(first) if first == last else f"{first}-{last}"


def _item(part: str, text: str) -> Item:
    layers, _, name = part.partition(":")
    if not layers or not name:
        raise UsageError(f"layer map {text!r}: {part!r} is not LAYERS:TYPE", _HINT)
    return Item(tuple(_range(word, text) for word in layers.split(",")), name)


def _range(word: str, text: str) -> tuple[int, int]:
    if word == "*":
        return 0, -1
    match = _RANGE.fullmatch(word)
    if match is None:
        raise UsageError(f"layer map {text!r}: {word!r} is no layer N, no range N-M and not *", _HINT)
    return int(match[1]), int(match[2] or match[1])


def _layers(first: int, last: int, n_layers: int, *, text: str, clip: bool) -> range:
    begin, end = (layer + n_layers if layer < 0 else layer for layer in (first, last))
    if clip:
        return range(max(begin, 0), min(end, n_layers - 1) + 1)
    for written, layer in ((first, begin), (last, end)):
        if not 0 <= layer < n_layers:
            raise UsageError(
                f"layer map {text!r}: there is no layer {written}, the model has {n_layers} layers with a KV cache",
                f"layers are 0 to {n_layers - 1}, or -{n_layers} to -1 from the end",
            )
    if begin > end:
        raise UsageError(f"layer map {text!r}: the range {first}-{last} ends before it begins ({n_layers} layers)", _HINT)
    return range(begin, end + 1)


MODES: dict[int, tuple[LayerMap, LayerMap]] = {
    mode: (LayerMap.parse(k), LayerMap.parse(v))
    for mode, k, v in (
        (1, "0-3,-4--1:q8_0", "0-3,-4--1:q8_0"),
        (2, "-8--1:q8_0", "-8--1:q8_0"),
        (5, "", "0-1,-2--1:turbo4;*:turbo2"),
        (6, "", "-8--1:turbo4;*:turbo2"),
        (7, "", "0-1,-2--1:q8_0;*:turbo2"),
    )
}
"""Layer-adaptive modes, by the numbers that earlier systems gave them: the maps of K and V. What a model lacks is left out."""
