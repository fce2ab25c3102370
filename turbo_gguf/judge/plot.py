"""Plots (PNG) of quality against bits, speed against depth, and serving against clients: from records of the store alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from turbo_gguf.cache.spec import BASE, CacheSpec, is_turbo
from turbo_gguf.judge.drawing import CHARACTER, LONG_NAME, PLACES, WHISKER_COLUMNS, free_places, is_point, line_name, shape, short_names
from turbo_gguf.judge.report import by_setting
from turbo_gguf.judge.serving import PANELS, loads
from turbo_gguf.measure.metrics import POINT, WHISKER, of
from turbo_gguf.measure.result import BenchRow, Result, ServeRow

_OURS, _THEIRS, _FLOOR = "#c8442a", "#2f6690", "#8a8a8a"
_OUR_SERIES = ("#8c2313", "#c8442a", "#e98a2e", "#b0568c", "#d9ae2b")
_THEIR_SERIES = ("#4d4d4d", "#2f6690", "#5aa0c8", "#3a8f6a", "#8fb8a8")

_MARKERS = {"square": "s", "triangle": "^", "circle": "o", "diamond": "D"}

_LINE = 12.0
"""Height of a line of a label of 8 points, in points."""


def quality(results: Sequence[Result], path: Path) -> Path:
    """Write KL divergence (log scale) against bits per value, one panel per context. Returns ``path``.

    Points are means with one standard error; the thin line goes from the median to the 99.9 % quantile. Our types are circles (a pair
    K/V: diamonds; with settings: triangles), upstream's squares. Dashed lines are f16 (its 16 bits would be far to the right) and
    the noise floor. Types with long names are numbered, and named below the panels.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - a Figure of its own needs no display and no global state

    contexts = list(dict.fromkeys(r.case.ctx for r in results))
    figure = Figure(figsize=(1.2 + 5.4 * len(contexts), 5.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(contexts), squeeze=False, sharey=True)[0]
    types = list(dict.fromkeys(r.case.types for r in results if is_point(r)))
    labels = short_names(types)
    drawn = []
    for ax, ctx in zip(axes, contexts, strict=True):
        group = [r for r in results if r.case.ctx == ctx]
        lines = {line_name(r): of(r.stats, POINT).value for r in group if not is_point(r)}
        points = [r for r in group if is_point(r) and of(r.stats, POINT).value > 0]
        drawn.append((ax, points))
        for r in points:
            _point(ax, r)
        ax.set_yscale("log")
        _lines(ax, lines)
        ax.set_title(f"context {ctx}, {group[0].stats.tokens} tokens", fontsize=10)
        ax.set_xlabel("bits per value of the KV cache")
        ax.grid(which="major", color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.15, y=0.08)
    axes[0].set_ylabel(f"KL divergence from the {BASE} cache (nats)")
    _legend(axes[-1], types)
    if numbered := [t for t in types if labels[t] != str(t)]:
        _name_below(figure, [_key(*_marker(t)) for t in numbered], [f"{labels[t]} {t}" for t in numbered])
    figure.suptitle(f"{results[0].model}: quality of the KV cache types ({results[0].case.backend})", fontsize=11)
    figure.draw_without_rendering()  # places the panels, so that labels can be placed in them
    for ax, points in drawn:
        _labels(ax, points, labels)
    return _save(figure, path)


def _name_below(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Write names below the panels, each behind its handle, in as many columns as fit. The figure grows by their height."""
    width, height = figure.get_size_inches()
    room = int((72 * width - 60) / CHARACTER)
    texts = [name if len(name) <= room else f"{name[: room - 1]}…" for name in names]
    columns = max(1, min(len(texts), room // (max(map(len, texts)) + 8)))
    figure.set_size_inches(width, height + (_LINE * math.ceil(len(texts) / columns) + 12) / 72)
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelspacing=0.3)


def _lines(ax: Any, lines: Mapping[str, float]) -> None:
    """Dashed lines, or notes for those that lie below the last digit that the tool prints."""
    low = [name for name, value in lines.items() if value <= 0]
    for name, value in lines.items():
        if name not in low:
            color = _FLOOR if name == "noise floor" else _THEIRS
            ax.axhline(value, color=color, linestyle="--", linewidth=1)
            place = {"xy": (0, value), "xycoords": ("axes fraction", "data"), "xytext": (6, 5)}
            ax.annotate(name, **place, va="center", **_text("left", color))
    if low:
        note = f"{' and '.join(low)} below 0.000001"
        ax.annotate(note, (0, 0), xycoords="axes fraction", xytext=(6, 5), **_text("left", _FLOOR))


def _marker(types: CacheSpec) -> tuple[str, str]:
    return _MARKERS[shape(types)], _OURS if is_turbo(types) else _THEIRS


def _point(ax: Any, result: Result) -> None:
    marker, color = _marker(result.case.types)
    x = result.bits.total
    mean, ends = of(result.stats, POINT), [of(result.stats, field).value for field in WHISKER]
    ax.plot([x, x], ends, color=color, linewidth=0.8, alpha=0.45, zorder=2)
    ax.plot([x, x], ends, "_", color=color, markersize=7, alpha=0.6, zorder=2)
    ax.errorbar(
        [x],
        [mean.value],
        yerr=[[min(mean.error, mean.value * 0.95)], [mean.error]],
        fmt=marker,
        color=color,
        markersize=6,
        capsize=3,
        zorder=3,
    )


def _labels(ax: Any, points: Sequence[Result], labels: Mapping[CacheSpec, str]) -> None:
    """Name the points, each at the first place where its text covers no marker and no other text (limits must be final)."""
    scale = 72 / ax.figure.dpi
    centers = []
    for r in points:
        x, y = ax.transData.transform((r.bits.total, of(r.stats, POINT).value)) * scale
        centers.append((float(x), float(y)))
    names = [labels[r.case.types] for r in points]
    for r, name, place in zip(points, names, free_places(centers, names), strict=True):
        side, dx, dy = place or PLACES[0]
        point = (r.bits.total, of(r.stats, POINT).value)
        ax.annotate(name, point, xytext=(dx, dy), va="center", **_text(side, _marker(r.case.types)[1]))


def _text(side: str, color: str) -> dict[str, object]:
    from matplotlib import patheffects  # noqa: PLC0415

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]  # readable where a label crosses a line
    return {"textcoords": "offset points", "ha": side, "fontsize": 8, "color": color, "path_effects": halo, "zorder": 4}


def _key(marker: str, color: str, label: str = "") -> Any:
    """What stands for a marker in a legend."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    return Line2D([], [], marker=marker, color=color, linestyle="", markersize=6, label=label)


def _legend(ax: Any, types: Sequence[CacheSpec]) -> None:
    entries = [
        _key("o", _OURS, "turbo, K = V"),
        _key("D", _OURS, "turbo, K/V pair"),
        *([_key("^", _OURS, "turbo, with settings")] if any(t.has_settings for t in types) else []),
        _key("s", _THEIRS, "upstream"),
        _key("_", _FLOOR, WHISKER_COLUMNS),
    ]
    ax.legend(handles=entries, fontsize=8, frameon=False, loc="upper right")


def speed(rows: Sequence[BenchRow], path: Path) -> Path:
    """Write tokens per second against depth, one panel for prefill and one for decode. Returns ``path``.

    Medians over the rounds with the range of the rounds.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = by_setting(rows)
    tests = list(dict.fromkeys(test for _, test, _ in found))
    names = list(dict.fromkeys(types for types, _, _ in found))
    colors = _series(names)
    figure = Figure(figsize=(1.2 + 5.0 * len(tests), 4.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(tests), squeeze=False)[0]
    for ax, test in zip(axes, tests, strict=True):
        for types in names:
            points = sorted((depth, m) for (t, name, depth), m in found.items() if t == types and name == test)
            ax.errorbar(
                [depth for depth, _ in points],
                [m.value for _, m in points],
                yerr=[m.error for _, m in points],
                marker=_marker(types)[0],
                linestyle="-" if is_turbo(types) else "--",
                color=colors[types],
                markersize=5,
                linewidth=1.3,
                capsize=3,
                label=str(types),
            )
        ax.set_title("prefill" if test.startswith("pp") else "decode", fontsize=10)
        ax.set_xlabel("depth (tokens in the cache)")
        ax.set_ylim(bottom=0)
        ax.grid(color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("tokens per second")
    if any(len(str(types)) > LONG_NAME for types in names):
        _name_below(figure, *axes[-1].get_legend_handles_labels())
    else:
        axes[-1].legend(fontsize=8, frameon=False)
    first = rows[0].row
    figure.suptitle(f"{first.get('model_type', '')}: speed against depth ({first.get('backends', '')})", fontsize=11)
    return _save(figure, path)


def serving(rows: Sequence[ServeRow], path: Path) -> Path:
    """Write throughput and p99 of both waits against the number of clients, one panel each. Returns ``path``."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = loads(rows)
    names = list(dict.fromkeys(load.types for load in found))
    colors = _series(names)
    figure = Figure(figsize=(1.2 + 4.6 * len(PANELS), 4.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for ax, (what, is_log, number) in zip(axes, PANELS, strict=True):
        for types in names:
            points = sorted((load.clients, number(load)) for load in found if load.types == types)
            ax.plot(
                [clients for clients, _ in points],
                [value for _, value in points],
                marker=_marker(types)[0],
                linestyle="-" if is_turbo(types) else "--",
                color=colors[types],
                markersize=5,
                linewidth=1.3,
                label=str(types),
            )
        ticks = sorted({load.clients for load in found})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(clients) for clients in ticks])
        ax.set_xlabel("clients")
        ax.set_title(what, fontsize=10)
        if is_log:
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        ax.grid(color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    if any(len(str(types)) > LONG_NAME for types in names):
        _name_below(figure, *axes[-1].get_legend_handles_labels())
    else:
        axes[0].legend(fontsize=8, frameon=False)
    first = rows[0]
    figure.suptitle(f"{first.model}: serving in {first.budget_mib:.0f} MiB of KV memory ({first.backend})", fontsize=11)
    return _save(figure, path)


def _series(names: Sequence[CacheSpec]) -> dict[CacheSpec, str]:
    """Warm colours for our types, cold ones for upstream's."""
    warm, cold = cycle(_OUR_SERIES), cycle(_THEIR_SERIES)
    return {types: next(warm if is_turbo(types) else cold) for types in names}


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
