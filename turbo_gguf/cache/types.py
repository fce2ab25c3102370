"""The KV cache types that llama.cpp (patched) takes, with the sizes of their blocks.

The nominal numbers are only compared with what the log of a run says (:mod:`turbo_gguf.measure.log`); nothing else depends on them.
"""

from __future__ import annotations

import msgspec

from turbo_gguf.errors import UsageError


class CacheType(msgspec.Struct, frozen=True):
    """One block layout."""

    name: str
    block: int  # values
    size: int  # bytes of a block
    turbo: bool = False
    decays: bool = False  # whether temporal decay takes a bit of it

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
        CacheType("turbo4", 32, 18, turbo=True, decays=True),
        CacheType("turbo3", 32, 14, turbo=True, decays=True),
        CacheType("turbo2", 32, 10, turbo=True),
        CacheType("turbo4t", 64, 34, turbo=True),
        CacheType("turbo3t", 64, 26, turbo=True),
        CacheType("turbo2t", 64, 18, turbo=True),
    )
}


def cache_type(name: str) -> CacheType:
    """Look a type up by the name that ``-ctk`` takes.

    Raises:
        UsageError: no such type.
    """
    try:
        return CACHE_TYPES[name]
    except KeyError:
        raise UsageError(f"unknown cache type {name!r}", f"known: {', '.join(CACHE_TYPES)}; a pair is written K/V") from None
