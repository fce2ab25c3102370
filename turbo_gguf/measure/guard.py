"""The guard against silent fallback: what ran, as the log tells it, against what was asked for.

Benchmarks of other projects have measured another type, another device or an unrotated cache without anyone noticing. A run
that differs from its case in any of these is an error and nothing of it is stored.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from turbo_gguf.cache import decay, layer_map
from turbo_gguf.cache.spec import CacheSpec, layer_types
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import SilentFallback, UsageError
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.measure import log
from turbo_gguf.measure.bits import Bits, nominal_bits
from turbo_gguf.measure.log import CacheDecay, KvCache, LogFacts

_HARMLESS = ("LLAMA_CACHE", "LLAMA_OFFLINE")

_CACHE_SETTINGS = (
    *("TURBO_CACHE_TYPE_K_LAYERS", "TURBO_CACHE_TYPE_V_LAYERS", "TURBO_LAYER_ADAPTIVE"),
    *("TURBO_DECAY", "TURBO_CALIBRATION", "TURBO_CACHE_SINK", "TURBO_CACHE_TAIL"),
)
"""What the options of a case set. From outside, they would change all cases, the f16 base included."""

BITS_ROUNDING = 0.0005 + 1e-6
"""Half of the last digit of the bits per value that the log gives for types by layer, and a little more."""

BACKENDS = {"cpu": "CPU", "rocm": "ROCm", "hip": "ROCm", "cuda": "CUDA"}
"""First word of a preset's name -> prefix of the buffer names of its backend."""


def backend_of(preset: str) -> str:
    """Backend that a build of this preset must run on."""
    return BACKENDS.get(preset.partition("-")[0].lower(), "CPU")


def settings_in_environment(prefixes: tuple[str, ...] = ("GGML_", "TURBO_")) -> tuple[str, ...]:
    """Variables in force whose names start so, as NAME=value: part of what a case is. TURBO_GGUF_* are the driver's own.

    Raises:
        UsageError: a LLAMA_* variable, or one with types by layer or decay, is set that would change what is measured behind the
            back of the case.
    """
    bad = sorted(name for name in os.environ if name.startswith("LLAMA_") and name not in _HARMLESS)
    if bad:
        raise UsageError(
            f"the environment sets {', '.join(bad)}: llama.cpp would read it and measure something else",
            f"unset {' '.join(bad)}",
        )
    if ours := [name for name in _CACHE_SETTINGS if name in os.environ]:
        raise UsageError(
            f"the environment sets {', '.join(ours)}: it would change every case, the f16 cache that all are compared with included",
            f"unset {' '.join(ours)}; ask for it in the type: --types 'turbo3 k=0,-1:q8_0', 'turbo3 adaptive=7', 'turbo3 decay=balanced'",
        )
    return tuple(sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(prefixes) and not k.startswith("TURBO_GGUF_")))


def check(facts: LogFacts, types: CacheSpec, *, backend: str, model: ModelFile, base_splits: int | None = None) -> None:
    """Compare the log of a run with what was asked for.

    Args:
        facts: what the log says.
        types: cache types asked for.
        backend: "CPU", "CUDA" or "ROCm".
        model: gives the head sizes, which decide whether upstream rotates, and the layers that types by layer count.
        base_splits: graph splits of the f16 run on the same device: more of them mean that attention left it.

    Raises:
        SilentFallback: names the first difference.
    """
    for where, cache in _named(facts):
        if (cache.type_k, cache.type_v) != (types.k, types.v):
            raise SilentFallback(f"{where} is K {cache.type_k} / V {cache.type_v}; asked for was K {types.k} / V {types.v}")
        for buffer in cache.buffers:
            if not buffer.startswith(backend):
                raise SilentFallback(f"{where} lies in a {buffer} buffer; asked for was {backend}")
        if not cache.buffers:
            raise SilentFallback(f"{where}: the log names no buffer, so the device is unknown")
    _check_layers(facts, types, model)
    for where, cache in _named(facts):
        names_k, names_v = _layers_of(cache, model)
        _check_rotation(where, "K", types.k, names_k, head=model.head_k, rotated=cache.rot_k)
        _check_rotation(where, "V", types.v, names_v, head=model.head_v, rotated=cache.rot_v)
    _check_decay(facts, types, model)
    _check_calibration(facts, types)
    _check_exact(facts, types)
    if facts.flash_attn != "enabled":
        raise SilentFallback(f"flash attention is {facts.flash_attn or 'not in the log'}; asked for was enabled")
    if backend == "CPU":
        return
    if facts.offloaded is None or facts.offloaded[0] < facts.offloaded[1]:
        raise SilentFallback(f"only {facts.offloaded or 'no'} layers run on {backend}; asked for were all")
    if base_splits is not None and facts.splits is not None and facts.splits > base_splits:
        raise SilentFallback(
            f"{facts.splits} graph splits with {types}, {base_splits} with f16: part of the attention runs on another device than {backend}"
        )


def _named(facts: LogFacts) -> Iterator[tuple[str, KvCache]]:
    """The caches, each with what to call it."""
    for number, cache in enumerate(facts.caches, start=1):
        yield f"KV cache {number} of {len(facts.caches)}", cache


def _layers_of(cache: KvCache, model: ModelFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Type of K, and type of V, in each layer of a cache, as the log tells it."""

    def names(text: str, base: str) -> tuple[str, ...]:
        return tuple(name for _, name in layer_map.pairs(text, len(model.kv_heads))) or (base,) * cache.layers

    return names(cache.layers_k, cache.type_k), names(cache.layers_v, cache.type_v)


# --- types by layer -------------------------------------------------------------------------------------------------------


def _check_layers(facts: LogFacts, types: CacheSpec, model: ModelFile) -> None:
    """Every layer of the model is in one cache, with the types asked for."""
    if not types.by_layer:
        for where, cache in _named(facts):
            if cache.layers_k or cache.layers_v:
                raise SilentFallback(f"{where} is K {cache.layers_k} / V {cache.layers_v} by layer; asked for was {types} in all layers")
        return
    asked_k, asked_v = layer_types(types, len(model.kv_heads))
    for side, asked, maps in (
        ("K", asked_k, [cache.layers_k for cache in facts.caches]),
        ("V", asked_v, [cache.layers_v for cache in facts.caches]),
    ):
        found: Counter[int] = Counter()
        for (where, cache), text in zip(_named(facts), maps, strict=True):
            found.update(_check_map(where, cache, f"{side} by layer", text, asked))
        for layer in range(len(asked)):
            if found[layer] != 1:
                raise SilentFallback(f"{side} of layer {layer} is in {found[layer]} KV caches; it must be in one")
    for where, cache in _named(facts):
        expected = nominal_bits([cache], types, model)
        for side, bits, logged in zip("KV", expected, (cache.bits_k, cache.bits_v), strict=True):
            if model.uniform and (logged is None or abs(bits - logged) > BITS_ROUNDING):
                raise SilentFallback(f"{where}: {side} has {logged} bits per value; the block layouts of its layers say {bits:.3f}")


def _check_map(where: str, cache: KvCache, what: str, text: str, asked: Sequence[str]) -> list[int]:
    """Compare what the log says about the layers of one cache with what was asked for; return which layers they are."""
    if not text:
        raise SilentFallback(f"{where}: {what} is not in the log")
    try:
        found = list(layer_map.pairs(text, len(asked)))
    except UsageError as error:
        raise SilentFallback(f"{where}: {what}: {error.message}") from error
    if len(found) != cache.layers:
        raise SilentFallback(f"{where} has {cache.layers} layers; {what} names {len(found)}: {text}")
    for layer, name in found:
        if name != asked[layer]:
            raise SilentFallback(f"{where}: {what}: layer {layer} is {name}; asked for was {asked[layer]}")
    return [layer for layer, _ in found]


# --- rotation -------------------------------------------------------------------------------------------------------------


def _check_rotation(where: str, side: str, base: str, names: Sequence[str], *, head: int, rotated: bool | None) -> None:
    """All layers of a cache are rotated, or none. Upstream decides by the type that ``-ctk`` names, ours by those of the layers."""
    kinds = [cache_type(name) for name in dict.fromkeys((base, *names))]
    if any(cache_type(name).turbo for name in names) or (head % 64 == 0 and any(kind.is_quantized for kind in kinds)):
        expected = True
    elif any(kind.is_quantized for kind in kinds):
        return  # upstream's types at head sizes that it does not rotate
    else:
        expected = False
    text = ", ".join(dict.fromkeys(names))
    if rotated is None:
        raise SilentFallback(f"{where}: the log does not say whether {side} ({text}) is rotated")
    if rotated != expected:
        raise SilentFallback(f"{where}: {side} ({text}, head size {head}) is {'' if rotated else 'not '}rotated")


# --- calibration ----------------------------------------------------------------------------------------------------------


def _check_calibration(facts: LogFacts, types: CacheSpec) -> None:
    """Every cache has the calibration asked for, or none has one."""
    asked = types.calibration.partition("#")[2]
    for where, cache in _named(facts):
        if cache.calibration != asked:
            raise SilentFallback(f"{where} has {cache.calibration or 'no'} calibration; asked for was {asked or 'none'}")


# --- exact sink and tail --------------------------------------------------------------------------------------------------


def _check_exact(facts: LogFacts, types: CacheSpec) -> None:
    """Every cache has the sink and tail asked for, or none has any."""
    asked = (types.sink, types.tail)
    for where, cache in _named(facts):
        found = (cache.exact.sink, cache.exact.tail) if cache.exact else (0, 0)
        if found != asked:
            raise SilentFallback(f"{where} has an exact sink of {found[0]} and tail of {found[1]} tokens; asked for was {types}")


# --- decay ----------------------------------------------------------------------------------------------------------------


def _check_decay(facts: LogFacts, types: CacheSpec, model: ModelFile) -> None:
    """The log announces the decay asked for, in each cache that can decay, and no other."""
    if not types.decay:
        if facts.decayed or any(cache.decay or cache.no_decay for cache in facts.caches):
            raise SilentFallback(f"the log tells of decay; asked for was {types}")
        return
    shares = decay.shares(types.decay)
    for where, cache in _named(facts):
        layers_k, layers_v = (sum(cache_type(name).decays for name in names) for names in _layers_of(cache, model))
        able = (layers_k or layers_v) and cache.no_decay != "sliding window"
        expected = CacheDecay(shares, layers_k, layers_v) if able else None
        if cache.decay != expected:
            raise SilentFallback(f"{where}: decay is {_words(cache.decay)}; asked for was {_words(expected)}")
    if not any(cache.decay for cache in facts.caches):
        raise SilentFallback(f"no KV cache decays (in a sliding window nothing does); asked for was {types}")


def _words(announced: CacheDecay | None) -> str:
    if announced is None:
        return "none"
    shares = announced.shares
    return f"{shares.hot},{shares.warm},{shares.cold} in K of {announced.layers_k} and V of {announced.layers_v} layers"


def check_decayed(facts: LogFacts, cells: int) -> None:
    """Compare how many cells decayed with how many must have: a run may announce decay and do too little, or only one side.

    Args:
        facts: of a log that :func:`check` has passed.
        cells: what each cache that decays must count, for K and for V, if it has layers that decay on that side.

    Raises:
        LogCut: the log ends without the count.
        SilentFallback: too few or too many.
    """
    decayed_k, decayed_v = log.decayed_cells(facts)
    announced = [cache.decay for cache in facts.caches if cache.decay]
    for side, decayed, caches in (
        ("K", decayed_k, sum(one.layers_k > 0 for one in announced)),
        ("V", decayed_v, sum(one.layers_v > 0 for one in announced)),
    ):
        if decayed != cells * caches:
            raise SilentFallback(f"{decayed} cells of {side} decayed; it must have been {cells * caches}")


def check_bits(bits: Bits, types: CacheSpec) -> None:
    """Compare the nominal bits per value with what the cache sizes in the log allow.

    Raises:
        SilentFallback: the cache takes another amount of memory than the type's block layout says.
    """
    if not bits.agrees:
        raise SilentFallback(
            f"the cache of {types} takes {bits.low:.3f} to {bits.high:.3f} bits per value; its block layout says {bits.nominal:.3f}"
        )
