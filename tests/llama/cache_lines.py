"""What the log of a patched llama.cpp tells of its KV caches: one line for each."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"llama_turbo_cache: (\S+)((?: \w+=\S+)*) \| rotated (\d)/(\d) \| bits ([\d.]+)/([\d.]+)(.*)")


@dataclass(frozen=True)
class CacheLine:
    """A line, in its parts."""

    types: str  # "turbo3", or "turbo4/turbo3"
    settings: dict[str, str]  # by word of the notation: k, v, decay, cal, sink, tail
    rotated: tuple[bool, bool]  # K, V
    bits: tuple[float, float]  # per value
    more: tuple[str, ...]  # such as "decaying 28/28"

    def type_of(self, side: str) -> str:
        """The type of K or of V where no map says otherwise."""
        return self.types.split("/")[0 if side == "K" else -1]


def cache_lines(text: str) -> list[CacheLine]:
    """All of them, in their order. Contexts that are made to measure memory come first."""
    return [
        CacheLine(
            types=types,
            settings=dict(word.split("=", 1) for word in settings.split()),
            rotated=(k == "1", v == "1"),
            bits=(float(bits_k), float(bits_v)),
            more=tuple(more.rstrip().split(" | ")[1:]),
        )
        for types, settings, k, v, bits_k, bits_v, more in _LINE.findall(text)
    ]
