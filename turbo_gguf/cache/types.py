"""The KV cache types that llama.cpp (patched) takes, with the sizes of their blocks.

Ours come from the one list, :mod:`turbo_gguf.codec.tables`; upstream's are rows here. The nominal numbers are only compared with what the
log of a run says (:mod:`turbo_gguf.measure.bits`); nothing else depends on them.
"""

from __future__ import annotations

import msgspec

from turbo_gguf.codec import tables
from turbo_gguf.errors import UsageError


class CacheType(msgspec.Struct, frozen=True):
    """One block layout."""

    name: str
    block: int  # values
    size: int  # bytes of a block
    family: str = ""  # "scalar" or "trellis"; "": upstream's
    decays: bool = False  # whether temporal decay takes a bit of it

    @property
    def turbo(self) -> bool:
        """Whether it is one of ours."""
        return bool(self.family)

    @property
    def bits(self) -> float:
        """Bits per value, scale included."""
        return 8 * self.size / self.block

    @property
    def is_quantized(self) -> bool:
        """Whether upstream rotates it (``ggml_is_quantized``)."""
        return self.block > 1


_UPSTREAM = (
    CacheType("f32", 1, 4),
    CacheType("f16", 1, 2),
    CacheType("bf16", 1, 2),
    CacheType("q8_0", 32, 34),
    CacheType("q5_1", 32, 24),
    CacheType("q5_0", 32, 22),
    CacheType("q4_1", 32, 20),
    CacheType("q4_0", 32, 18),
    CacheType("iq4_nl", 32, 18),
)

_OURS = tuple(CacheType(t.name, t.block, t.block_bytes, t.family, t.decays) for t in sorted(tables.ALL, key=lambda t: -t.bits))

CACHE_TYPES: dict[str, CacheType] = {t.name: t for t in (*_UPSTREAM, *_OURS)}
"""By the names that ``-ctk`` takes."""

SCALAR = tuple(t.name for t in _OURS if t.family == "scalar")
TRELLIS = tuple(t.name for t in _OURS if t.family == "trellis")
TURBO = tuple(t.name for t in _OURS)
"""Both families, in descending order of bits: what every default, suite and benchmark that shows "our types" takes."""

RIVALS = ("f16", "q8_0", "q4_0")
"""Upstream's types that benchmarks of speed show beside ours."""

QUANTIZED_RIVALS = tuple(name for name in RIVALS if CACHE_TYPES[name].is_quantized)


def cache_type(name: str) -> CacheType:
    """Look a type up by the name that ``-ctk`` takes.

    Raises:
        UsageError: no such type.
    """
    try:
        return CACHE_TYPES[name]
    except KeyError:
        raise UsageError(f"unknown cache type {name!r}", f"known: {', '.join(CACHE_TYPES)}; a pair is written K/V") from None
