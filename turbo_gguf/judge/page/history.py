"""The same set-up measured with other patches or another upstream: a table with a column for each build, and lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from turbo_gguf.cache.spec import PLAIN, CacheSpec, is_turbo
from turbo_gguf.judge import report, serving
from turbo_gguf.judge.drawing import shape
from turbo_gguf.judge.page.chart import Axis, Point, Series, chart
from turbo_gguf.judge.page.element import Element, el, folded, table
from turbo_gguf.judge.page.runs import R, Run
from turbo_gguf.judge.page.timing import bench_title, colors
from turbo_gguf.judge.report import Table
from turbo_gguf.measure.metrics import COLUMNS, POINT, Metric, of
from turbo_gguf.measure.result import BenchRow, Result, ServeRow

BUILDS = 8
"""Newest builds that are shown."""

RISEN, FALLEN = " ▲", " ▼"

Numbers = Mapping[CacheSpec, Metric]


def quality(history: Sequence[Run[Result]], title: str, sigmas: float) -> list[Element]:
    """How the mean KL divergence of each type went; nothing for a set-up with one build."""
    row = next(row for row in COLUMNS if row.field == POINT)

    def numbers(run: Run[Result]) -> Numbers:
        return {r.case.types: of(r.stats, row.field) for r in run.records if not r.case.is_noise_floor}

    return _shown(history, f"{title}: {row.column}", numbers, row.digits, sigmas, is_log=True)


def speed(history: Sequence[Run[BenchRow]], sigmas: float) -> list[Element]:
    """How the speed at the greatest depth went, for each test."""
    made = []
    for test in dict.fromkeys(row.test for run in history for row in run.records):
        depth = max(row.depth for run in history for row in run.records if row.test == test)

        def numbers(run: Run[BenchRow], test: str = test, depth: int = depth) -> Numbers:
            return {types: m for (types, name, at), m in report.by_setting(run.records).items() if (name, at) == (test, depth)}

        title = f"{bench_title(history[-1])}: {report.test_text(test).lower()} at depth {depth:,}, tokens per second"
        made += _shown(history, title, numbers, 1, sigmas)
    return made


def served(history: Sequence[Run[ServeRow]], sigmas: float) -> list[Element]:
    """How the throughput with the most clients went. A load has no error."""
    clients = max(row.clients for run in history for row in run.records)

    def numbers(run: Run[ServeRow]) -> Numbers:
        return {load.types: Metric(load.speed, 0.0) for load in serving.loads(run.records) if load.clients == clients}

    return _shown(history, f"{history[-1].records[0].model}: tokens per second of {clients} clients", numbers, 1, sigmas)


def _shown(
    history: Sequence[Run[R]], title: str, numbers: Callable[[Run[R]], Numbers], digits: int, sigmas: float, *, is_log: bool = False
) -> list[Element]:
    numbered = [(run, numbers(run)) for run in history[-BUILDS:]]
    runs = [(run, found) for run, found in numbered if found]
    counts = Counter(types for _, found in runs for types in found)
    types = [t for t, count in counts.items() if count > 1]
    if not types:
        return []
    header = ("cache K/V", *(f"{run.time[:10]} {run.build}" for run, _ in runs))
    rows = tuple((report.types_text(t), *_cells([found.get(t) for _, found in runs], digits, sigmas)) for t in types)
    drawn = [t for t in types if not t.has_settings]
    ticks = tuple((float(i), run.build.patches[:6] or "none") for i, (run, _) in enumerate(runs))
    series = [
        Series(
            tuple(_point(i, found[t], t, run, digits) for i, (run, found) in enumerate(runs) if t in found),
            color,
            str(t),
            joined=True,
            dashed=not is_turbo(t),
        )
        for t, color in colors(drawn).items()
    ]
    picture = chart(title, Axis("patches", ticks=ticks), Axis(title.rpartition(": ")[2], log=is_log, zero=not is_log), series)
    left_out = f" {len(history) - BUILDS} older builds are left out." if len(history) > BUILDS else ""
    about = el("p", f"Marked is what differs from the build before by more than {sigmas:g} standard errors.{left_out}", class_="about")
    return [folded(title, about, *([picture] if drawn else []), table(Table(header, rows)))]


def _cells(metrics: Sequence[Metric | None], digits: int, sigmas: float) -> list[str]:
    """Numbers with a mark where they went up or down; without errors nothing is marked."""
    cells, last = [], None
    for metric in metrics:
        if metric is None:
            cells.append("")
            continue
        cells.append(report.plus_minus(metric, digits) + ("" if last is None else _mark(metric, last, sigmas)))
        last = metric
    return cells


def _mark(metric: Metric, last: Metric, sigmas: float) -> str:
    error = math.hypot(metric.error, last.error)
    if not error or abs(metric.value - last.value) <= sigmas * error:
        return ""
    return RISEN if metric.value > last.value else FALLEN


def _point(place: int, metric: Metric, types: CacheSpec, run: Run[R], digits: int) -> Point:
    text = f"{types}{' (as llama.cpp takes it by itself)' if types == PLAIN else ''}\n{report.plus_minus(metric, digits)}\n{run.build}"
    return Point(float(place), metric.value, text, metric.error, shape=shape(types))
