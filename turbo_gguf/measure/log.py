"""From the text of a log to records: pure functions, no files, no processes.

A log is only believed when it is complete. ``llama-perplexity`` puts its lines into a queue that another thread prints
(``common/log.cpp``), the logger is never freed (upstream issue 22142), and ``llama_perplexity()`` returns without
``common_log_flush``: lines still queued when ``main`` returns are lost, with exit code 0. On a busy machine, or with a slow
reader at the other end of a pipe, that is the last chunk and all final statistics. :class:`LogCut` is exactly this signature;
the caller may run the tool once more. Everything else that is missing is :class:`~turbo_gguf.errors.LogNotUnderstood`.

The statistics go to standard output (``LOG``), everything else to standard error (``LOG_INF``), with a prefix of time and
level (``0.00.123.456 I``). The lines about the KV cache are of level trace: the tool has to run with ``-lv 4``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import msgspec

from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.errors import LogCut, LogNotUnderstood


class DecayCount(msgspec.Struct, frozen=True):
    """What one ``llama_kv_cache`` did when it was freed: tokens, each counted once for all layers."""

    passes: int
    cells_k: int
    cells_v: int


class CacheDecay(msgspec.Struct, frozen=True):
    """Temporal decay of one ``llama_kv_cache``, as the log announces it."""

    shares: DecayShares
    layers_k: int  # layers whose K decays
    layers_v: int


class CacheExact(msgspec.Struct, frozen=True):
    """Exact sink and tail of one ``llama_kv_cache``, as the log announces them."""

    sink: int  # tokens of each sequence
    tail: int
    rows: int  # f16 copies that there is room for, per stream
    mib: float  # of K and V of all layers and streams, rounded to 0.01 by the tool


class KvCache(msgspec.Struct, frozen=True):
    """One ``llama_kv_cache`` of the log. A model with sliding-window attention has two."""

    type_k: str
    type_v: str
    mib_k: float  # rounded to 0.01 by the tool
    mib_v: float
    cells: int  # per stream
    layers: int
    streams: int
    buffers: tuple[str, ...]  # names of the backend buffers that hold it
    rot_k: bool | None = None  # None: the log does not say
    rot_v: bool | None = None
    layers_k: str = ""  # types by layer, as a layer map in which each layer of this cache is named once; "": not in the log
    layers_v: str = ""
    bits_k: float | None = None  # bits per value, rounded to 0.001, of types by layer
    bits_v: float | None = None
    decay: CacheDecay | None = None
    no_decay: str = ""  # why nothing decays here although decay is set: "sliding window" or "no layer"
    calibration: str = ""  # digest of the calibration of this cache; "": none
    exact: CacheExact | None = None


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


_PREFIX = re.compile(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} )?(?:[IWED] )?")


def _messages(err: str) -> Iterable[str]:
    """Lines of standard error without the prefix of time and level."""
    for line in err.splitlines():
        yield _PREFIX.sub("", line)


_CACHE = re.compile(
    r"llama_kv_cache: size =\s*[\d.]+ MiB \(\s*(?P<cells>\d+) cells,\s*(?P<layers>\d+) layers,\s*\d+/(?P<streams>\d+) seqs\), "
    r"K \((?P<k>[^)]+)\):\s*(?P<mk>[\d.]+) MiB, V \((?P<v>[^)]+)\):\s*(?P<mv>[\d.]+) MiB"
)


def log_facts(err: str) -> LogFacts:
    """Read what really ran from the log: caches and their settings, rotation, flash attention, devices.

    Raises:
        LogNotUnderstood: there is no line about a KV cache (the tool ran without ``-lv 4``, or upstream changed its log).
    """
    caches: list[KvCache] = []
    buffers: list[str] = []
    flash_attn, n_ctx_seq, splits = "", 0, None
    backends: tuple[str, ...] = ()
    offloaded: tuple[int, int] | None = None
    decayed: list[DecayCount] = []
    for line in _messages(err):
        if m := re.match(r"llama_kv_cache:\s+(\S+) KV buffer size =", line):
            buffers.append(m[1])
        elif m := _CACHE.match(line):
            caches.append(_cache(m, tuple(buffers)))
            buffers.clear()
        elif caches and (told := _of_cache(line)):
            caches[-1] = msgspec.structs.replace(caches[-1], **told)
        elif m := re.match(r"llama_turbo_cache: decay: (\d+) passes, (\d+) cells of K, (\d+) cells of V", line):
            decayed.append(DecayCount(*map(int, m.groups())))
        elif m := re.match(r"llama_context: flash_attn\s*= (\w+)", line):
            flash_attn = {"auto": flash_attn}.get(m[1], m[1])
        elif m := re.search(r"Flash Attention (?:enabled|not supported, set to disabled)", line):
            flash_attn = "enabled" if m[0].endswith(" enabled") else "disabled"
        elif m := re.match(r"llama_context: n_ctx_seq\s*= (\d+)", line):
            n_ctx_seq = int(m[1])
        elif m := re.search(r"graph.*splits\s*= (\d+)", line):
            splits = int(m[1])
        elif m := re.match(r"system_info: .*? / \d+ \|\s*(.*)", line):
            backends = tuple(re.findall(r"(\w+) :", m[1]))
        elif m := re.search(r"offloaded (\d+)/(\d+) layers to GPU", line):
            offloaded = (int(m[1]), int(m[2]))
    if not caches:
        raise LogNotUnderstood("the log has no llama_kv_cache line: which cache types ran is unknown")
    return LogFacts(
        caches=tuple(caches),
        flash_attn=flash_attn,
        n_ctx_seq=n_ctx_seq,
        backends=backends,
        offloaded=offloaded,
        splits=splits,
        warnings=log_warnings(err),
        decayed=tuple(decayed),
    )


def log_warnings(err: str) -> tuple[str, ...]:
    """Distinct warnings and errors of the log, at most 20, without their times."""
    found = re.findall(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} )?[WE] (.*\S)", err, re.MULTILINE)
    return tuple(dict.fromkeys(found))[:20]


def _cache(match: re.Match[str], buffers: tuple[str, ...]) -> KvCache:
    return KvCache(
        type_k=match["k"],
        type_v=match["v"],
        mib_k=float(match["mk"]),
        mib_v=float(match["mv"]),
        cells=int(match["cells"]),
        layers=int(match["layers"]),
        streams=int(match["streams"]),
        buffers=buffers,
    )


def _decay(match: re.Match[str]) -> CacheDecay:
    shares = DecayShares(hot=int(match["hot"]), warm=int(match["warm"]), cold=int(match["cold"]))
    return CacheDecay(shares, layers_k=int(match["k"]), layers_v=int(match["v"]))


def _exact(match: re.Match[str]) -> CacheExact:
    return CacheExact(sink=int(match["sink"]), tail=int(match["tail"]), rows=int(match["rows"]), mib=float(match["mib"]))


_OF_CACHE: tuple[tuple[str, Callable[[re.Match[str]], dict[str, object]]], ...] = (
    (r"llama_kv_cache: attn_rot_([kv]) = (\d)", lambda m: {f"rot_{m[1]}": m[2] == "1"}),
    (
        r"llama_turbo_cache: ([KV]) by layer: (\S+) \(([\d.]+) bits per value\)",
        lambda m: {f"layers_{m[1].lower()}": m[2], f"bits_{m[1].lower()}": float(m[3])},
    ),
    (
        r"llama_turbo_cache: decay: the oldest \d+ % of each sequence lose one bit "
        r"\(hot (?P<hot>\d+) %, warm (?P<warm>\d+) %, cold (?P<cold>\d+) %\), K of (?P<k>\d+) layers, V of (?P<v>\d+) layers",
        lambda m: {"decay": _decay(m)},
    ),
    (r"llama_turbo_cache: decay: (?:none, )?(sliding window|no layer)", lambda m: {"no_decay": m[1]}),
    (r"llama_turbo_cache: calibration ([0-9a-f]{8}): ", lambda m: {"calibration": m[1]}),
    (
        r"llama_turbo_cache: exact: first (?P<sink>\d+) and last (?P<tail>\d+) tokens of each sequence in f16, "
        r"(?P<rows>\d+) rows in each of \d+ streams, (?P<mib>[\d.]+) MiB",
        lambda m: {"exact": _exact(m)},
    ),
)
"""Lines of the log about the cache that it last told of, and the fields of :class:`KvCache` that they give."""


def _of_cache(line: str) -> dict[str, object]:
    """Fields of the cache that the log last told of; none when the line says nothing about it."""
    return next((fields(match) for pattern, fields in _OF_CACHE if (match := re.match(pattern, line))), {})


def decayed_cells(facts: LogFacts) -> tuple[int, int]:
    """Cells of K and cells of V that decayed in all caches together.

    Raises:
        LogCut: a cache that decays did not count. It does so when it is freed: this is the very last line of a log.
    """
    decaying = sum(cache.decay is not None for cache in facts.caches)
    if len(facts.decayed) < decaying:
        raise LogCut(f"the log counts the decayed cells of {len(facts.decayed)} of {decaying} KV caches")
    return sum(count.cells_k for count in facts.decayed), sum(count.cells_v for count in facts.decayed)
