"""The KV cache types that llama.cpp (patched) takes, with the sizes of their blocks.

The nominal numbers are only compared with what the log of a run says (:mod:`turbo_gguf.parse`); nothing else depends on them.
"""

from __future__ import annotations

import msgspec

from turbo_gguf.errors import UsageError
from turbo_gguf.records import CacheTypes


class CacheType(msgspec.Struct, frozen=True):
    """One block layout."""

    name: str
    block: int  # values
    size: int  # bytes of a block
    turbo: bool = False

    @property
    def bits(self) -> float:
        """Bits per value, scale included."""
        return 8 * self.size / self.block

    @property
    def is_quantized(self) -> bool:
        """Whether upstream rotates it (``ggml_is_quantized``)."""
        return self.block > 1


CACHE_TYPES: dict[str, CacheType] = {
    t.name: t
    for t in (
        CacheType("f32", 1, 4),
        CacheType("f16", 1, 2),
        CacheType("bf16", 1, 2),
        CacheType("q8_0", 32, 34),
        CacheType("q5_1", 32, 24),
        CacheType("q5_0", 32, 22),
        CacheType("q4_1", 32, 20),
        CacheType("q4_0", 32, 18),
        CacheType("iq4_nl", 32, 18),
        CacheType("turbo4", 32, 18, turbo=True),
        CacheType("turbo3", 32, 14, turbo=True),
        CacheType("turbo2", 32, 10, turbo=True),
    )
}

COMPETITORS = (CacheTypes("q8_0", "q8_0"), CacheTypes("q5_0", "q5_0"), CacheTypes("q4_0", "q4_0"))
"""Upstream's own types that every run measures beside ours."""

BASE = CacheTypes("f16", "f16")
"""The cache that all others are compared with."""


def cache_type(name: str) -> CacheType:
    """Look a type up by the name that ``-ctk`` takes.

    Raises:
        UsageError: no such type.
    """
    try:
        return CACHE_TYPES[name]
    except KeyError:
        raise UsageError(f"unknown cache type {name!r}", f"known: {', '.join(CACHE_TYPES)}; a pair is written K/V") from None


def parse_types(text: str) -> CacheTypes:
    """Read ``turbo3`` or ``turbo4/turbo3`` (K/V).

    Raises:
        UsageError: a name is not a cache type.
    """
    types = CacheTypes.parse(text)
    cache_type(types.k)
    cache_type(types.v)
    return types


def is_turbo(types: CacheTypes) -> bool:
    """Whether K or V is one of ours."""
    return cache_type(types.k).turbo or cache_type(types.v).turbo


def check_head_sizes(types: CacheTypes, head_k: int, head_v: int) -> None:
    """Refuse a head size that cannot be cut into blocks, before any tool runs.

    Raises:
        UsageError: names the head size and the types that do work.
    """
    for side, name, head in (("K", types.k, head_k), ("V", types.v, head_v)):
        block = cache_type(name).block
        if head % block:
            working = ", ".join(t.name for t in CACHE_TYPES.values() if head % t.block == 0)
            raise UsageError(
                f"cache type {name}: the {side} head size {head} of this model is not a multiple of its block of {block} values",
                f"types that work with head size {head}: {working}",
            )
