"""What is measured of a cache type: a row per metric, from which reading, tables, gates and plots derive.

A new metric is a field of :class:`KldStats` (with a default, for results that are stored already) and a row of :data:`METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec


class Metric(msgspec.Struct, frozen=True):
    """A measured value and its standard error."""

    value: float
    error: float


class KldStats(msgspec.Struct, frozen=True):
    """Final statistics of ``llama-perplexity --kl-divergence``. KL divergence in nats, rates in percent."""

    mean: Metric
    median: Metric
    p90: Metric
    p99: Metric
    p999: Metric
    max: float
    same_top: Metric  # percent of tokens whose most probable next token is the same
    ppl: Metric
    ppl_base: Metric
    ln_ppl_ratio: Metric
    mean_dp: Metric  # change of the probability of the right token, percent
    rms_dp: Metric
    chunks: int
    tokens: int  # scored
    agreed: Metric | None = None  # tokens of a greedy answer before the first one that is not f16's (drift)
    found: Metric | None = None  # percent of hidden codes that were answered exactly (retrieval)


def _same(metric: Metric) -> Metric:
    return metric


class Gated(msgspec.Struct, frozen=True):
    """How a gate judges a metric: a ratio to the reference, with an upper limit."""

    name: str  # of the limit in a gates file
    title: str  # in the table of checks
    amount: Callable[[Metric], Metric] = _same  # what is compared: the larger, the worse
    over: str = ""  # field of the reference that it is divided by; "": the same amount


class Row(msgspec.Struct, frozen=True):
    """One metric."""

    field: str  # of KldStats
    label: str = ""  # of llama-perplexity's line "label : value ± error", a regular expression; "" and no quantile: not of its log
    quantile: float | None = None  # of the KL divergence, instead of a line of its own
    column: str = ""  # heading in tables; "": not shown
    digits: int = 0  # in tables
    shown: Callable[[Metric], Metric] = _same  # what tables show of it
    gate: Gated | None = None


def _exp(metric: Metric) -> Metric:
    value = math.exp(metric.value)
    return Metric(value, value * metric.error)


METRICS = (
    Row("mean", r"Mean\s+KLD", column="mean KLD", digits=6, gate=Gated("mean_kld", "mean KLD")),
    Row("median", quantile=0.5, column="median", digits=6, gate=Gated("median_kld", "median KLD")),
    Row("p90", quantile=0.9),
    Row("p99", quantile=0.99, column="99 %", digits=5, gate=Gated("p99_kld", "99 % KLD")),
    Row("p999", quantile=0.999, column="99.9 %", digits=4, gate=Gated("p999_kld", "99.9 % KLD")),
    Row(
        "same_top",
        "Same top p",
        column="same top %",
        digits=2,
        gate=Gated("top_changes", "changed top", amount=lambda m: Metric(100 - m.value, m.error)),
    ),
    Row("ppl", r"Mean PPL\(Q\)"),
    Row("ppl_base", r"Mean PPL\(base\)"),
    Row(
        "ln_ppl_ratio",
        r"Mean ln\(PPL\(Q\)/PPL\(base\)\)",
        column="PPL / f32",
        digits=5,
        shown=_exp,
        gate=Gated("ppl", "PPL drift", amount=lambda m: Metric(abs(m.value), m.error), over="mean"),
    ),
    Row("mean_dp", r"Mean\s+Δp"),
    Row("rms_dp", "RMS Δp"),
    Row("agreed", column="same tokens", digits=1),
    Row("found", column="codes found %", digits=1),
)
"""In the order of tables and checks."""

COLUMNS = tuple(row for row in METRICS if row.column)
LOGGED = tuple(row for row in METRICS if row.label or row.quantile is not None)
GATED = {row.field: row.gate for row in METRICS if row.gate is not None}

POINT, WHISKER = "mean", ("median", "p999")
"""What a plot draws as a point, and from where to where a line goes through it."""


def of(stats: KldStats, field: str) -> Metric:
    """A metric by its field; NaN in results that were stored before there was such a metric."""
    found = getattr(stats, field)
    return found if isinstance(found, Metric) else Metric(math.nan, math.nan)


def columns(measured: Iterable[KldStats]) -> tuple[Row, ...]:
    """Columns of a table of these: what none of them has is not shown."""
    stats = list(measured)
    return tuple(row for row in COLUMNS if not all(math.isnan(of(one, row.field).value) for one in stats))
