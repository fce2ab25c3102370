"""Table and plot of searches: KL divergence on unseen text against bits per value, tuned and uniform, from the files of `tune`.

    python scripts/bench/tune_curves.py smol-*.cache.toml qwen-*.cache.toml --plot eval/results/tune.png

The table goes to standard output. Exit codes are those of the driver.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from turbo_gguf.failures import exit_code
from turbo_gguf.judge.report import markdown
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.tune import preset
from turbo_gguf.tune.preset import Preset
from turbo_gguf.tune.tuner import FLOOR, RIVAL, WINNER, gain

_TUNED, _UNIFORM, _FLOOR = "#c8442a", "#2f6690", "#8a8a8a"
HEADER = ("bits asked for", "tuned: bits", "mean KLD", "best by hand, no more bits", "bits", "mean KLD", "less", "above f16")


def rows(found: Preset, about: str) -> list[dict[str, Any]]:
    """Its rows of evidence about something."""
    return [row for row in found.evidence["row"] if row["about"] == about]


def kld(row: dict[str, Any]) -> Metric:
    """Of a row."""
    return Metric(row["kld"], row["error"])


def line(found: Preset) -> tuple[str, ...]:
    """A search as a row of the table."""
    asked = found.evidence["asked-bits"]
    (tuned,), (floor,) = rows(found, WINNER), rows(found, FLOOR)
    rival = min((row for row in rows(found, RIVAL) if row["bits"] <= asked + 1e-6), key=lambda row: row["kld"])
    less = gain(kld(tuned), kld(rival))
    above = 1 - max(tuned["kld"] - floor["kld"], 0.0) / (rival["kld"] - floor["kld"])
    loss = [f"{row['kld']:.5f} ± {row['error']:.5f}" for row in (tuned, rival)]
    numbers = (f"{100 * less.value:.0f} ± {100 * less.error:.0f} %", f"{100 * above:.0f} %")
    return (f"{asked:g}", f"{tuned['bits']:.3f}", loss[0], rival["types"], f"{rival['bits']:.3f}", loss[1], *numbers)


def draw(searches: Sequence[Sequence[Preset]], path: Path) -> None:
    """Write the plot, a panel for each model."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=(5.6 * len(searches), 4.6), dpi=150, layout="constrained")
    for ax, found in zip(figure.subplots(1, len(searches), squeeze=False)[0], searches, strict=True):
        uniform = {row["types"]: row for one in found for row in rows(one, RIVAL)}
        tuned = [row for one in found for row in rows(one, WINNER)]
        for group, color, marker, name in ((uniform.values(), _UNIFORM, "s", "one pair for all layers"), (tuned, _TUNED, "o", "tuned")):
            ordered = sorted(group, key=lambda row: row["bits"])
            points = [[row[key] for row in ordered] for key in ("bits", "kld", "error")]
            ax.errorbar(points[0], points[1], yerr=points[2], fmt=marker, color=color, capsize=2, label=name, markersize=5)
        ax.plot(*zip(*sorted((row["bits"], row["kld"]) for row in tuned), strict=True), color=_TUNED, linewidth=1)
        for name, row in uniform.items():
            ax.annotate(name, (row["bits"], row["kld"]), xytext=(5, 3), textcoords="offset points", fontsize=6.5, color=_UNIFORM)
        floor = rows(found[0], FLOOR)[0]["kld"]
        ax.axhline(floor, color=_FLOOR, linestyle="--", linewidth=1, label="f16")
        ax.set_title(f"{found[0].model.name}, {found[0].evidence['unseen-tokens']:,} unseen tokens", fontsize=10)
        ax.set_xlabel("bits per value of the KV cache")
        ax.set_yscale("log")
        ax.grid(which="both", color="#e4e4e4", linewidth=0.6)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean KL divergence from the f32 cache (nats)")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    found = [preset.read(path) for path in options.presets]
    found.sort(key=lambda one: (one.model.sha256, one.evidence["asked-bits"]))
    searches = [list(group) for _, group in groupby(found, key=lambda one: one.model.sha256)]
    for group in searches:
        print(f"### {group[0].model.name}\n\n{markdown(HEADER, [line(one) for one in group])}\n")
    if options.plot:
        draw(searches, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
