"""What a plot and a page draw alike: which results are points, shapes and short names of types, places of labels."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_gguf.cache.spec import PLAIN, CacheSpec, is_turbo
from turbo_gguf.measure.metrics import METRICS, WHISKER
from turbo_gguf.measure.result import Result

Place = tuple[str, float, float]
Box = tuple[float, float, float, float]

LONG_NAME = 13
"""Characters beyond which a name stands below a plot instead of in it: turbo4/turbo3 still fits."""

CHARACTER = 4.7
"""Mean width of a character of a label, in units of which its height is 9."""

PLACES: tuple[Place, ...] = (
    *(("left", 7, 0), ("right", -7, 0), ("left", 6, -9), ("left", 6, 9), ("right", -6, -9), ("right", -6, 9), ("left", 7, -18)),
    *(("right", -7, -18), ("left", 7, 18), ("right", -7, 18)),
)
"""Where a label may stand: alignment and offset from its point, the best place first."""

WHISKER_COLUMNS = " and ".join(row.column for row in METRICS if row.field in WHISKER)


def is_point(result: Result) -> bool:
    """Whether a result is drawn as a point; f16 and the noise floor are lines."""
    return not result.case.is_noise_floor and result.case.types != PLAIN


def line_name(result: Result) -> str:
    """What is written at the line of a result that is no point."""
    return "noise floor" if result.case.is_noise_floor else str(result.case.types)


def shape(types: CacheSpec) -> str:
    """Upstream's types are squares. Ours are circles, a pair K/V a diamond; with settings: triangles."""
    if not is_turbo(types):
        return "square"
    if types.has_settings:
        return "triangle"
    return "circle" if types.k == types.v else "diamond"


def short_names(types: Sequence[CacheSpec]) -> dict[CacheSpec, str]:
    """What to write beside a point: the name, or a number for one that is long."""
    long = [t for t in types if len(str(t)) > LONG_NAME]
    return {t: f"[{long.index(t) + 1}]" if t in long else str(t) for t in types}


def free_places(centers: Sequence[tuple[float, float]], names: Sequence[str]) -> list[Place | None]:
    """Find a place for the name of each point: the first where it covers no marker and no name before it; ``None``: there is none."""
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in centers]
    found: list[Place | None] = []
    for (x, y), name in zip(centers, names, strict=True):
        boxes = [_box(x + dx, y + dy, side, name) for side, dx, dy in PLACES]
        best = next((i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)), None)
        taken.append(boxes[best or 0])
        found.append(None if best is None else PLACES[best])
    return found


def _box(x: float, y: float, side: str, name: str) -> Box:
    """Left, bottom, right and top of a label."""
    width = CHARACTER * len(name)
    left = x if side == "left" else x - width
    return left, y - 4.5, left + width, y + 4.5


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
