"""What really ran, from the text of a log: pure functions, no files, no processes.

A patched llama.cpp says of each KV cache what it is, in the notation of :class:`~turbo_gguf.cache.spec.CacheSpec`::

    llama_turbo_cache: turbo3t cal=1a2b3c4d sink=4 tail=64 | rotated 1/1 | bits 3.250/3.250 | calibrated K ... | copies ...

It names what is in force, so what is not there is off. Where a type should have had a calibration or exact tokens by default, and could
not, the line ends with the reason.

Other builds do not; of them, upstream's own lines tell types and rotation. These lines are of level trace: the tool has to run with
``-lv 4``. Everything but statistics goes to standard error, with a prefix of time and level (``0.00.123.456 I``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from turbo_gguf.cache.layer_map import LayerMap
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import LogCut, LogNotUnderstood, UsageError


class DecayCount(msgspec.Struct, frozen=True):
    """What one ``llama_kv_cache`` did when it was freed: tokens, each counted once for all layers."""

    passes: int
    cells_k: int
    cells_v: int


class Calibrated(msgspec.Struct, frozen=True):
    """Layers whose K and V a calibration changes."""

    centered_k: int
    scaled_k: int
    centered_v: int
    scaled_v: int
    layers: int


class Copies(msgspec.Struct, frozen=True):
    """The f16 copies of the exact tokens."""

    rows: int  # that there is room for, per stream
    streams: int
    mib: float  # of K and V of all layers and streams, rounded to 0.01 by the tool


class KvCache(msgspec.Struct, frozen=True):
    """One ``llama_kv_cache`` of the log. A model with sliding-window attention has two."""

    mib_k: float  # rounded to 0.01 by the tool
    mib_v: float
    cells: int  # per stream
    layers: int
    streams: int
    buffers: tuple[str, ...]  # names of the backend buffers that hold it
    spec: CacheSpec = CacheSpec("", "")  # what it is; its layer maps name each layer of this cache once. "": stored before schema 2
    patched: bool = False  # whether the line of our patches told it, or upstream's own lines
    rot_k: bool | None = None  # None: the log does not say
    rot_v: bool | None = None
    bits_k: float | None = None  # bits per value of its tensors, rounded to 0.001
    bits_v: float | None = None
    calibrated: Calibrated | None = None
    decaying: tuple[int, int] | None = None  # layers whose K, and whose V, decays
    no_decay: str = ""  # why nothing decays here although decay is set
    copies: Copies | None = None
    no_calibration: str = ""  # why there is none although it is the default
    no_exact: str = ""  # why there are no exact tokens although they are the default


class LogFacts(msgspec.Struct, frozen=True):
    """What really ran, as the log of a llama.cpp tool tells it."""

    caches: tuple[KvCache, ...]
    flash_attn: str  # "enabled", "disabled" or "" when the log does not say
    n_ctx_seq: int
    backends: tuple[str, ...]  # of the system_info line
    offloaded: tuple[int, int] | None  # layers on a GPU, layers in all; None without the line
    splits: int | None  # graph splits: more of them means that work moved between devices
    warnings: tuple[str, ...]
    decayed: tuple[DecayCount, ...] = ()  # one for each cache that decays, when the log is complete


Fields = dict[str, Any]
"""Fields of a record that a line tells."""

_PREFIX = re.compile(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} )?(?:[IWED] )?")


def log_facts(err: str) -> LogFacts:
    """Read what really ran from the log: caches and their settings, rotation, flash attention, devices.

    Raises:
        LogNotUnderstood: there is no line about a KV cache (the tool ran without ``-lv 4``, or upstream changed its log), or one that
            nobody understands.
    """
    lines = [_PREFIX.sub("", line) for line in err.splitlines()]
    caches = tuple(_caches(lines))
    if not caches:
        raise LogNotUnderstood("the log has no llama_kv_cache line: which cache types ran is unknown")
    found: Fields = {"flash_attn": "", "n_ctx_seq": 0, "backends": (), "offloaded": None, "splits": None}
    for line in lines:
        found |= _told(_OF_CONTEXT, line)
    return LogFacts(caches=caches, warnings=log_warnings(err), decayed=tuple(_counts(lines)), **found)


def log_warnings(err: str) -> tuple[str, ...]:
    """Distinct warnings and errors of the log, at most 20, without their times."""
    found = re.findall(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} )?[WE] (.*\S)", err, re.MULTILINE)
    return tuple(dict.fromkeys(found))[:20]


def decayed_cells(facts: LogFacts) -> tuple[int, int]:
    """Cells of K and cells of V that decayed in all caches together.

    Raises:
        LogCut: a cache that decays did not count. It does so when it is freed: this is the very last line of a log.
    """
    decaying = sum(cache.decaying is not None for cache in facts.caches)
    if len(facts.decayed) < decaying:
        raise LogCut(f"the log counts the decayed cells of {len(facts.decayed)} of {decaying} KV caches")
    return sum(count.cells_k for count in facts.decayed), sum(count.cells_v for count in facts.decayed)


# --- of the context -------------------------------------------------------------------------------------------------------

Line = tuple[str, Callable[[re.Match[str]], Fields]]
"""A pattern, and the fields that a line of it tells."""

_OF_CONTEXT: tuple[Line, ...] = (
    (r"llama_context: flash_attn\s*= (\w+)", lambda m: {} if m[1] == "auto" else {"flash_attn": m[1]}),
    (r".*Flash Attention enabled", lambda m: {"flash_attn": "enabled"}),
    (r".*Flash Attention not supported, set to disabled", lambda m: {"flash_attn": "disabled"}),
    (r"llama_context: n_ctx_seq\s*= (\d+)", lambda m: {"n_ctx_seq": int(m[1])}),
    (r".*graph.*splits\s*= (\d+)", lambda m: {"splits": int(m[1])}),
    (r"system_info: .*? / \d+ \|\s*(.*)", lambda m: {"backends": tuple(re.findall(r"(\w+) :", m[1]))}),
    (r".*offloaded (\d+)/(\d+) layers to GPU", lambda m: {"offloaded": (int(m[1]), int(m[2]))}),
)


def _told(lines: Iterable[Line], text: str) -> Fields:
    """Fields that a line tells; none when it tells nothing that we know."""
    return next((fields(match) for pattern, fields in lines if (match := re.match(pattern, text))), {})


# --- of a cache -----------------------------------------------------------------------------------------------------------

_CACHE = re.compile(
    r"llama_kv_cache: size =\s*[\d.]+ MiB \(\s*(?P<cells>\d+) cells,\s*(?P<layers>\d+) layers,\s*\d+/(?P<streams>\d+) seqs\), "
    r"K \((?P<k>[^)]+)\):\s*(?P<mk>[\d.]+) MiB, V \((?P<v>[^)]+)\):\s*(?P<mv>[\d.]+) MiB"
)
_OURS = "llama_turbo_cache: "

_OF_UPSTREAM: tuple[Line, ...] = (
    # a flag up to snapshot 0.3.36, then the size of the rotation
    (r"llama_kv_cache: (?:attn_rot|n_rot)_([kv]) = (\d+)", lambda m: {f"rot_{m[1]}": m[2] != "0"}),
)

_OF_OURS: tuple[Line, ...] = (
    (r"rotated ([01])/([01])$", lambda m: {"rot_k": m[1] == "1", "rot_v": m[2] == "1"}),
    (r"bits ([\d.]+)/([\d.]+)$", lambda m: {"bits_k": float(m[1]), "bits_v": float(m[2])}),
    (
        r"calibrated K (\d+) (\d+) V (\d+) (\d+) of (\d+)$",
        lambda m: {"calibrated": Calibrated(*map(int, m.groups()))},
    ),
    (r"decaying (\d+)/(\d+)$", lambda m: {"decaying": (int(m[1]), int(m[2]))}),
    (r"no decay: (.+)$", lambda m: {"no_decay": m[1]}),
    (r"copies (\d+) rows in (\d+) streams, ([\d.]+) MiB$", lambda m: {"copies": Copies(int(m[1]), int(m[2]), float(m[3]))}),
    (r"no calibration: (.+)$", lambda m: {"no_calibration": m[1]}),
    (r"no exact tokens: (.+)$", lambda m: {"no_exact": m[1]}),
)
"""Parts of our line behind the specification."""


def _caches(lines: Iterable[str]) -> Iterator[KvCache]:
    """Each cache, with all that the lines up to the next one tell of it."""
    cache: KvCache | None = None
    buffers: list[str] = []
    for line in lines:
        if match := re.match(r"llama_kv_cache:\s+(\S+) KV buffer size =", line):
            buffers.append(match[1])
        elif match := _CACHE.match(line):
            if cache:
                yield cache
            cache, buffers = _cache(match, tuple(buffers)), []
        elif cache and line.startswith(_OURS) and " | " in line:
            cache = msgspec.structs.replace(cache, **_ours(line.removeprefix(_OURS)))
        elif cache:
            cache = msgspec.structs.replace(cache, **_told(_OF_UPSTREAM, line))
    if cache:
        yield cache


def _cache(match: re.Match[str], buffers: tuple[str, ...]) -> KvCache:
    return KvCache(
        mib_k=float(match["mk"]),
        mib_v=float(match["mv"]),
        cells=int(match["cells"]),
        layers=int(match["layers"]),
        streams=int(match["streams"]),
        buffers=buffers,
        spec=CacheSpec(match["k"], match["v"]),
    )


def _ours(line: str) -> Fields:
    """Fields of our line about a cache.

    Raises:
        LogNotUnderstood: a part of it means nothing to us.
    """
    text, *parts = line.strip().split(" | ")
    try:
        found: Fields = {"spec": CacheSpec.parse(text, logged=True), "patched": True}
    except UsageError as error:
        raise LogNotUnderstood(f"the log tells of a KV cache that is not understood: {error.message}") from error
    for part in parts:
        told = _told(_OF_OURS, part)
        if not told:
            raise LogNotUnderstood(f"the log tells of a KV cache {text}: {part!r} is not understood")
        found |= told
    return found


def _counts(lines: Iterable[str]) -> Iterator[DecayCount]:
    for line in lines:
        if match := re.match(_OURS + r"decay: (\d+) passes, (\d+) cells of K, (\d+) cells of V", line):
            yield DecayCount(*map(int, match.groups()))


def layers_of(cache: KvCache, n_layers: int) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Layers of a cache with the types of K, and with those of V, as its maps name them; none when they are not by layer.

    Raises:
        UsageError: a map names a layer that the model lacks.
    """
    maps = (cache.spec.layers_k or LayerMap(), cache.spec.layers_v or LayerMap())
    return list(maps[0].pairs(n_layers)), list(maps[1].pairs(n_layers))
