"""A picture of a cache type: its levels under the density of what is stored, and its error among those of all types, above the bound."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turbo_gguf.codec import packing, trellis
from turbo_gguf.codec.codebook import Gaussian
from turbo_gguf.codec.distortion import bits_per_value, bound, expected, scalar_limit
from turbo_gguf.codec.packing import turbo_type
from turbo_gguf.codec.tables import ALL, LEVEL_STEPS, ScalarType, TurboType

_OURS, _OTHERS, _LINE = "#c8442a", "#b9b9b9", "#2f6690"
_BLOCKS = 1000


def levels(t: TurboType | str) -> dict[str, npt.NDArray[np.float64]]:
    """Codebooks of a type by name, ascending, in standard deviations of Gaussian values.

    Those of a trellis type are drawn at the mean of the scales that its encoder chooses.
    """
    found = turbo_type(t)
    if isinstance(found, ScalarType):
        return {"codebook": np.array(found.codebook) / found.int_scale}
    x = np.random.default_rng(0).standard_normal((_BLOCKS, found.block))
    d = float(trellis.scale_of(packing.quantize(found, x)[:, :1]).mean()) / found.gain
    fine, coarse = (np.array(book) * d / LEVEL_STEPS for book in found.codebooks)
    return {"fine": fine, "coarse": coarse}


def draw(t: TurboType | str, path: Path, *, measured: Mapping[str, float] | None = None) -> Path:
    """Write a picture (PNG). Returns ``path``.

    Args:
        t: a type, or its name.
        path: file to write; its folder is made.
        measured: relative squared errors of values, by what they are called in the legend.

    Raises:
        ValueError: no such type.
        OSError: the file can't be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - a Figure of its own needs no display and no global state

    found = turbo_type(t)
    figure = Figure(figsize=(10.6, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_levels(left, found)
    _draw_errors(right, found, measured or {})
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _draw_levels(ax: Any, t: TurboType) -> None:
    x = np.linspace(-3.6, 3.6, 400)
    density = Gaussian().density
    ax.fill_between(x, density(x), color="#efefef", label="density of N(0, 1)")
    for (name, points), style in zip(levels(t).items(), ("-", ":"), strict=False):
        ax.vlines(points, 0, density(points) + 0.02, color=_OURS, linestyle=style, linewidth=1.4, label=f"{len(points)} levels, {name}")
    ax.set_ylim(0, 0.52)
    ax.set_xlabel("value, in standard deviations")
    ax.set_yticks([])
    ax.set_title(f"{t.name}: {t.family}, {t.block} values in {t.block_bytes} bytes", fontsize=10)


def _draw_errors(ax: Any, t: TurboType, measured: Mapping[str, float]) -> None:
    bits = np.linspace(2, 5, 100)
    ax.plot(bits, bound(1) ** bits, color=_LINE, label="bound: no code is below")
    ax.plot(bits, scalar_limit(0) * bound(1) ** bits, color=_LINE, linestyle="--", label="scalar codes of many bits")
    for other in ALL:
        point = bits_per_value(other), expected(other).error
        marker, offset = ("o", (6, 5)) if other.family == "scalar" else ("D", (7, -6))
        color, ink = (_OURS, _OURS) if other == t else (_OTHERS, "#777777")
        ax.plot(*point, marker=marker, linestyle="", color=color)
        ax.annotate(other.name, point, xytext=offset, textcoords="offset points", fontsize=8, color=ink)
    for (name, error), marker in zip(measured.items(), cycle("xX+Pv^"), strict=False):
        ax.plot(bits_per_value(t), error, marker=marker, linestyle="", color="black", label=name)
    ax.set_yscale("log")
    ax.set_xlabel("bits per value")
    ax.set_ylabel("relative squared error")
    ax.grid(which="major", color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)
