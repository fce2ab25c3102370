"""What a KV cache is asked to be: a type for K, one for V, and the settings that change them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from turbo_gguf.cache import decay, layer_map
from turbo_gguf.cache.types import CACHE_TYPES, cache_type
from turbo_gguf.errors import UsageError


class CacheSpec(msgspec.Struct, frozen=True, order=True, omit_defaults=True):
    """The types of the K and of the V cache, by the names that llama.cpp's ``-ctk`` and ``-ctv`` take, and what changes them.

    Written ``turbo3`` (K and V) or ``turbo4/turbo3`` (K/V), then settings with spaces between::

        turbo3 k=0,-1:q8_0 v=0,-1:q8_0
        turbo3 adaptive=7
        turbo4/turbo3 decay=balanced
        q4_0 cal=model.calibration.gguf
        turbo3t sink=128 tail=512

    What is not set is not encoded: the key of a case without settings does not depend on which settings there are.
    """

    k: str
    v: str
    layers_k: str = ""  # layer map of K, see turbo_gguf.cache.layer_map; "": all layers are ``k``
    layers_v: str = ""
    adaptive: int = 0  # layer-adaptive mode instead of maps; 0: none
    decay: str = ""  # preset or HOT,WARM,COLD in percent, see turbo_gguf.cache.decay; "": none
    calibration: str = ""  # FILE#DIGEST, see turbo_gguf.cache.calibration; "": none
    sink: int = 0  # first and last tokens of each sequence that are attended in f16
    tail: int = 0

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Read the notation. Names and values are taken as they are; :func:`turbo_gguf.cache.spec.parse_types` checks them.

        Raises:
            UsageError: a word is no setting, is there twice or has no value, or what must be a number is none.
        """
        names, *words = re.sub(r"\s*/\s*", "/", text).split() or [""]
        k, pair, v = names.partition("/")
        found: dict[str, str] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in _SETTINGS or not value:
                raise UsageError(f"cache type {text!r}: {word!r} is no setting", _SETTINGS_HINT)
            if name in found:
                raise UsageError(f"cache type {text!r}: {name} is set twice", _SETTINGS_HINT)
            found[name] = value
        numbers = {}
        for name in ("adaptive", "sink", "tail"):
            value = found.get(name, "0")
            if not (value.isascii() and value.isdecimal()):
                raise UsageError(f"cache type {text!r}: {name}={value} is no number", _SETTINGS_HINT)
            numbers[name] = int(value)
        return cls(
            k=k,
            v=v if pair else k,
            layers_k=found.get("k", ""),
            layers_v=found.get("v", ""),
            adaptive=numbers["adaptive"],
            decay=found.get("decay", ""),
            calibration=found.get("cal", ""),
            sink=numbers["sink"],
            tail=numbers["tail"],
        )

    def __str__(self) -> str:
        """The notation, in its shortest form: ``turbo3`` when K and V are equal, settings in the order of :meth:`parse`."""
        names = self.k if self.k == self.v else f"{self.k}/{self.v}"
        values = (self.layers_k, self.layers_v, self.adaptive, self.decay, self.calibration, self.sink, self.tail)
        return " ".join([names, *(f"{name}={value}" for name, value in zip(_SETTINGS, values, strict=True) if value)])

    @property
    def by_layer(self) -> bool:
        """Whether layers may differ in type."""
        return bool(self.layers_k or self.layers_v or self.adaptive)

    @property
    def has_settings(self) -> bool:
        """Whether there is more to it than two names."""
        return self.by_layer or self.exact or bool(self.decay or self.calibration)

    @property
    def exact(self) -> bool:
        """Whether some tokens are attended in f16, whatever the types."""
        return bool(self.sink or self.tail)


_SETTINGS = ("k", "v", "adaptive", "decay", "cal", "sink", "tail")
_SETTINGS_HINT = (
    "settings are k=MAP, v=MAP, adaptive=MODE, decay=SHARES, cal=FILE, sink=TOKENS and tail=TOKENS, each once, spaces between: "
    "turbo3 decay=balanced"
)


COMPETITORS = (CacheSpec("q8_0", "q8_0"), CacheSpec("q5_0", "q5_0"), CacheSpec("q4_0", "q4_0"))
"""Upstream's own types that every run measures beside ours."""


BASE = CacheSpec("f16", "f16")
"""The cache that all others are compared with."""


def parse_types(text: str) -> CacheSpec:
    """Read ``turbo3``, ``turbo4/turbo3`` (K/V), or either with settings: see :class:`CacheSpec`.

    What depends on the model is not checked here but by :func:`check_fit`.

    Raises:
        UsageError: a name is not a cache type, a setting is wrong, or settings contradict each other.
    """
    types = CacheSpec.parse(text)
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


def _with_digest(types: CacheSpec) -> CacheSpec:
    """Add the digest of the calibration to its name: what is in the file is part of what is measured, its name is not enough."""
    from turbo_gguf.cache import calibration  # noqa: PLC0415 - numpy is slow to import

    name, _, known = types.calibration.partition("#")
    found = calibration.digest(calibration.read(Path(name)))
    if known and known != found:
        raise UsageError(f"calibration {name}: its digest is {found}, not {known}: the file has changed", "leave #DIGEST out")
    return msgspec.structs.replace(types, calibration=f"{name}#{found}")


def _nothing_decays(types: CacheSpec) -> UsageError:
    able = ", ".join(kind.name for kind in CACHE_TYPES.values() if kind.decays)
    return UsageError(f"cache type {str(types)!r}: nothing in it decays", f"types that decay: {able}; leave decay out for others")


def maps(types: CacheSpec) -> tuple[str, str]:
    """Layer maps of K and V: those that are set, or those of the layer-adaptive mode."""
    return layer_map.MODES[types.adaptive] if types.adaptive else (types.layers_k, types.layers_v)


def named_types(types: CacheSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All types that K may have, and all that V may have, whatever the number of layers.

    Raises:
        UsageError: a map is wrong.
    """
    map_k, map_v = maps(types)
    return (types.k, *(item.type for item in layer_map.parse(map_k))), (types.v, *(item.type for item in layer_map.parse(map_v)))


def layer_types(types: CacheSpec, n_layers: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Type of K, and type of V, in each of the layers that have a KV cache.

    Raises:
        UsageError: a map names a layer that the model lacks.
    """
    map_k, map_v = maps(types)
    clip = bool(types.adaptive)
    return layer_map.expand(map_k, n_layers, types.k, clip=clip), layer_map.expand(map_v, n_layers, types.v, clip=clip)


def options(types: CacheSpec) -> Iterator[str]:
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


def is_turbo(types: CacheSpec) -> bool:
    """Whether K or V is one of ours, in some layer."""
    return any(cache_type(name).turbo for side in named_types(types) for name in side)
