"""The guard against silent fallback: what ran, as the log tells it, against what was asked for.

Benchmarks of other projects have measured another type, another device or an unrotated cache without anyone noticing. A run
that differs from its case in any of these is an error and nothing of it is stored.
"""

from __future__ import annotations

import os

from turbo_gguf.cache_types import cache_type
from turbo_gguf.errors import SilentFallback, UsageError
from turbo_gguf.records import Bits, CacheTypes, LogFacts, ModelFile

_HARMLESS = ("LLAMA_CACHE", "LLAMA_OFFLINE")

BACKENDS = {"cpu": "CPU", "rocm": "ROCm", "hip": "ROCm", "cuda": "CUDA"}
"""First word of a preset's name -> prefix of the buffer names of its backend."""


def backend_of(preset: str) -> str:
    """Backend that a build of this preset must run on."""
    return BACKENDS.get(preset.partition("-")[0].lower(), "CPU")


def settings_in_environment(prefixes: tuple[str, ...] = ("GGML_", "TURBO_")) -> tuple[str, ...]:
    """Variables in force whose names start so, as NAME=value: part of what a case is. TURBO_GGUF_* are the driver's own.

    Raises:
        UsageError: a LLAMA_* variable is set that would change what is measured behind the back of the case.
    """
    bad = sorted(name for name in os.environ if name.startswith("LLAMA_") and name not in _HARMLESS)
    if bad:
        raise UsageError(
            f"the environment sets {', '.join(bad)}: llama.cpp would read it and measure something else",
            f"unset {' '.join(bad)}",
        )
    return tuple(sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(prefixes) and not k.startswith("TURBO_GGUF_")))


def check(facts: LogFacts, types: CacheTypes, *, backend: str, model: ModelFile, base_splits: int | None = None) -> None:
    """Compare the log of a run with what was asked for.

    Args:
        facts: what the log says.
        types: cache types asked for.
        backend: "CPU", "CUDA" or "ROCm".
        model: gives the head sizes, which decide whether upstream rotates.
        base_splits: graph splits of the f16 run on the same device: more of them mean that attention left it.

    Raises:
        SilentFallback: names the first difference.
    """
    for number, cache in enumerate(facts.caches):
        where = f"KV cache {number + 1} of {len(facts.caches)}"
        if (cache.type_k, cache.type_v) != (types.k, types.v):
            raise SilentFallback(f"{where} is K {cache.type_k} / V {cache.type_v}; asked for was K {types.k} / V {types.v}")
        for buffer in cache.buffers:
            if not buffer.startswith(backend):
                raise SilentFallback(f"{where} lies in a {buffer} buffer; asked for was {backend}")
        if not cache.buffers:
            raise SilentFallback(f"{where}: the log names no buffer, so the device is unknown")
        for side, name, head, rotated in (("K", types.k, model.head_k, cache.rot_k), ("V", types.v, model.head_v, cache.rot_v)):
            _check_rotation(where, side, name, head, rotated)
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


def _check_rotation(where: str, side: str, name: str, head: int, rotated: bool | None) -> None:
    kind = cache_type(name)
    if not kind.is_quantized:
        expected = False
    elif kind.turbo or head % 64 == 0:
        expected = True
    else:
        return  # upstream's types at head sizes that it does not rotate
    if rotated is None:
        raise SilentFallback(f"{where}: the log does not say whether {side} ({name}) is rotated")
    if rotated != expected:
        raise SilentFallback(f"{where}: {side} ({name}, head size {head}) is {'' if rotated else 'not '}rotated")


def check_bits(bits: Bits, types: CacheTypes) -> None:
    """Compare the nominal bits per value with what the cache sizes in the log allow.

    Raises:
        SilentFallback: the cache takes another amount of memory than the type's block layout says.
    """
    if not bits.agrees:
        raise SilentFallback(
            f"the cache of {types} takes {bits.low:.3f} to {bits.high:.3f} bits per value; its block layout says {bits.nominal:.3f}"
        )
