"""What ``llama-perplexity`` prints: from its streams to statistics. Pure functions, no files, no processes.

A log is only believed when it is complete. ``llama-perplexity`` puts its lines into a queue that another thread prints
(``common/log.cpp``), the logger is never freed (upstream issue 22142), and ``llama_perplexity()`` returns without
``common_log_flush``: lines still queued when ``main`` returns are lost, with exit code 0. On a busy machine, or with a slow
reader at the other end of a pipe, that is the last chunk and all final statistics. :class:`~turbo_gguf.errors.LogCut` is exactly this
signature; the caller may run the tool once more. Everything else that is missing is :class:`~turbo_gguf.errors.LogNotUnderstood`.

The statistics go to standard output (``LOG``), everything else to standard error (``LOG_INF``).
"""

from __future__ import annotations

import math
import re

from turbo_gguf.errors import LogCut, LogNotUnderstood, UsageError
from turbo_gguf.measure.metrics import LOGGED, KldStats, Metric, Row
from turbo_gguf.measure.quantiles import quantile_error

_NUMBER = r"([-+]?(?:\d+(?:\.\d+)?|nan|inf))"


_PAIR = _NUMBER + r"\s*±\s*" + _NUMBER


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
    _metric(out, _LAST)  # with it, all lines are there
    if len(rows) != chunks or int(rows[-1][0]) != chunks:
        raise LogCut(f"llama-perplexity printed {len(rows)} of {chunks} chunks")
    quantiles = {p: _scalar(out, label + r"\s+KLD") for p, label in _QUANTILES.items()}
    largest = _scalar(out, r"Maximum\s+KLD")

    def read(row: Row) -> Metric:
        if row.quantile is None:
            return _metric(out, row.label)
        return Metric(quantiles[row.quantile], quantile_error(quantiles, largest, row.quantile, tokens))

    return KldStats(**{row.field: read(row) for row in LOGGED}, max=largest, chunks=chunks, tokens=tokens)


_LAST = "Same top p"
"""Label of the very last line."""

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


def _number(text: str, what: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise LogNotUnderstood(f"{what} is {text}: the run computed NaN or infinity, its numbers are worthless")
    return value


def _plain(label: str) -> str:
    return re.sub(r"\s+", " ", label.replace(r"\s+", " ").replace("\\", ""))
