"""Speed against depth, and serving under load, of one run each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

from turbo_gguf.cache.spec import PLAIN, CacheSpec, is_turbo
from turbo_gguf.judge import report, serving
from turbo_gguf.judge.drawing import shape
from turbo_gguf.judge.page.chart import Axis, Point, Series, chart, number
from turbo_gguf.judge.page.element import Element, el, folded, table
from turbo_gguf.judge.page.runs import Run, model_of
from turbo_gguf.judge.serving import Load
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import BenchRow, ServeRow

SHADES = 8
"""Colours of each family in the style sheet."""


def colors(names: Sequence[CacheSpec]) -> dict[CacheSpec, str]:
    """Classes of the style sheet: warm colours for our types, cold ones for upstream's."""
    ours, theirs = cycle(range(SHADES)), cycle(range(SHADES))
    return {types: f"ours-{next(ours)}" if is_turbo(types) else f"theirs-{next(theirs)}" for types in names}


def bench_title(run: Run[BenchRow]) -> str:
    """Model, device and threads."""
    row = run.records[0].row
    kind = str(row.get("model_type", "")).replace(" ?B", "")  # llama-bench knows the usual sizes only
    return f"{model_of(run.records[0])} ({kind}), {row.get('backends', '')}, {row.get('n_threads', '?')} threads"


def speed(run: Run[BenchRow], *, opened: bool) -> Element:
    """Charts and tables of all tests of a run."""
    tables = report.speed_tables(run.records, PLAIN)
    about = f"Medians of the rounds, and half their range. llama.cpp {run.build}. Last measured {run.time[:10]}."
    charts = el("div", *(_speed_chart(run.records, test) for test in tables), class_="charts")
    shown = (table(one, f"{report.test_text(test)}, tokens per second (ratio to {PLAIN})") for test, one in tables.items())
    return folded(bench_title(run), el("p", about, class_="about"), charts, *shown, opened=opened)


def _speed_chart(rows: Sequence[BenchRow], test: str) -> Element:
    found = {(types, depth): m for (types, name, depth), m in report.by_setting(rows).items() if name == test}
    depths = sorted({depth for _, depth in found})
    names = list(dict.fromkeys(types for types, _ in found))
    series = [
        Series(
            tuple(
                _speed_point(types, depth, found[types, depth], found.get((PLAIN, depth))) for depth in depths if (types, depth) in found
            ),
            color,
            str(types),
            joined=True,
            dashed=not is_turbo(types),
        )
        for types, color in colors(names).items()
    ]
    ticks = tuple((float(depth), number(depth)) for depth in depths)
    return chart(report.test_text(test), Axis("depth (tokens in the cache)", ticks=ticks), Axis("tokens per second", zero=True), series)


def _speed_point(types: CacheSpec, depth: int, speed: Metric, base: Metric | None) -> Point:
    ratio = f"\n{speed.value / base.value:.2f} of {PLAIN}" if base and base.value > 0 else ""
    text = f"{types} at depth {depth:,}\n{report.plus_minus(speed, 1)} tokens per second{ratio}"
    return Point(float(depth), speed.value, text, speed.error, shape=shape(types))


def served(run: Run[ServeRow], *, opened: bool) -> Element:
    """What fits, charts over the number of clients, and the tables of all loads."""
    found = serving.loads(run.records)
    parts = [
        el("p", f"{serving.measured_on(run.records)}. Last measured {run.time[:10]}.", class_="about"),
        table(serving.fits(found)),
        el("div", *(_panel(found, *panel) for panel in serving.PANELS), class_="charts"),
        *(table(one, title) for title, one in serving.load_tables(found).items()),
    ]
    if failed := serving.failures(found):
        parts.append(table(failed, "Failures"))
    first = run.records[0]
    return folded(f"{first.model}, {first.budget_mib:.0f} MiB, slots of {first.ctx:,} tokens, {first.backend}", *parts, opened=opened)


def _panel(found: Sequence[Load], title: str, is_log: bool, amount: serving.Amount) -> Element:
    """A number against the number of clients, which are on a scale of their own: each twice the one before would be even."""
    names = list(dict.fromkeys(load.types for load in found))
    series = [
        Series(
            tuple(_load_point(load, amount(load), title) for load in sorted(_of(found, types), key=lambda one: one.clients)),
            color,
            str(types),
            joined=True,
            dashed=not is_turbo(types),
        )
        for types, color in colors(names).items()
    ]
    ticks = tuple((float(clients), str(clients)) for clients in sorted({load.clients for load in found}))
    return chart(title, Axis("clients", log=True, ticks=ticks), Axis(title, log=is_log, zero=not is_log), series)


def _of(found: Sequence[Load], types: CacheSpec) -> list[Load]:
    return [load for load in found if load.types == types]


def _load_point(load: Load, value: float, title: str) -> Point:
    shown = "nothing was answered" if math.isnan(value) else f"{value:.3g} {title}"
    return Point(float(load.clients), value, f"{load.types}, {load.clients} clients\n{shown}", shape=shape(load.types))
