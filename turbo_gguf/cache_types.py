"""The KV cache types that llama.cpp (patched) takes, with the sizes of their blocks.

The nominal numbers are only compared with what the log of a run says (:mod:`turbo_gguf.parse`); nothing else depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from turbo_gguf import decay, layer_map
from turbo_gguf.errors import UsageError
from turbo_gguf.records import CacheTypes, ModelFile


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
    """Read ``turbo3``, ``turbo4/turbo3`` (K/V), or either with settings: see :class:`~turbo_gguf.records.CacheTypes`.

    What depends on the model is not checked here but by :func:`check_fit`.

    Raises:
        UsageError: a name is not a cache type, a setting is wrong, or settings contradict each other.
    """
    types = CacheTypes.parse(text)
    if types.adaptive and types.adaptive not in layer_map.MODES:
        known = ", ".join(map(str, layer_map.MODES))
        raise UsageError(f"cache type {text!r}: no layer-adaptive mode {types.adaptive}", f"modes are {known}")
    if types.adaptive and (types.layers_k or types.layers_v):
        raise UsageError(f"cache type {text!r}: a layer-adaptive mode and a layer map exclude each other", "leave one of them out")
    named = [cache_type(name) for side in named_types(types) for name in side]
    if types.decay:
        decay.shares(types.decay)
        if not any(kind.decays for kind in named):
            raise _nothing_decays(types)
    return _with_digest(types) if types.calibration else types


def _with_digest(types: CacheTypes) -> CacheTypes:
    """Add the digest of the calibration to its name: what is in the file is part of what is measured, its name is not enough."""
    from turbo_gguf import calibration  # noqa: PLC0415 - numpy is slow to import

    name, _, known = types.calibration.partition("#")
    found = calibration.digest(calibration.read(Path(name)))
    if known and known != found:
        raise UsageError(f"calibration {name}: its digest is {found}, not {known}: the file has changed", "leave #DIGEST out")
    return msgspec.structs.replace(types, calibration=f"{name}#{found}")


def _nothing_decays(types: CacheTypes) -> UsageError:
    able = ", ".join(kind.name for kind in CACHE_TYPES.values() if kind.decays)
    return UsageError(f"cache type {str(types)!r}: nothing in it decays", f"types that decay: {able}; leave decay out for others")


def maps(types: CacheTypes) -> tuple[str, str]:
    """Layer maps of K and V: those that are set, or those of the layer-adaptive mode."""
    return layer_map.MODES[types.adaptive] if types.adaptive else (types.layers_k, types.layers_v)


def named_types(types: CacheTypes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All types that K may have, and all that V may have, whatever the number of layers.

    Raises:
        UsageError: a map is wrong.
    """
    map_k, map_v = maps(types)
    return (types.k, *(item.type for item in layer_map.parse(map_k))), (types.v, *(item.type for item in layer_map.parse(map_v)))


def layer_types(types: CacheTypes, n_layers: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Type of K, and type of V, in each of the layers that have a KV cache.

    Raises:
        UsageError: a map names a layer that the model lacks.
    """
    map_k, map_v = maps(types)
    clip = bool(types.adaptive)
    return layer_map.expand(map_k, n_layers, types.k, clip=clip), layer_map.expand(map_v, n_layers, types.v, clip=clip)


def options(types: CacheTypes) -> Iterator[str]:
    """Options of llama.cpp's tools that ask for these types. What is not set is not named: other builds may not know it."""
    settings = {
        "-ctk": types.k,
        "-ctv": types.v,
        "--cache-type-k-layers": types.layers_k,
        "--cache-type-v-layers": types.layers_v,
        "--cache-layer-adaptive": str(types.adaptive or ""),
        "--cache-decay": types.decay,
        "--cache-calibration": types.calibration.partition("#")[0],
        "--cache-sink": str(types.sink or ""),
        "--cache-tail": str(types.tail or ""),
    }
    for option, value in settings.items():
        if value:
            yield from (option, value)


def is_turbo(types: CacheTypes) -> bool:
    """Whether K or V is one of ours, in some layer."""
    return any(cache_type(name).turbo for side in named_types(types) for name in side)


def check_fit(types: CacheTypes, model: ModelFile) -> None:
    """Refuse types that this model cannot have, before any tool runs.

    Raises:
        UsageError: head sizes, as :func:`check_head_sizes`; a layer that the model lacks; decay that no layer can have.
    """
    check_head_sizes(types, model.head_k, model.head_v)
    sides = layer_types(types, len(model.kv_heads))
    if types.decay and not any(cache_type(name).decays for side in sides for name in side):
        raise _nothing_decays(types)


def check_head_sizes(types: CacheTypes, head_k: int, head_v: int) -> None:
    """Refuse a head size that cannot be cut into blocks.

    Raises:
        UsageError: names the head size and the types that do work.
    """
    for side, names, head in zip("KV", named_types(types), (head_k, head_v), strict=True):
        for name in names:
            _check_head_size(name, side, head)


def _check_head_size(name: str, side: str, head: int) -> None:
    block = cache_type(name).block
    if head % block:
        working = ", ".join(t.name for t in CACHE_TYPES.values() if head % t.block == 0)
        raise UsageError(
            f"cache type {name}: the {side} head size {head} of this model is not a multiple of its block of {block} values",
            f"types that work with head size {head}: {working}",
        )
