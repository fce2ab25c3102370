"""Quality of one run: KL divergence against bits, the table of all metrics, verdicts, and memory beside the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from turbo_gguf.cache.spec import BASE, PLAIN, CacheSpec, is_turbo
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import TurboError
from turbo_gguf.judge import gate, report
from turbo_gguf.judge.drawing import WHISKER_COLUMNS, is_point, line_name, shape, short_names
from turbo_gguf.judge.gate import Gates, Verdict
from turbo_gguf.judge.page.chart import Axis, Point, Rule, Series, chart, swatch
from turbo_gguf.judge.page.element import Element, el, folded, table, words
from turbo_gguf.judge.page.runs import Run
from turbo_gguf.judge.report import Table
from turbo_gguf.measure.metrics import COLUMNS, POINT, WHISKER, columns, of
from turbo_gguf.measure.result import Result

_PLAIN_BITS = cache_type(PLAIN.k).bits

LONG = 65_536
"""Tokens for which the memory of copies is worked out, too: they are few beside such a cache."""


class Judged(msgspec.Struct, frozen=True):
    """A run with what the gate says of it."""

    run: Run[Result]
    verdicts: tuple[Verdict, ...]
    problem: str = ""  # why there are no verdicts

    @property
    def first(self) -> Result:
        """A result, for what all of them share."""
        return self.run.records[0]

    @property
    def title(self) -> str:
        """Model and context, and how much of the text was read."""
        stats, case = self.first.stats, self.first.case
        batch = f", batches of {case.base_batch}" if case.base_batch < min(512, case.ctx) else ""
        return f"{self.first.model}, context {case.ctx:,}, {stats.tokens:,} tokens{batch}"


def judged(run: Run[Result], gates: Gates) -> Judged:
    """Judge a run, with its rows in descending order of bits. A run that the gate refuses has the reason instead of verdicts."""
    one = unjudged(run)
    try:
        return msgspec.structs.replace(one, verdicts=tuple(gate.judge(one.run.records, gates)))
    except TurboError as error:
        return msgspec.structs.replace(one, problem=error.message)


def unjudged(run: Run[Result]) -> Judged:
    """The same without a verdict, for what has no limits."""
    rows = sorted(run.records, key=lambda r: (not r.case.is_noise_floor, -r.bits.total, r.stats.mean.value))
    return Judged(msgspec.structs.replace(run, records=tuple(rows)), ())


def verdicts(found: Sequence[Judged]) -> list[Element]:
    """How many types passed in each run, and which did not."""
    statuses = (gate.PASS, gate.WITHIN_ERROR, gate.FAIL)
    rows = [
        (
            one.title,
            one.problem or _named(one.verdicts, *statuses[1:]),
            *(str(sum(v.status == status for v in one.verdicts)) for status in statuses),
        )
        for one in found
    ]
    return [table(Table(("run", "which did not pass", *statuses), tuple(rows), left=2))]


def _named(said: Sequence[Verdict], *statuses: str) -> str:
    parts = ((status, [report.types_text(v.types) for v in said if v.status == status]) for status in statuses)
    return "; ".join(f"{status}: {', '.join(types)}" for status, types in parts if types)


def section(one: Judged, *, opened: bool) -> Element:
    """All about one run."""
    parts = [
        el("p", f"{report.measured_on(one.first)}. Last measured {one.run.time[:10]}.", class_="about"),
        *([el("p", f"Not judged: {one.problem}", class_="problem")] if one.problem else []),
        picture(one.run.records, one.title),
        table(_metrics_of(one)),
    ]
    if one.verdicts:
        parts.append(folded("Checks behind the verdicts", table(_of_one_run(report.checks(one.verdicts)))))
    return folded(one.title, *parts, opened=opened)


def _metrics_of(one: Judged) -> Table:
    """All metrics; without the column of verdicts where there are none."""
    found = report.quality_table(one.run.records, one.verdicts)
    return found if one.verdicts else _columns(found, [name for name in found.header if name != "verdict"], found.left)


CHECKS = ("cache K/V", "check", "status", "value", "limit", "relative to")


def _of_one_run(checks: Table) -> Table:
    """Checks without the context, which the title has, and with the status where a phone shows it."""
    return _columns(checks, CHECKS, left=3)


def _columns(found: Table, names: Sequence[str], left: int) -> Table:
    """Some columns of a table, in this order."""
    at = [found.header.index(name) for name in names]
    return Table(tuple(names), tuple(tuple(row[i] for i in at) for row in found.rows), left=left)


def picture(results: Sequence[Result], title: str) -> Element:
    """KL divergence against bits per value; types with long names are numbered, and named below."""
    points = [r for r in results if is_point(r)]
    names = short_names([r.case.types for r in points])
    made = chart(
        f"{title}: points are means with their errors, thin lines go through {WHISKER_COLUMNS}",
        Axis("bits per value of the KV cache, copies included"),
        Axis(f"KL divergence from the {BASE} cache (nats)", log=True),
        [Series((_point(r, names[r.case.types]),), color(r.case.types)) for r in points],
        [_rule(r) for r in results if not is_point(r)],
    )
    long = [t for t in names if names[t] != str(t)]
    if long:
        items = (el("li", swatch(color(t), shape(t)), f"{names[t]} ", el("code", str(t))) for t in long)
        made.append(el("ul", *items, class_="legend"))
    return made


def color(types: CacheSpec) -> str:
    """Class of the style sheet: ours or upstream's."""
    return "ours" if is_turbo(types) else "theirs"


def _point(result: Result, name: str) -> Point:
    mean, ends = of(result.stats, POINT), [of(result.stats, field).value for field in WHISKER]
    text = [f"{result.case.types}", f"{report.short(result.bits.total)} bits per value", *_metrics(result)]
    whisker = (ends[0], ends[-1])
    return Point(result.bits.total, mean.value, "\n".join(text), mean.error, whisker, name, shape(result.case.types))


def _metrics(result: Result) -> list[str]:
    return [f"{row.column}: {report.plus_minus(row.shown(of(result.stats, row.field)), row.digits)}" for row in columns([result.stats])]


def _rule(result: Result) -> Rule:
    return Rule(of(result.stats, POINT).value, line_name(result), "floor" if result.case.is_noise_floor else "theirs")


def memory(one: Judged) -> Element:
    """Memory beside the loss, in the columns of the tables that others publish: MiB, percent of f16, median."""
    shown = [r for r in one.run.records if not r.case.is_noise_floor]
    ladder = sorted((row for row in COLUMNS if row.field in (POINT, *WHISKER)), key=lambda row: row.field == POINT)
    header = (
        "cache K/V",
        "MiB",
        "of them copies",
        "% of f16",
        f"% at {LONG:,}",
        *(f"{row.column.removesuffix(' KLD')} KLD" for row in ladder),
    )
    rows = (
        (
            report.types_text(r.case.types),
            f"{sum(mib(r)):.2f}",
            f"{mib(r)[1]:.2f}" if mib(r)[1] else "",
            _percent(r),
            _percent(r, LONG),
            *(report.plus_minus(row.shown(of(r.stats, row.field)), row.digits) for row in ladder),
        )
        for r in shown
    )
    tokens = max(sum(cache.cells * cache.streams for cache in r.facts.caches) for r in shown) if shown else 0
    about = el("p", *words(f"A cache of {tokens:,} tokens, as the log of the run gives it, and its loss."), class_="about")
    return folded(one.title, about, _bars(shown), table(Table(header, tuple(rows))))


def mib(result: Result) -> tuple[float, float]:
    """MiB of the caches, and of the copies of exact tokens."""
    caches = result.facts.caches
    return sum(c.mib_k + c.mib_v for c in caches), sum(c.copies.mib for c in caches if c.copies)


def percent(result: Result, tokens: int | None = None) -> float:
    """Memory in percent of f16; with ``tokens`` for so long a cache, in which copies are a smaller part.

    NaN where the metadata of the model does not tell the number of values, of which copies would be a part.
    """
    bits, (_, copies) = result.bits, mib(result)
    if copies and not bits.exact:
        return math.nan
    cells = max((cache.cells for cache in result.facts.caches), default=0)
    exact = bits.exact if tokens is None else bits.exact * cells / tokens
    return 100 * (bits.nominal + exact) / _PLAIN_BITS


def _percent(result: Result, tokens: int | None = None) -> str:
    value = percent(result, tokens)
    return "" if math.isnan(value) else f"{value:.1f}"


def _bars(results: Sequence[Result]) -> Element:
    """Percent of f16 as bars, with the copies at their end."""
    rows = []
    for r in results:
        types, whole, cache = r.case.types, percent(r), 100 * r.bits.nominal / _PLAIN_BITS
        parts = [el("i", style=f"width:{cache:.1f}%", class_=f"{color(types)} cache")]
        if whole > cache:
            parts.append(el("i", style=f"width:{whole - cache:.1f}%", class_=f"{color(types)} copies"))
        bar = el("b", *parts, title=f"{types}: {sum(mib(r)):.2f} MiB")
        rows += [el("span", *words(report.types_text(types))), bar, el("em", f"{_percent(r)} %" if _percent(r) else "")]
    return el("div", *rows, class_="bars")
