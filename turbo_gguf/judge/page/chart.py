"""Charts as inline SVG: points with error bars, or lines; what the pointer rests on says its numbers. No script, no colour of its own.

Colours and sizes of text are the style sheet's, so charts follow the light or dark scheme. A chart is narrow enough that its text can be
read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from turbo_gguf.judge.drawing import CHARACTER, free_places
from turbo_gguf.judge.page.element import Element, add, el

WIDTH, HEIGHT = 480, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 468, 12, 312
_LETTER = 7.8
"""Mean width of a character of the style sheet's text in charts."""
_LINE = 16
"""Height of a line of it."""


class Axis(msgspec.Struct, frozen=True):
    """What an axis shows."""

    title: str
    log: bool = False
    zero: bool = False  # whether it begins at zero
    ticks: tuple[tuple[float, str], ...] = ()  # none: round numbers


class Point(msgspec.Struct, frozen=True):
    """One measured value."""

    x: float
    y: float
    text: str  # what the pointer sees, and a screen reader reads
    error: float = 0.0
    whisker: tuple[float, float] | None = None  # ends of a thin line
    name: str = ""  # beside it
    shape: str = "circle"


class Series(msgspec.Struct, frozen=True):
    """Points of one colour."""

    points: tuple[Point, ...]
    color: str  # class of the style sheet
    name: str = ""  # in the legend; "": not there
    joined: bool = False
    dashed: bool = False


class Rule(msgspec.Struct, frozen=True):
    """A dashed line at a value."""

    y: float
    name: str
    color: str = "floor"


class Scale(msgspec.Struct, frozen=True):
    """From values to places."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Place of a value."""
        low, high, x = (math.log(v) for v in (self.low, self.high, value)) if self.axis.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (x - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values with a line, and their texts."""
        if self.axis.ticks:
            return list(self.axis.ticks)
        values = _log_ticks(self.low, self.high) if self.axis.log else _linear_ticks(self.low, self.high)
        return [(value, number(value)) for value in values]


def number(value: float) -> str:
    """``4,096``, ``0.0005``, ``1e-6``."""
    if 0 < abs(value) < 1e-4:
        return f"{value:g}".replace("e-0", "e-")
    return f"{value:,.7f}".rstrip("0").rstrip(".")


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for power in powers for step in steps if low <= (v := step * 10.0**power) <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scale(axis: Axis, values: Iterable[float], start: float, end: float) -> Scale:
    """Fit all values between two places, with a little room."""
    known = [*values, *(value for value, _ in axis.ticks)]
    low, high = min(known), max(known)
    if axis.log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return Scale(axis, low / room, high * room, start, end)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(axis, 0.0 if axis.zero else low - room, high + room, start, end)


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], rules: Sequence[Rule] = ()) -> Element:
    """A figure with its title below it. What has no place on a logarithmic axis is named there.

    Points without a finite value are left out; a chart without any point is a sentence.
    """
    shown = [msgspec.structs.replace(s, points=tuple(p for p in s.points if _has_place(p.x, x) and _has_place(p.y, y))) for s in series]
    shown = [s for s in shown if s.points]
    low = [rule.name for rule in rules if not _has_place(rule.y, y)]
    caption = el("figcaption", title, *([f"; {' and '.join(low)} below what can be shown"] if low else []))
    if not shown:
        return el("figure", el("p", "Nothing in it can be drawn."), caption)
    points = [p for s in shown for p in s.points]
    lines = [rule for rule in rules if _has_place(rule.y, y)]
    over = scale(x, [p.x for p in points], LEFT, RIGHT)
    up = scale(y, [*(v for p in points for v in _extent(p, y)), *(rule.y for rule in lines)], BOTTOM, TOP)
    svg = el("svg", el("title", title), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    add(svg, _frame(over, up), *_rules(lines, up))
    add(svg, *(_path(s, over, up) for s in shown if s.joined))
    add(svg, *(_point(p, s, over, up) for s in shown for p in s.points), *_names(shown, lines, over, up))
    return el("figure", svg, caption, *_legend(shown))


def _has_place(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _extent(point: Point, axis: Axis) -> list[float]:
    ends = [point.y, point.y - point.error, point.y + point.error, *(point.whisker or ())]
    return [value for value in ends if _has_place(value, axis)]


def _frame(over: Scale, up: Scale) -> Element:
    """Grid, texts of both axes."""
    made = el("g", class_="frame")
    for value, text in up.ticks():
        at = up.at(value)
        add(made, el("line", x1=LEFT, x2=RIGHT, y1=at, y2=at), el("text", text, x=LEFT - 7, y=at + 4, text_anchor="end"))
    for value, text in over.ticks():
        at = over.at(value)
        add(made, el("line", x1=at, x2=at, y1=TOP, y2=BOTTOM), el("text", text, x=at, y=BOTTOM + 17, text_anchor="middle"))
    add(made, el("text", over.axis.title, x=(LEFT + RIGHT) / 2, y=HEIGHT - 10, text_anchor="middle", class_="axis"))
    middle = (TOP + BOTTOM) / 2
    turned = {"transform": f"rotate(-90 12 {middle:g})"}
    add(made, el("text", up.axis.title, x=12, y=middle, text_anchor="middle", class_="axis", **turned))
    return made


def _rules(rules: Sequence[Rule], up: Scale) -> list[Element]:
    """Lines with their names; a name that would stand on the one before stands behind it."""
    made, last, x = [], -math.inf, 0.0
    for rule in sorted(rules, key=lambda one: one.y):
        at = up.at(rule.y)
        x = x if abs(at - last) < _LINE else LEFT + 4
        line = el("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="rule")
        made.append(el("g", line, el("text", rule.name, x=x, y=at - 4), class_=rule.color))
        last, x = at, x + _LETTER * (len(rule.name) + 1)
    return made


def _path(series: Series, over: Scale, up: Scale) -> Element:
    places = " ".join(f"{over.at(p.x):.1f},{up.at(p.y):.1f}" for p in series.points)
    return el("polyline", points=places, class_=f"{series.color} path{' dashed' if series.dashed else ''}")


def _point(point: Point, series: Series, over: Scale, up: Scale) -> Element:
    """Marker, error and whisker, with a text and a place for the pointer that is larger than they are."""
    x, y = over.at(point.x), up.at(point.y)
    made = el("g", el("title", point.text), class_=f"{series.color} point")
    ends = [value for value in point.whisker or () if _has_place(value, up.axis)]
    if ends:
        add(made, el("line", x1=x, x2=x, y1=up.at(min(ends)), y2=up.at(max(ends)), class_="whisker"))
        add(made, *(el("line", x1=x - 4, x2=x + 4, y1=up.at(end), y2=up.at(end), class_="whisker") for end in ends))
    if point.error > 0 and math.isfinite(point.error):
        least = up.low if up.axis.log else -math.inf
        low, high = (up.at(max(value, least)) for value in (point.y - point.error, point.y + point.error))
        add(made, el("line", x1=x, x2=x, y1=low, y2=high, class_="error"))
    add(made, marker(point.shape, x, y), el("circle", cx=x, cy=y, r=11, class_="hit"))
    return made


def marker(shape: str, x: float, y: float, size: float = 4.5) -> Element:
    """A shape of :func:`turbo_gguf.judge.drawing.shape` around a place."""
    if shape == "circle":
        return el("circle", cx=x, cy=y, r=size, class_="mark")
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    }[shape]
    return el("polygon", points=" ".join(f"{x + dx * size * 0.9:.1f},{y + dy * size * 0.9:.1f}" for dx, dy in corners), class_="mark")


def _names(series: Sequence[Series], rules: Sequence[Rule], over: Scale, up: Scale) -> list[Element]:
    """Names beside points, where they cover nothing, and above lines that would go through them.

    A name without a place is left to the pointer and the table.
    """
    named = [(p, s.color) for s in series for p in s.points if p.name]
    places = [(over.at(p.x), up.at(p.y)) for p, _ in named]
    unit = _LETTER / CHARACTER
    found = free_places([(x / unit, y / unit) for x, y in places], [p.name for p, _ in named])
    made = []
    for (point, color), (x, y), place in zip(named, places, found, strict=True):
        if place is None:
            continue
        side, dx, dy = place
        anchor = "start" if side == "left" else "end"
        if x + dx * unit + _LETTER * len(point.name) * (1 if side == "left" else -1) > WIDTH - 4:
            anchor, dx = "end", -abs(dx)
        base = y + dy * unit + 4
        under = [at for rule in rules if base - _LINE < (at := up.at(rule.y)) < base + 3]
        base = min(base, *(at - 4 for at in under)) if under else base
        made.append(el("text", point.name, x=x + dx * unit, y=base, text_anchor=anchor, class_=f"{color} name"))
    return made


def _legend(series: Sequence[Series]) -> list[Element]:
    """Names of lines, below the chart, in text that wraps."""
    named = [s for s in series if s.name]
    if not named:
        return []
    return [
        el("ul", *(el("li", swatch(s.color, s.points[0].shape, line=s.joined, dashed=s.dashed), s.name) for s in named), class_="legend")
    ]


def swatch(color: str, shape: str, *, line: bool = False, dashed: bool = False) -> Element:
    """A small picture of what stands for a series."""
    stroke = [el("polyline", points="1,7 25,7", class_=f"{color} path{' dashed' if dashed else ''}")] if line else []
    picture = el("g", marker(shape, 13, 7), class_=f"{color} point")
    return el("svg", *stroke, picture, viewBox="0 0 26 14", class_="swatch", aria_hidden="true")
