"""Tables of results, verdicts and speeds, and how Markdown writes them: from records of the store alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from turbo_gguf.cache.spec import BASE, PLAIN, CacheSpec
from turbo_gguf.judge.gate import Check, Verdict
from turbo_gguf.measure.metrics import Metric, columns, of
from turbo_gguf.measure.result import BenchRow, Result


class Table(msgspec.Struct, frozen=True):
    """Cells as text; the first ``left`` columns are words, the others numbers. A cell between backticks is code."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def __str__(self) -> str:
        """As Markdown."""
        return markdown(self.header, self.rows, self.left)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table with aligned columns; the first ``left`` ones to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def plus_minus(metric: Metric, digits: int) -> str:
    """``0.00123 ± 0.00004``; nothing for a metric that was not measured.

    At most ``digits`` stand behind the point: fewer where four digits of the value and two of its error are shown without them.
    """
    if math.isnan(metric.value):
        return ""
    enough = max(_decimals(metric.value, 4, digits), _decimals(metric.error, 2, digits))
    value = f"{metric.value:.{enough}f}"
    return f"{value if float(value) else value.lstrip('-')} ± {metric.error:.{enough}f}"


def _decimals(number: float, significant: int, most: int) -> int:
    """Digits behind the point that show so many significant ones."""
    if not number or not math.isfinite(number):
        return most if not number else 0
    return min(max(significant - 1 - math.floor(math.log10(abs(number))), 0), most)


def types_text(types: CacheSpec) -> str:
    """Types in a table. Settings are code: Markdown would take a bare ``*`` for emphasis."""
    return f"`{types}`" if types.has_settings else str(types)


def short(value: float) -> str:
    """``3.5``, ``4.333``: three digits after the point at most. Averages over layers need not end."""
    return f"{round(value, 3):g}"


def name_of(result: Result) -> str:
    """Types, or what the noise floor is."""
    return f"{BASE}, batch {result.case.batch} (noise floor)" if result.case.is_noise_floor else types_text(result.case.types)


def quality(results: Sequence[Result], verdicts: Sequence[Verdict] = ()) -> str:
    """One table per context: KL divergence, perplexity and bits of each type, with its verdict."""
    parts = []
    for ctx in dict.fromkeys(r.case.ctx for r in results):
        group = [r for r in results if r.case.ctx == ctx]
        first = group[0]
        parts.append(f"### {first.model}, context {ctx}\n\n{measured_on(first)}.\n\n{quality_table(group, verdicts)}\n")
    return "\n".join(parts)


def measured_on(result: Result) -> str:
    """Text, device, sources and patches of a result, and of all that were measured with it."""
    return (
        f"{result.stats.tokens} scored tokens in {result.stats.chunks} chunks of {result.text}; perplexity with {BASE} cache "
        f"{plus_minus(result.stats.ppl_base, 4)}; {result.case.backend}, llama.cpp {result.upstream_commit[:12]}, "
        f"patches {result.patch_digest[:12] or 'none'}"
    )


def quality_table(group: Sequence[Result], verdicts: Sequence[Verdict] = ()) -> Table:
    """Results of one context, a row each."""
    said = {(v.types, v.ctx): v for v in verdicts}
    plain = next((r.stats.mean for r in group if r.case.types == PLAIN), None)
    shown = columns(r.stats for r in group)
    rows = []
    for r in group:
        verdict = None if r.case.is_noise_floor else said.get((r.case.types, r.case.ctx))
        numbers = (plus_minus(row.shown(of(r.stats, row.field)), row.digits) for row in shown)
        rows.append((name_of(r), short(r.bits.total), _above(r, plain), *numbers, verdict.status if verdict else ""))
    return Table(("cache K/V", "bits", "above f16", *(row.column for row in shown), "verdict"), tuple(rows))


def _above(result: Result, plain: Metric | None) -> str:
    """How far the mean KL divergence is above that of f16: about what the cache itself loses, without what any cache shows."""
    if plain is None or result.case.types in (BASE, PLAIN):
        return ""
    mean = result.stats.mean
    return plus_minus(Metric(mean.value - plain.value, math.hypot(mean.error, plain.error)), 6)


def checks(verdicts: Sequence[Verdict]) -> Table:
    """All checks: what was compared with which limit."""
    rows = (
        (
            types_text(v.types),
            str(v.ctx),
            c.name,
            _check_value(c),
            "" if c.limit is None else short(c.limit),
            _reference_text(c),
            c.status,
        )
        for v in verdicts
        for c in v.checks
    )
    return Table(("cache K/V", "context", "check", "value", "limit", "relative to", "status"), tuple(rows), left=3)


def _reference_text(check: Check) -> str:
    return types_text(CacheSpec.parse(check.reference)) if check.reference else ""


def _check_value(check: Check) -> str:
    return short(check.value) if check.name == "bits per value" else f"{check.value:.3f} ± {check.error:.3f}"


def by_setting(rows: Sequence[BenchRow]) -> dict[tuple[CacheSpec, str, int], Metric]:
    """Median speed over the rounds of each (types, test, depth), and half the range of the rounds as its error."""
    groups: dict[tuple[CacheSpec, str, int], list[BenchRow]] = {}
    for row in rows:
        groups.setdefault((row.types, row.test, row.depth), []).append(row)
    found = {}
    for key, group in groups.items():
        speeds = [row.tokens_per_second.value for row in group]
        spread = (max(speeds) - min(speeds)) / 2 if len(speeds) > 1 else group[0].tokens_per_second.error
        found[key] = Metric(statistics.median(speeds), spread)
    return found


def speed(rows: Sequence[BenchRow], base: CacheSpec) -> str:
    """Tables of prefill and decode speed by type and depth, each with its ratio to the base type at the same depth."""
    return "\n".join(
        f"### {test_text(test)}, tokens per second (ratio to {base})\n\n{table}\n" for test, table in speed_tables(rows, base).items()
    )


def speed_tables(rows: Sequence[BenchRow], base: CacheSpec) -> dict[str, Table]:
    """A table for each test."""
    found = by_setting(rows)
    depths = sorted({depth for _, _, depth in found})

    def cell(types: CacheSpec, test: str, depth: int) -> str:
        metric, ref = found.get((types, test, depth)), found.get((base, test, depth))
        if metric is None:
            return ""
        share = f" ({metric.value / ref.value:.2f})" if ref is not None and ref.value > 0 else ""
        return f"{metric.value:.1f} ± {metric.error:.1f}{share}"

    def table(test: str) -> Table:
        named = dict.fromkeys(types for types, name, _ in found if name == test)
        body = ((types_text(types), *(cell(types, test, depth) for depth in depths)) for types in named)
        return Table(("cache K/V", *(f"depth {depth}" for depth in depths)), tuple(body))

    return {test: table(test) for test in dict.fromkeys(test for _, test, _ in found)}


def test_text(test: str) -> str:
    """What a test of llama-bench measures."""
    return f"Prefill of {test[2:]} tokens" if test.startswith("pp") else f"Decode of {test[2:]} tokens"
