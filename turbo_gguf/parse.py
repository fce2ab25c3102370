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

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist

import msgspec

from turbo_gguf import layer_map
from turbo_gguf.cache_types import cache_type, layer_types
from turbo_gguf.errors import LogNotUnderstood, UsageError
from turbo_gguf.records import (
    Bits,
    CacheDecay,
    CacheExact,
    CacheTypes,
    DecayCount,
    DecayShares,
    KldStats,
    KvCache,
    LogFacts,
    Metric,
    ModelFile,
)

MIB_ROUNDING = 0.005 + 1e-6
"""Half of the last digit of the sizes in the log, and a little more: 1.125 MiB is printed as 1.12, on the very edge."""

_PREFIX = re.compile(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} )?(?:[IWED] )?")
_NUMBER = r"([-+]?(?:\d+(?:\.\d+)?|nan|inf))"
_PAIR = _NUMBER + r"\s*±\s*" + _NUMBER


class LogCut(LogNotUnderstood):
    """Exit code 0, but the end of the log is missing: queued lines were lost when the tool ended. Worth one retry."""


def _number(text: str, what: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise LogNotUnderstood(f"{what} is {text}: the run computed NaN or infinity, its numbers are worthless")
    return value


def _metric(out: str, label: str) -> Metric:
    """Read ``label : value ± error``.

    A NaN error with a finite value is what the tool prints for two equal runs (a root of minus rounding error, or 0/0):
    read as 0. A NaN value is never accepted.
    """
    match = re.search(rf"^{label}\s*:\s*{_PAIR}", out, re.MULTILINE)
    if not match:
        raise LogCut(f"llama-perplexity ended without the line {_plain(label)!r}")
    error = float(match[2])
    return Metric(_number(match[1], _plain(label)), error if math.isfinite(error) else 0.0)


def _scalar(out: str, label: str) -> float:
    match = re.search(rf"^\s*{label}\s*:\s*{_NUMBER}", out, re.MULTILINE)
    if not match:
        raise LogCut(f"llama-perplexity ended without the line {_plain(label)!r}")
    return _number(match[1], _plain(label))


def _plain(label: str) -> str:
    return re.sub(r"\s+", " ", label.replace(r"\s+", " ").replace("\\", ""))


def _messages(err: str) -> Iterable[str]:
    """Lines of standard error without the prefix of time and level."""
    for line in err.splitlines():
        yield _PREFIX.sub("", line)


def tool_complaint(err: str) -> str:
    """First error of a perplexity run that ends with 0 and no result, "" when there is none.

    Raises:
        UsageError: the text is too short for the context.
    """
    if short := re.search(r"you need at least (\d+) tokens.*context of (\d+)[\s\S]*?tokenizes to only (\d+) tokens", err):
        raise UsageError(
            f"the text has {short[3]} tokens; a context of {short[2]} needs at least {short[1]}",
            "use a longer text or a smaller --ctx",
        )
    found = re.search(r"(failed to (?:decode|open|read)[^\n]*|does not look like[^\n]*|inconsistent vocabulary[^\n]*)", err)
    return found[1] if found else ""


def kld_stats(out: str, err: str) -> KldStats:
    """Read the statistics of ``llama-perplexity --kl-divergence``.

    The tool prints no errors for the percentiles; they are derived here, see :func:`quantile_error`.

    Raises:
        LogCut: exit code 0, but chunks or final statistics are missing.
        LogNotUnderstood: a value is NaN or infinite, or the tool complained.
        UsageError: the text is too short.
    """
    started = re.search(r"computing over (\d+) chunks, n_ctx=(\d+)", err)
    if complaint := tool_complaint(err):
        raise LogNotUnderstood(f"llama-perplexity: {complaint}")
    if not started:
        raise LogNotUnderstood("llama-perplexity ended before it computed anything")
    chunks, ctx = int(started[1]), int(started[2])
    rows = re.findall(r"^ *(\d+) +" + _PAIR, out, re.MULTILINE)
    for _, value, _error in rows:
        _number(value, "the running perplexity")
    tokens = chunks * (ctx - 1 - ctx // 2)
    same_top = _metric(out, "Same top p")  # the very last line: with it, all lines are there
    if len(rows) != chunks or int(rows[-1][0]) != chunks:
        raise LogCut(f"llama-perplexity printed {len(rows)} of {chunks} chunks")
    mean = _metric(out, r"Mean\s+KLD")
    quantiles = {p: _scalar(out, label + r"\s+KLD") for p, label in _QUANTILES.items()}
    largest = _scalar(out, r"Maximum\s+KLD")

    def quantile(p: float) -> Metric:
        return Metric(quantiles[p], quantile_error(quantiles, largest, p, tokens))

    return KldStats(
        mean=mean,
        median=quantile(0.5),
        p90=quantile(0.9),
        p99=quantile(0.99),
        p999=quantile(0.999),
        max=largest,
        same_top=same_top,
        ppl=_metric(out, r"Mean PPL\(Q\)"),
        ppl_base=_metric(out, r"Mean PPL\(base\)"),
        ln_ppl_ratio=_metric(out, r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"),
        mean_dp=_metric(out, r"Mean\s+Δp"),
        rms_dp=_metric(out, r"RMS Δp"),
        chunks=chunks,
        tokens=tokens,
    )


_QUANTILES = {
    0.001: r"0\.1%",
    0.01: r"1\.0%",
    0.05: r"5\.0%",
    0.1: r"10\.0%",
    0.5: "Median",
    0.9: r"90\.0%",
    0.95: r"95\.0%",
    0.99: r"99\.0%",
    0.999: r"99\.9%",
}


def quantile_error(quantiles: dict[float, float], largest: float, p: float, n: int) -> float:
    """Estimate the standard error of the ``p`` quantile of ``n`` independent values.

    The rank of a quantile has the standard deviation sqrt(p (1-p) n); the error is half the distance between the values at the
    ranks one deviation below and above, read off the printed quantiles (straight lines of the logarithm over the normal score of
    p: exact for log-normal values, which KL divergences of tokens nearly are).
    """
    normal = NormalDist()
    known = {**quantiles, 1 - 0.5 / n: largest} if 1 - 0.5 / n > max(quantiles) else dict(quantiles)
    points = sorted((normal.inv_cdf(q), value) for q, value in known.items())
    spread = math.sqrt(p * (1 - p) / n)

    def at(q: float) -> float:
        x = normal.inv_cdf(min(max(q, 0.5 / n), 1 - 0.5 / n))
        x = min(max(x, points[0][0]), points[-1][0])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x <= x1:
                t = (x - x0) / (x1 - x0)
                return y0 * (y1 / y0) ** t if y0 > 0 else y0 + (y1 - y0) * t
        return points[-1][1]

    return max(0.0, (at(p + spread) - at(p - spread)) / 2)


def perplexity(out: str, err: str) -> tuple[Metric, int]:
    """Read plain perplexity: the final estimate and the number of chunks.

    Raises:
        LogCut, LogNotUnderstood, UsageError: as :func:`kld_stats`.
    """
    if complaint := tool_complaint(err):
        raise LogNotUnderstood(f"llama-perplexity: {complaint}")
    started = re.search(r"calculating perplexity over (\d+) chunks", err)
    if not started:
        raise LogNotUnderstood("llama-perplexity ended before it computed anything")
    if re.search(r"^\[\d+\][-+]?(?:nan|inf)|,\[\d+\][-+]?(?:nan|inf)", out, re.MULTILINE):
        raise LogNotUnderstood("the running perplexity is NaN or infinite: the run is worthless")
    final = re.search(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}", err + out)
    if "Unexpected negative standard deviation" in err:
        raise LogNotUnderstood("llama-perplexity: unexpected negative standard deviation of log(prob)")
    if not final:
        raise LogCut("llama-perplexity ended without its final estimate")
    return Metric(_number(final[1], "PPL"), _number(final[2], "the error of PPL")), int(started[1])


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


def _settings(match: re.Match[str]) -> dict[str, object]:
    """Fields from our line about a cache: its types and settings in the notation of ``--types``, and what came of them."""
    spec = dict(word.split("=", 1) for word in match["spec"].split()[1:])
    told: dict[str, object] = {"rot_k": match["rk"] == "1", "rot_v": match["rv"] == "1", "calibration": spec.get("cal", "")}
    if "k" in spec:
        told |= {"layers_k": spec["k"], "bits_k": float(match["bk"]), "layers_v": spec.get("v", ""), "bits_v": float(match["bv"])}
    if m := re.search(r" \| decaying (\d+)/(\d+)", match["more"]):
        told["decay"] = CacheDecay(DecayShares(*map(int, spec["decay"].split(","))), layers_k=int(m[1]), layers_v=int(m[2]))
    if m := re.search(r" \| no decay: ([a-z ]+)", match["more"]):
        told["no_decay"] = m[1]
    if m := re.search(r" \| copies (\d+) rows in \d+ streams, ([\d.]+) MiB", match["more"]):
        told["exact"] = CacheExact(int(spec.get("sink", 0)), int(spec.get("tail", 0)), rows=int(m[1]), mib=float(m[2]))
    return told


_OF_CACHE: tuple[tuple[str, Callable[[re.Match[str]], dict[str, object]]], ...] = (
    (r"llama_kv_cache: (?:attn|n)_rot_([kv]) = (\d+)", lambda m: {f"rot_{m[1]}": m[2] != "0"}),
    (
        r"llama_turbo_cache: (?P<spec>[^|]+) \| rotated (?P<rk>\d)/(?P<rv>\d) \| bits (?P<bk>[\d.]+)/(?P<bv>[\d.]+)(?P<more>.*)",
        _settings,
    ),
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


def bits_per_value(facts: LogFacts, types: CacheTypes, model: ModelFile) -> Bits:
    """Bits per value of K and V together: nominal, and the interval that the rounded sizes in the log allow.

    The log gives K and V in MiB with two digits; the number of values is cells x streams x sum over the layers of KV heads x
    head size. The relative uncertainty is 0.005 MiB / size: below 1 % from about 1 MiB on.
    """
    bits_k, bits_v = nominal_bits(facts.caches, types, model)
    values_k, values_v = _values(facts, model, model.head_k), _values(facts, model, model.head_v)
    if values_k is None or values_v is None:
        return Bits(nominal=(bits_k * model.head_k + bits_v * model.head_v) / (model.head_k + model.head_v))
    nominal = (bits_k * values_k + bits_v * values_v) / (values_k + values_v)
    mib = sum(c.mib_k + c.mib_v for c in facts.caches)
    slack = 2 * MIB_ROUNDING * len(facts.caches)
    scale = 8 * 1024 * 1024 / (values_k + values_v)
    exact = sum(c.exact.mib for c in facts.caches if c.exact)
    return Bits(nominal=nominal, low=max(0.0, mib - slack) * scale, high=(mib + slack) * scale, exact=exact * scale)


def nominal_bits(caches: Sequence[KvCache], types: CacheTypes, model: ModelFile) -> tuple[float, float]:
    """Bits per value of K, and of V, by the block layouts of the types asked for.

    Types by layer count with the values that their layers have in ``caches``. The log says which layers are in which:
    :func:`turbo_gguf.guard.check` has made sure of it.
    """
    if not types.by_layer:
        return cache_type(types.k).bits, cache_type(types.v).bits
    heads = model.kv_heads
    asked_k, asked_v = layer_types(types, len(heads))

    def average(asked: Sequence[str], maps: Iterable[str]) -> float:
        placed = [
            (cache.cells * cache.streams * heads[layer], cache_type(asked[layer]).bits)
            for cache, text in zip(caches, maps, strict=True)
            for layer, _ in layer_map.pairs(text, len(heads))
        ]
        return sum(values * bits for values, bits in placed) / sum(values for values, _ in placed)

    return average(asked_k, (cache.layers_k for cache in caches)), average(asked_v, (cache.layers_v for cache in caches))


def _values(facts: LogFacts, model: ModelFile, head: int) -> int | None:
    """Values of K (or V) in all caches; None when the layers of a cache cannot be told from the metadata."""
    with_kv = model.kv_heads
    if not model.uniform or not with_kv:
        return None
    if len(set(with_kv)) == 1:
        return sum(c.cells * c.streams * c.layers for c in facts.caches) * with_kv[0] * head
    if len(facts.caches) == 1 and facts.caches[0].layers == len(with_kv):
        return facts.caches[0].cells * facts.caches[0].streams * sum(with_kv) * head
    return None
