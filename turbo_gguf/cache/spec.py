"""What a KV cache is asked to be: a type for K, one for V, and the settings that change them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.cache.layer_map import MODES, LayerMap
from turbo_gguf.cache.settings import BY_WORD, HINT, SETTINGS, CalibrationChoice
from turbo_gguf.cache.types import CACHE_TYPES, cache_type
from turbo_gguf.errors import UsageError

_WORDS = re.compile(rf"cal=.*?(?=\s+(?:{'|'.join(BY_WORD)})=|\s*$)|\S+", re.DOTALL)
"""Words of the notation. A calibration reaches to the next setting: the name of its file may have spaces."""


class CacheSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """The types of the K and of the V cache, by the names that llama.cpp's ``-ctk`` and ``-ctv`` take, and what changes them.

    Written ``turbo3`` (K and V) or ``turbo4/turbo3`` (K/V), then settings with spaces between::

        turbo3 k=0,-1:q8_0 v=0,-1:q8_0
        turbo3 adaptive=7
        turbo4/turbo3 decay=balanced
        q4_0 cal=auto sink=4 tail=64
        turbo3t cal=none sink=0 tail=0

    What is not written is left to llama.cpp: ``turbo3t`` is the type as a user types it, with what it gets by default
    (:func:`with_defaults`), and the last line is the plain type. Fields are ``None`` where nothing is written.

    What is not set is not encoded: the key of a case without settings does not depend on which settings there are. Nor does it depend on
    what the defaults are: they are a property of the build, as a calibration by default is one of build and model.
    """

    k: str
    v: str
    layers_k: LayerMap | None = None  # None: all layers are ``k``
    layers_v: LayerMap | None = None
    adaptive: int | None = None  # layer-adaptive mode instead of maps
    decay: DecayShares | None = None
    calibration: CalibrationChoice | None = None
    sink: int | None = None  # first and last tokens of each sequence that are attended in f16; 0: none, whatever the type
    tail: int | None = None

    @classmethod
    def parse(cls, text: str, *, logged: bool = False) -> CacheSpec:
        """Read the notation. Types are taken as they are; :func:`parse_types` checks them.

        Args:
            text: the notation.
            logged: it comes from a log, where a calibration is known by its digest.

        Raises:
            UsageError: a word is no setting, is there twice or has no value, or a value is wrong.
        """
        names, *words = _WORDS.findall(re.sub(r"^([^/=]*?)\s*/\s*", r"\1/", text)) or [""]
        k, pair, v = names.partition("/")
        return cls(k=k, v=v if pair else k, **_settings(words, text, logged=logged))

    def __str__(self) -> str:
        """The notation, in its shortest form: ``turbo3`` when K and V are equal, settings in the order of the table."""
        names = self.k if self.k == self.v else f"{self.k}/{self.v}"
        return " ".join([names, *(f"{row.word}={value}" for row in SETTINGS if (value := getattr(self, row.field)) is not None)])

    @property
    def by_layer(self) -> bool:
        """Whether layers may differ in type."""
        return bool(self.layers_k or self.layers_v or self.adaptive)

    @property
    def has_settings(self) -> bool:
        """Whether there is more to it than two names."""
        return any(getattr(self, row.field) is not None for row in SETTINGS)


def _settings(words: Iterable[str], text: str, *, logged: bool = False) -> dict[str, Any]:
    """Fields that words such as ``sink=4`` set; ``text`` is what errors name."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in BY_WORD or not value:
            raise UsageError(f"cache type {text!r}: {word!r} is no setting", HINT)
        if BY_WORD[name].field in found:
            raise UsageError(f"cache type {text!r}: {name} is set twice", HINT)
        found[BY_WORD[name].field] = _value(text, name, value, logged=logged)
    return found


def _value(text: str, word: str, value: str, *, logged: bool) -> Any:
    setting = BY_WORD[word]
    try:
        return ((logged and setting.parse_logged) or setting.parse)(value)
    except UsageError as error:
        raise UsageError(f"cache type {text!r}: {word}={value}: {error.message}", error.hint or HINT) from error


COMPETITORS = tuple(map(CacheSpec.parse, ("q8_0", "q5_0", "q4_0", "q4_0 sink=4 tail=64")))
"""Upstream's own types that every run measures beside ours; the last one has the exact tokens that ours have by default."""

BASE = CacheSpec("f32", "f32")
"""The cache that all others are compared with: nothing in it is rounded, and it is attended without flash attention."""

PLAIN = CacheSpec("f16", "f16")
"""What llama.cpp takes by itself: a row of every table, and what speeds are relative to."""


def flash_attention(types: CacheSpec) -> bool:
    """Whether a cache is attended with flash attention. It would round an f32 cache to f16 first."""
    return types != BASE


def parse_types(text: str) -> CacheSpec:
    """Read ``turbo3``, ``turbo4/turbo3`` (K/V), or either with settings: see :class:`CacheSpec`.

    What depends on the model is not checked here but by :func:`turbo_gguf.cache.fit.check_fit`.

    Raises:
        UsageError: a name is not a cache type, a setting is wrong, or settings contradict each other.
    """
    return checked(CacheSpec.parse(text))


def checked(types: CacheSpec) -> CacheSpec:
    """The same with the digest of its calibration, when it is one that :func:`parse_types` would take.

    Raises:
        UsageError: as there.
    """
    text = str(types)
    if types.adaptive and types.adaptive not in MODES:
        raise UsageError(f"cache type {text!r}: no layer-adaptive mode {types.adaptive}", f"modes are {', '.join(map(str, MODES))}")
    if types.adaptive and (types.layers_k or types.layers_v):
        raise UsageError(f"cache type {text!r}: a layer-adaptive mode and a layer map exclude each other", "leave one of them out")
    named = [cache_type(name) for side in named_types(types) for name in side]
    if types.decay and not any(kind.decays for kind in named):
        raise nothing_decays(types)
    if types.calibration is None or not types.calibration.is_file:
        return types
    return msgspec.structs.replace(types, calibration=_with_digest(types.calibration))


def _with_digest(asked: CalibrationChoice) -> CalibrationChoice:
    """Add the digest of what is in the file: it is part of what is measured, the name is not enough."""
    from turbo_gguf.cache import calibration  # noqa: PLC0415 - numpy is slow to import

    found = calibration.digest(calibration.read(Path(asked.path)))
    if asked.digest and asked.digest != found:
        message = f"calibration {asked.path}: its digest is {found}, not {asked.digest}: the file has changed"
        raise UsageError(message, "leave #DIGEST out")
    return CalibrationChoice(asked.path, found)


def nothing_decays(types: CacheSpec) -> UsageError:
    """The error of decay for types that have none."""
    able = ", ".join(kind.name for kind in CACHE_TYPES.values() if kind.decays)
    return UsageError(f"cache type {str(types)!r}: nothing in it decays", f"types that decay: {able}; leave decay out for others")


def measured(types: CacheSpec) -> CacheSpec:
    """What decides the numbers: a calibration from a file is known by its digest alone, wherever the file is."""
    if types.calibration is None or not types.calibration.digest:
        return types
    return msgspec.structs.replace(types, calibration=CalibrationChoice("", types.calibration.digest))


def with_settings(types: CacheSpec, settings: str) -> CacheSpec:
    """Add settings (``sink=0 tail=0``) to types with one of ours among them, where they do not name them; others are left as they are.

    Raises:
        UsageError: a setting is wrong.
    """
    added = _settings(settings.split(), f"{types} {settings}")
    if not is_turbo(types):
        return types
    return msgspec.structs.replace(types, **{name: value for name, value in added.items() if getattr(types, name) is None})


def with_defaults(types: CacheSpec) -> CacheSpec:
    """Write out what llama.cpp gives types with one of ours among them where they do not say otherwise. It lowers a tail by default for
    short contexts.
    """
    return with_settings(types, " ".join(f"{row.word}={row.default}" for row in SETTINGS if row.default))


def maps(types: CacheSpec) -> tuple[LayerMap, LayerMap]:
    """Layer maps of K and V: those that are set, or those of the layer-adaptive mode."""
    return MODES[types.adaptive] if types.adaptive else (types.layers_k or LayerMap(), types.layers_v or LayerMap())


def named_types(types: CacheSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All types that K may have, and all that V may have, whatever the number of layers."""
    map_k, map_v = maps(types)
    return (types.k, *map_k.types), (types.v, *map_v.types)


def layer_types(types: CacheSpec, n_layers: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Type of K, and type of V, in each of the layers that have a KV cache.

    Raises:
        UsageError: a map names a layer that the model lacks.
    """
    map_k, map_v = maps(types)
    clip = types.adaptive is not None
    return map_k.expand(n_layers, types.k, clip=clip), map_v.expand(n_layers, types.v, clip=clip)


def options(types: CacheSpec) -> Iterator[str]:
    """Options of llama.cpp's tools that ask for these types. What is not set is not named: other builds may not know it."""
    yield from ("-ctk", types.k, "-ctv", types.v)
    for setting in SETTINGS:
        if (value := getattr(types, setting.field)) is not None:
            yield from (setting.option, setting.to_option(value))


def is_turbo(types: CacheSpec) -> bool:
    """Whether K or V is one of ours, in some layer."""
    return any(cache_type(name).turbo for side in named_types(types) for name in side)


def file_name(types: CacheSpec) -> str:
    """A name for files about these types, which every file system takes.

    Settings hold what file names must not, and may be long: there a hash tells names apart that look alike.
    """
    text = str(types)
    name = re.sub(r"[^\w.]+", "-", text)
    return f"{name[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if types.has_settings else name
