"""Measure all cache types on four models: plain, calibrated, and with an exact sink and tail (eval/matrix/sweep.toml).

    python scripts/bench/quality_matrix.py                       # 45 minutes on two idle cores; interrupted, it goes on where it was
    python scripts/bench/quality_matrix.py --models head64 bias
    python scripts/bench/quality_matrix.py --small               # to try the script; its numbers mean nothing

The text is that of ppl-gate; calibrations come from other modules of the standard library. Planted models and calibrations lie below
build/matrix and are the same bytes every time, so that what is in the store is not measured again.

Writes a table and a plot of each model below --out, and README.md there: all models beside each other, and what we aimed at. Exit codes
are those of ppl-gate, but for 1, which there is not: this measures, gates.toml judges.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

sys.path.append(str(Path(__file__).resolve().parents[1] / "lab"))  # called as a script
import plant_model

from turbo_gguf import assets
from turbo_gguf.cache.settings import NONE
from turbo_gguf.cache.spec import BASE, CacheSpec, with_defaults
from turbo_gguf.failures import exit_code
from turbo_gguf.files import write_text
from turbo_gguf.inputs import models
from turbo_gguf.inputs.eval_text import read_source, stdlib_dir
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.judge import gate, plot, report
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import presets
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.measure import calibrate, environment, kld, sweep
from turbo_gguf.measure.metrics import Metric, of
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.tools import default_threads

CALIBRATION_MODULES = ("bisect.py", "asyncio/queues.py", "copy.py", "textwrap.py", "email/message.py", "ast.py", "pathlib.py")
"""Modules of the standard library whose first few thousand tokens make a calibration. The text that is measured has none of them."""
CALIBRATION = "calibration.gguf"
"""Name of the file, as eval/matrix/sweep.toml has it: relative to the folder of the model, in which a sweep runs."""

SMALL = {512: 1, 4096: 1}
"""Chunks by context of --small."""


@dataclass(frozen=True)
class Target:
    """Mean KL divergence of a type, at most so many times that of another one. The best of several types counts."""

    models: Sequence[str]
    types: str  # as :func:`label` writes them; several with "or" between
    reference: str
    limit: float
    ctx: int = 0  # 0: each


PLAIN_MODELS = ("embedded", "head64")
TARGETS = (
    Target(PLAIN_MODELS, "turbo4t", "q4_0", 0.70),
    Target(PLAIN_MODELS, "turbo3t", "turbo3", 0.65),
    Target(PLAIN_MODELS, "turbo2t", "turbo2", 0.65),
    Target(PLAIN_MODELS, "turbo4t calibrated", "q4_0", 0.50),
    Target(PLAIN_MODELS, "turbo3t calibrated", "turbo3", 0.50),
    Target(PLAIN_MODELS, "turbo3t calibrated", "q4_0", 2.0),
    Target(PLAIN_MODELS, "turbo4t/turbo3t calibrated or turbo3t/turbo4t calibrated", "q4_0", 1.25),
    Target(PLAIN_MODELS, "turbo3t sink=128 tail=512", "q4_0", 1.0, 4096),
    Target(("outliers",), "turbo4t calibrated", "q4_0", 0.10),
    Target(("outliers",), "turbo4t calibrated", "q5_0", 1.0),
    Target(("outliers",), "turbo3t calibrated", "q4_0", 0.40),
)

PPL_MODEL, PPL_TYPES, PPL_LIMIT = "bias", "turbo3t calibrated", 1.02
"""Perplexity relative to the base, on a model whose cache is useless without a calibration."""


@dataclass(frozen=True)
class Recipe:
    """A model of the matrix."""

    about: str
    source: Callable[[], Path]
    plant: Callable[[plant_model.Model], None] | None = None  # into the source


def _head64() -> Path:
    return assets.eval_dir() / "models" / "head64.gguf"


RECIPES: Mapping[str, Recipe] = {
    "embedded": Recipe("the one that ships with the package, head size 128", assets.embedded_model),
    "head64": Recipe("eval/models/head64.gguf, head size 64", _head64),
    "outliers": Recipe(
        "embedded with a few channels of K and V 10 to 30 times as large",
        assets.embedded_model,
        plant_model.plant_outliers,
    ),
    "bias": Recipe(
        "embedded with a bias of K in the outer layers, 30 times as large as K is without",
        assets.embedded_model,
        lambda model: plant_model.plant_k_bias(model, 30),
    ),
}


# --- models and calibrations ----------------------------------------------------------------------------------------------


def prepare(name: str, folder: Path) -> ModelFile:
    """Make or find a model of the matrix."""
    recipe = RECIPES[name]
    if recipe.plant is None:
        return models.resolve(recipe.source())
    path = folder / f"{name}.gguf"
    if not path.is_file():
        model = plant_model.Model(recipe.source())
        recipe.plant(model)
        temporary = path.with_suffix(".part")
        model.write(temporary, f", {name}")
        temporary.replace(path)
    return models.resolve(path)


def calibration_text(folder: Path) -> TextFile:
    """Write the text that calibrations are made from."""
    return models.text_file(
        write_text(folder / "calibration.txt", "".join(read_source(stdlib_dir() / name) for name in CALIBRATION_MODULES))
    )


# --- measuring ------------------------------------------------------------------------------------------------------------


def measure(name: str, build: Build, text: TextFile, args: argparse.Namespace) -> Sequence[Result]:
    """Measure a model."""
    folder = assets.home() / "matrix" / name
    folder.mkdir(parents=True, exist_ok=True)
    model = prepare(name, folder)
    if not (folder / CALIBRATION).is_file():
        calibrate.calibrate(build, model, [calibration_text(folder.parent)], folder / CALIBRATION, threads=args.threads)
    with contextlib.chdir(folder):
        plan = sweep.load(assets.eval_dir() / "matrix" / "sweep.toml")
        if args.small:
            plan = msgspec.structs.replace(plan, run=tuple(msgspec.structs.replace(run, chunks=SMALL[run.ctx]) for run in plan.run))
        setup = sweep.Setup(
            build_id=build.id,
            model_sha256=model.sha256,
            text_sha256=text.sha256,
            backend=presets.backend_of(build.preset),
            env=environment.settings_in_environment(),
        )
        job = kld.Job(build=build, model=model, text=text, threads=args.threads)
        return kld.measure(sweep.cases(plan, setup), job, Store())


# --- report ---------------------------------------------------------------------------------------------------------------


def label(types: CacheSpec) -> str:
    """Types in a table over several models: each has a calibration of its own. The sweep is of plain types, so what is off is not said;
    a type that is there as it is typed is named so.
    """
    calibrated = types.calibration is not None and types.calibration != NONE
    name = str(msgspec.structs.replace(types, calibration=None, sink=types.sink or None, tail=types.tail or None))
    typed = with_defaults(types) != types
    return name + (" calibrated" if calibrated else "") + (" as typed" if typed else "")


def by_label(results: Sequence[Result], ctx: int) -> dict[str, Result]:
    """Results of a context by the label of their types."""
    return {label(r.case.types): r for r in results if r.case.ctx == ctx and not r.case.is_noise_floor}


def met(value: Metric, limit: float) -> str:
    """A word on a target."""
    near = abs(value.value - limit) <= value.error
    return ("met" if value.value <= limit else "**missed**") + (", within the error" if near else "")


def target_rows(found: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """What was aimed at, and what was reached."""
    rows = []
    for target in TARGETS:
        for name in target.models:
            for ctx in (target.ctx,) if target.ctx else contexts(found):
                group = by_label(found.get(name, ()), ctx)
                candidates = [group[types] for types in target.types.split(" or ") if types in group]
                if candidates and target.reference in group:
                    best = min(candidates, key=lambda r: r.stats.mean.value)
                    value = gate.ratio(best.stats.mean, group[target.reference].stats.mean)
                    what = f"{label(best.case.types)} / {target.reference}"
                    rows.append([what, name, str(ctx), report.plus_minus(value, 3), f"{target.limit:g}", met(value, target.limit)])
    for ctx in contexts(found):
        if result := by_label(found.get(PPL_MODEL, ()), ctx).get(PPL_TYPES):
            log = result.stats.ln_ppl_ratio
            value = Metric(math.exp(log.value), math.exp(log.value) * log.error)
            row = [f"perplexity, {PPL_TYPES} / {BASE}", PPL_MODEL, str(ctx), report.plus_minus(value, 4), f"{PPL_LIMIT:g}"]
            rows.append([*row, met(value, PPL_LIMIT)])
    return rows


def worse_when_calibrated(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Types that a calibration makes worse, by more than the errors of both."""
    worse = []
    for name, results in found.items():
        for ctx in contexts(found):
            group = by_label(results, ctx)
            for types, result in group.items():
                plain = group.get(types.removesuffix(" calibrated"))
                if types.endswith(" calibrated") and plain:
                    before, after = plain.stats.mean, result.stats.mean
                    if after.value - before.value > math.hypot(before.error, after.error):
                        worse.append(
                            f"{name}, context {ctx}: {types} {report.plus_minus(after, 5)}, without {report.plus_minus(before, 5)}"
                        )
    return worse


def contexts(found: Mapping[str, Sequence[Result]]) -> list[int]:
    """Contexts of the sweep, in its order."""
    return list(dict.fromkeys(r.case.ctx for results in found.values() for r in results))


def _relative(ours: Result, theirs: Result) -> str:
    """Ratio of the means with its error; in brackets those of median and 99.9 %."""
    mean, median, last = (gate.ratio(of(ours.stats, field), of(theirs.stats, field)) for field in ("mean", "median", "p999"))
    return f"{report.plus_minus(mean, 3)} ({median.value:.3f}, {last.value:.2f})"


def summary(found: Mapping[str, Sequence[Result]]) -> str:
    """All models beside each other: targets, then a table per context."""
    first = next(iter(found.values()))
    lines = [
        "# Quality of the cache types on four models",
        "",
        f"`make quality-matrix`: llama.cpp {first[0].upstream_commit[:12]}, patches {first[0].patch_digest[:12]}, {first[0].text}.",
        "",
        *(f"- [{name}]({name}/table.md): {RECIPES[name].about}" for name in found),
        "",
        f"Ratios of mean KL divergences from the {BASE} cache, measured in the same run; in brackets those of the median and of the 99.9 %",
        "quantile. Errors are propagated as if both sides were independent, and are too large therefore. Bits are those of the cache; the",
        "tables of models add the copies of a sink and tail.",
        "",
        "## What we aimed at",
        "",
        report.markdown(["", "model", "context", "ratio", "at most", ""], target_rows(found), left=2),
        "",
        "Worse by calibration, outside of the errors:" if (worse := worse_when_calibrated(found)) else "No type is worse by calibration.",
        *(f"- {line}" for line in worse),
    ]
    for ctx in contexts(found):
        columns = {name: by_label(results, ctx) for name, results in found.items()}
        bits = {types: r.bits.nominal for types, r in by_label(first, ctx).items()}
        rows = [
            [
                types,
                report.short(bits[types]),
                *(_relative(group[types], group["q4_0"]) for group in columns.values()),
            ]
            for types in sorted(bits, key=lambda types: (-bits[types], str(types)))
        ]
        lines += ["", f"## Context {ctx}, relative to plain q4_0", "", report.markdown(["cache K/V", "bits", *columns], rows)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES), help="[default: all]")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp  [default: one per core]")
    parser.add_argument("--preset", default="cpu", help="what llama.cpp is built for  [default: cpu]")
    parser.add_argument("--small", action="store_true", help="a chunk of each context only")
    parser.add_argument("--out", type=Path, default=assets.home() / "report" / "matrix", help="[default: build/report/matrix]")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measure, and write what was found after each model."""
    build = ensure_build(args.preset, targets=("llama-perplexity", calibrate.TARGET))
    text = models.held_out_text()
    found: dict[str, Sequence[Result]] = {}
    for name in args.models:
        found[name] = measure(name, build, text, args)
        write_result(args.out / name / "table.md", report.quality(found[name]) + "\n")
        plot.quality(found[name], args.out / name / "plot.png")
        write_result(args.out / "README.md", summary(found))
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
