"""The guard against silent fallback: what ran, as the log tells it, against what was asked for.

Benchmarks of other projects have measured another type, another device or an unrotated cache without anyone noticing. A run
that differs from its case in any of these is an error and nothing of it is stored.

What a case leaves to the defaults must be in force, too: a turbo type has a calibration and exact tokens unless it is asked for without.
A run that could not have them measures something else, and the log says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from turbo_gguf.cache.layer_map import LayerMap
from turbo_gguf.cache.settings import AUTO, NONE
from turbo_gguf.cache.spec import CacheSpec, flash_attention, is_turbo, layer_types, measured, with_defaults, with_settings
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import SilentFallback, UsageError
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.measure.bits import Bits, nominal_bits
from turbo_gguf.measure.log import KvCache, LogFacts, decayed_cells, layers_of

BITS_ROUNDING = 0.0005 + 1e-6
"""Half of the last digit of the bits per value that the log gives, and a little more."""


def check(facts: LogFacts, types: CacheSpec, *, backend: str, model: ModelFile, base_splits: int | None = None) -> None:
    """Compare the log of a run with what was asked for.

    Args:
        facts: what the log says.
        types: cache types asked for.
        backend: "CPU", "CUDA", "ROCm" or "Vulkan".
        model: gives the head sizes, which decide whether upstream rotates, and the layers that types by layer count.
        base_splits: graph splits of the base run on the same device: more of them mean that attention left it.

    Raises:
        SilentFallback: names the first difference.
    """
    for where, cache in _named(facts):
        _check_spec(where, cache, types, model)
        _check_device(where, cache, backend)
    _check_calibrations(facts)
    _check_layers(facts, types, model)
    for where, cache in _named(facts):
        _check_rotation(where, cache, model)
        _check_logged_bits(where, cache, types, model)
        _check_decay(where, cache, types, model)
    _check_decays(facts, types)
    _check_context(facts, types, backend=backend, base_splits=base_splits)


def _named(facts: LogFacts) -> Iterator[tuple[str, KvCache]]:
    """The caches, each with what to call it."""
    for number, cache in enumerate(facts.caches, start=1):
        yield f"KV cache {number} of {len(facts.caches)}", cache


# --- specification and device ---------------------------------------------------------------------------------------------


def resolved(types: CacheSpec, layers: Sequence[Sequence[tuple[int, str]]], n_layers: int) -> CacheSpec:
    """What a log says of a cache that has these layers: maps name each layer once, and calibrations are known by their digests.

    Args:
        types: asked for.
        layers: those of the cache, of K and of V; their types in it do not matter.
        n_layers: layers of the model that have a KV cache.
    """
    maps: dict[str, LayerMap | None] = {"layers_k": None, "layers_v": None}
    if types.by_layer:
        asked = layer_types(types, n_layers)
        maps = {
            name: LayerMap.of([(layer, side[layer]) for layer, _ in found]) or None
            for name, side, found in zip(maps, asked, layers, strict=True)
        }
    return msgspec.structs.replace(types, **maps, adaptive=None, calibration=measured(types).calibration)


def in_force(types: CacheSpec, asked: CacheSpec, logged: CacheSpec) -> CacheSpec:
    """What a log must say of the settings that have defaults. It names what is in force, so what is off is not there.

    Which calibration ``auto`` is, and a tail by default that is shorter in a short context, is what the log says.

    Args:
        types: asked for.
        asked: the same with the defaults written out that apply.
        logged: what the log says.
    """
    calibration, tail = asked.calibration, asked.tail or 0
    if calibration == NONE:
        calibration = None
    elif calibration == AUTO and logged.calibration:
        calibration = logged.calibration
    if types.tail is None and 0 < (logged.tail or 0) <= tail:
        tail = logged.tail or 0
    return msgspec.structs.replace(asked, calibration=calibration, sink=asked.sink or None, tail=tail or None)


def _asked(types: CacheSpec, model: ModelFile) -> CacheSpec:
    """Types with the defaults written out that apply: one of ours is in a layer."""
    sides = layer_types(types, len(model.kv_heads))
    return with_defaults(types) if any(cache_type(name).turbo for side in sides for name in side) else types


def _check_spec(where: str, cache: KvCache, types: CacheSpec, model: ModelFile) -> None:
    """The cache is what was asked for."""
    if not cache.patched and (types.has_settings or is_turbo(types)):
        raise SilentFallback(f"{where}: the log has no llama_turbo_cache line; asked for was {types}")
    n_layers = len(model.kv_heads)
    try:
        layers = layers_of(cache, n_layers)
    except UsageError as error:
        raise SilentFallback(f"{where}: {error.message}") from error
    asked = resolved(_asked(types, model), layers, n_layers)
    _check_reasons(where, cache, types, asked)
    expected = in_force(types, asked, cache.spec)
    found = msgspec.structs.replace(cache.spec, layers_k=LayerMap.of(layers[0]) or None, layers_v=LayerMap.of(layers[1]) or None)
    if str(found) != str(expected):
        raise SilentFallback(f"{where} is {found}; asked for was {asked}")
    _check_parts(where, cache, asked, expected)


def _check_reasons(where: str, cache: KvCache, types: CacheSpec, asked: CacheSpec) -> None:
    """No default that the types should have is missing. What was asked for by name and cannot be had is an error of llama.cpp."""
    for what, reason, fields, off in (
        ("calibration", cache.no_calibration, ("calibration",), "cal=none"),
        ("exact tokens", cache.no_exact, ("sink", "tail"), "sink=0 tail=0"),
    ):
        if not reason:
            continue
        if not any(getattr(types, field) is None and getattr(asked, field) is not None for field in fields):
            raise SilentFallback(f"{where}: the log tells of no {what} ({reason}), as if they were the default; asked for was {types}")
        raise SilentFallback(
            f"{where}: {types} has no {what}, which it gets by default: {reason}",
            f"to measure it without, name that: '{with_settings(types, off)}'",
        )


def _check_parts(where: str, cache: KvCache, asked: CacheSpec, expected: CacheSpec) -> None:
    """What the settings need is at work: layers that are calibrated, copies of exact tokens."""
    for what, has, wanted in (
        ("calibrated layers", cache.calibrated, expected.calibration is not None),
        ("copies of exact tokens", cache.copies, expected.sink is not None or expected.tail is not None),
    ):
        if (has is not None) != wanted:
            raise SilentFallback(f"{where}: {what if has else 'no ' + what} do not go with {asked}")
    done = cache.calibrated
    if asked.calibration == AUTO and done and not (done.centered_k or done.scaled_k or done.centered_v or done.scaled_v):
        raise SilentFallback(f"{where}: no layer is calibrated; asked for was {asked}")


def _check_calibrations(facts: LogFacts) -> None:
    """All caches of a run have the same calibration: that of its model."""
    digests = list(dict.fromkeys(cache.spec.calibration.digest for cache in facts.caches if cache.spec.calibration))
    if len(digests) > 1:
        raise SilentFallback(f"the KV caches have different calibrations: {', '.join(digests)}")


def _check_device(where: str, cache: KvCache, backend: str) -> None:
    for buffer in cache.buffers:
        if not buffer.startswith(backend):
            raise SilentFallback(f"{where} lies in a {buffer} buffer; asked for was {backend}")
    if not cache.buffers:
        raise SilentFallback(f"{where}: the log names no buffer, so the device is unknown")


# --- layers ---------------------------------------------------------------------------------------------------------------


def _check_layers(facts: LogFacts, types: CacheSpec, model: ModelFile) -> None:
    """With types by layer, every layer of the model is in one cache."""
    if not types.by_layer:
        return
    n_layers = len(model.kv_heads)
    found: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for where, cache in _named(facts):
        for side, layers, count in zip("KV", layers_of(cache, n_layers), found, strict=True):
            if len(layers) != cache.layers:
                raise SilentFallback(f"{where} has {cache.layers} layers; its map of {side} names {len(layers)}")
            count.update(layer for layer, _ in layers)
    for side, count in zip("KV", found, strict=True):
        for layer in range(n_layers):
            if count[layer] != 1:
                raise SilentFallback(f"{side} of layer {layer} is in {count[layer]} KV caches; it must be in one")


def _types_of(cache: KvCache, model: ModelFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Type of K, and type of V, in each layer of a cache, as the log tells it."""
    k, v = (tuple(name for _, name in side) for side in layers_of(cache, len(model.kv_heads)))
    return k or (cache.spec.k,) * cache.layers, v or (cache.spec.v,) * cache.layers


def _check_logged_bits(where: str, cache: KvCache, types: CacheSpec, model: ModelFile) -> None:
    """The bits per value that the log gives are those of the block layouts."""
    if not model.uniform or not cache.patched:
        return
    for side, bits, logged in zip("KV", nominal_bits([cache], types, model), (cache.bits_k, cache.bits_v), strict=True):
        if logged is None or abs(bits - logged) > BITS_ROUNDING:
            raise SilentFallback(f"{where}: {side} has {logged} bits per value; the block layouts of its layers say {bits:.3f}")


# --- rotation -------------------------------------------------------------------------------------------------------------


def _check_rotation(where: str, cache: KvCache, model: ModelFile) -> None:
    """All layers of a cache are rotated, or none."""
    heads, told = (model.head_k, model.head_v), (cache.rot_k, cache.rot_v)
    for side, base, names, head, rotated in zip("KV", (cache.spec.k, cache.spec.v), _types_of(cache, model), heads, told, strict=True):
        expected = _is_rotated(base, names, head)
        text = ", ".join(dict.fromkeys(names))
        if expected is not None and rotated is None:
            raise SilentFallback(f"{where}: the log does not say whether {side} ({text}) is rotated")
        if expected not in (None, rotated):
            raise SilentFallback(f"{where}: {side} ({text}, head size {head}) is {'' if rotated else 'not '}rotated")


def _is_rotated(base: str, names: Sequence[str], head: int) -> bool | None:
    """Whether layers of these types must be rotated; ``None``: they may be. Upstream goes by what ``-ctk`` names, we by the layers."""
    kinds = [cache_type(name) for name in dict.fromkeys((base, *names))]
    quantized = any(kind.is_quantized for kind in kinds)
    if any(cache_type(name).turbo for name in names) or (head % 64 == 0 and quantized):
        return True
    return None if quantized else False  # None: upstream's types at head sizes that it does not rotate


# --- decay ----------------------------------------------------------------------------------------------------------------


def _check_decay(where: str, cache: KvCache, types: CacheSpec, model: ModelFile) -> None:
    """Decay is at work in all layers that can have it, unless the cache is a sliding window."""
    k, v = (sum(cache_type(name).decays for name in names) for names in _types_of(cache, model))
    able = types.decay and (k or v) and cache.no_decay != "sliding window"
    expected = (k, v) if able else None
    if cache.decaying != expected:
        raise SilentFallback(f"{where}: {_decaying(cache.decaying)}; it must be {_decaying(expected)} with {types}")


def _decaying(layers: tuple[int, int] | None) -> str:
    return "nothing decays" if layers is None else f"K of {layers[0]} and V of {layers[1]} layers decay"


def _check_decays(facts: LogFacts, types: CacheSpec) -> None:
    """The decay asked for is somewhere, and no other."""
    if types.decay and not any(cache.decaying for cache in facts.caches):
        raise SilentFallback(f"no KV cache decays (in a sliding window nothing does); asked for was {types}")
    if not types.decay and (facts.decayed or any(cache.no_decay for cache in facts.caches)):
        raise SilentFallback(f"the log tells of decay; asked for was {types}")


def check_decayed(facts: LogFacts, cells: int) -> None:
    """Compare how many cells decayed with how many must have: a run may announce decay and do too little, or only one side.

    Args:
        facts: of a log that :func:`check` has passed.
        cells: what each cache that decays must count, for K and for V, if it has layers that decay on that side.

    Raises:
        LogCut: the log ends without the count.
        SilentFallback: too few or too many.
    """
    announced = [cache.decaying for cache in facts.caches if cache.decaying]
    for side, decayed, layers in zip("KV", decayed_cells(facts), zip(*announced, strict=True) if announced else ((), ()), strict=True):
        caches = sum(number > 0 for number in layers)
        if decayed != cells * caches:
            raise SilentFallback(f"{decayed} cells of {side} decayed; it must have been {cells * caches}")


# --- the whole run --------------------------------------------------------------------------------------------------------


def _check_context(facts: LogFacts, types: CacheSpec, *, backend: str, base_splits: int | None) -> None:
    """Flash attention is on, or off for the base, and all of the work is on the device."""
    asked = "enabled" if flash_attention(types) else "disabled"
    if facts.flash_attn != asked:
        raise SilentFallback(f"flash attention is {facts.flash_attn or 'not in the log'}; asked for was {asked}")
    if not gpu_layers(backend):
        return
    if facts.offloaded is None or facts.offloaded[0] < facts.offloaded[1]:
        raise SilentFallback(f"only {facts.offloaded or 'no'} layers run on {backend}; asked for were all")
    if base_splits is not None and facts.splits is not None and facts.splits > base_splits:
        raise SilentFallback(
            f"{facts.splits} graph splits of {types}, {base_splits} of the base: part of attention runs on another device than {backend}"
        )


def check_bits(bits: Bits, types: CacheSpec) -> None:
    """Compare the nominal bits per value with what the cache sizes in the log allow.

    Raises:
        SilentFallback: the cache takes another amount of memory than the type's block layout says.
    """
    if not bits.agrees:
        raise SilentFallback(
            f"the cache of {types} takes {bits.low:.3f} to {bits.high:.3f} bits per value; its block layout says {bits.nominal:.3f}"
        )
