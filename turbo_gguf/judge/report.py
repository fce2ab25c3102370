"""Tables (Markdown) of results, verdicts and speeds: from records of the store alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from turbo_gguf.cache.spec import BASE, PLAIN, CacheSpec
from turbo_gguf.judge.gate import Check, Verdict
from turbo_gguf.measure.metrics import COLUMNS, Metric, of
from turbo_gguf.measure.result import BenchRow, Result


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table with aligned columns; the first ``left`` ones to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def plus_minus(metric: Metric, digits: int) -> str:
    """``0.00123 ± 0.00004``; nothing for a metric that was not measured."""
    if math.isnan(metric.value):
        return ""
    value = f"{metric.value:.{digits}f}"
    return f"{value if float(value) else value.lstrip('-')} ± {metric.error:.{digits}f}"


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
    said = {(v.types, v.ctx): v for v in verdicts}
    parts = []
    for ctx in dict.fromkeys(r.case.ctx for r in results):
        group = [r for r in results if r.case.ctx == ctx]
        first = group[0]
        parts.append(
            f"### {first.model}, context {ctx}\n\n"
            f"{first.stats.tokens} scored tokens in {first.stats.chunks} chunks of {first.text}; perplexity with {BASE} cache "
            f"{plus_minus(first.stats.ppl_base, 4)}; {first.case.backend}, llama.cpp {first.upstream_commit[:12]}, "
            f"patches {first.patch_digest[:12] or 'none'}.\n"
        )
        header = ["cache K/V", "bits", "above f16", *(row.column for row in COLUMNS), "verdict"]
        plain = next((r.stats.mean for r in group if r.case.types == PLAIN), None)
        rows = []
        for r in group:
            verdict = None if r.case.is_noise_floor else said.get((r.case.types, ctx))
            rows.append(
                [
                    name_of(r),
                    short(r.bits.total),
                    _above(r, plain),
                    *(plus_minus(row.shown(of(r.stats, row.field)), row.digits) for row in COLUMNS),
                    verdict.status if verdict else "",
                ]
            )
        parts.append(markdown(header, rows) + "\n")
    return "\n".join(parts)


def _above(result: Result, plain: Metric | None) -> str:
    """How far the mean KL divergence is above that of f16: about what the cache itself loses, without what any cache shows."""
    if plain is None or result.case.types in (BASE, PLAIN):
        return ""
    mean = result.stats.mean
    return plus_minus(Metric(mean.value - plain.value, math.hypot(mean.error, plain.error)), 6)


def checks(verdicts: Sequence[Verdict]) -> str:
    """Table of all checks: what was compared with which limit."""
    rows = [
        [
            types_text(v.types),
            str(v.ctx),
            c.name,
            _check_value(c),
            "" if c.limit is None else short(c.limit),
            _reference_text(c),
            c.status,
        ]
        for v in verdicts
        for c in v.checks
    ]
    return markdown(["cache K/V", "context", "check", "value", "limit", "relative to", "status"], rows, left=3)


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
    """Table of prefill and decode speed by type and depth, each with its ratio to the base type at the same depth."""
    found = by_setting(rows)
    tests = list(dict.fromkeys(test for _, test, _ in found))
    depths = sorted({depth for _, _, depth in found})
    parts = []
    for test in tests:
        header = ["cache K/V", *(f"depth {depth}" for depth in depths)]
        body = []
        for types in dict.fromkeys(types for types, name, _ in found if name == test):
            cells = [types_text(types)]
            for depth in depths:
                metric, ref = found.get((types, test, depth)), found.get((base, test, depth))
                if metric is None:
                    cells.append("")
                    continue
                share = f" ({metric.value / ref.value:.2f})" if ref is not None and ref.value > 0 else ""
                cells.append(f"{metric.value:.1f} ± {metric.error:.1f}{share}")
            body.append(cells)
        parts.append(f"### {_test_text(test)}, tokens per second (ratio to {base})\n\n{markdown(header, body)}\n")
    return "\n".join(parts)


def _test_text(test: str) -> str:
    return f"Prefill of {test[2:]} tokens" if test.startswith("pp") else f"Decode of {test[2:]} tokens"
