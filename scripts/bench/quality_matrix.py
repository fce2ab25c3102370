"""Measure cache types on several models: as they are typed, plain, and with each part of the defaults alone.

    python scripts/bench/quality_matrix.py --text wiki.txt       # 25 minutes on two idle cores; interrupted, it goes on where it was
    python scripts/bench/quality_matrix.py --models smollm2 bias
    python scripts/bench/quality_matrix.py --source qwen2.5-coder=qwen.gguf --source mine=org/name:file.gguf
    python scripts/bench/quality_matrix.py --small               # to try the script; its numbers mean nothing

Models, types and targets are those of eval/matrix/matrix.toml. Real models read --text; without it, as models that know nothing but Python
do, the text of ppl-gate. Planted models lie below build/matrix, and are the same bytes every time. What is in the store is not measured
again, whichever command measured it.

Writes one document, README.md below --out, which grows with each model. A model that can't be had is named and left out. Exit codes are
those of ppl-gate, but for 1, which there is not: this measures, gates.toml judges.
"""

from __future__ import annotations

import argparse
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

sys.path.append(str(Path(__file__).resolve().parents[1] / "lab"))  # called as a script
import plant_model

from turbo_gguf import assets
from turbo_gguf.cache.settings import AUTO, OFF, SETTINGS
from turbo_gguf.cache.spec import CacheSpec, parse_types, with_defaults, with_settings
from turbo_gguf.errors import EnvironmentMissing, TurboError, UsageError
from turbo_gguf.errors import report as say
from turbo_gguf.failures import exit_code
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.judge import gate, report
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import presets
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.measure import environment, kld, sweep
from turbo_gguf.measure.metrics import Metric, of
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.tools import default_threads

SMALL = 512
"""Context of --small, which reads one chunk of it."""

REFERENCE = "q4_0"
"""What the tables over all models are relative to."""


# --- eval/matrix/matrix.toml ----------------------------------------------------------------------------------------------


class TypeList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Types that are measured together."""

    name: str
    table: str  # title of the table that they are in; lists may share one
    types: tuple[str, ...]
    settings: str = ""  # of every type with a turbo type in it that does not name them

    def specs(self) -> tuple[CacheSpec, ...]:
        """Types with their settings."""
        return tuple(with_settings(parse_types(types), self.settings) for types in self.types)


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A context that a model is measured at."""

    ctx: int
    chunks: int
    lists: tuple[str, ...]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model of the matrix."""

    name: str
    about: str
    source: str  # as --model of ppl-gate takes it, "embedded", or a file below eval/
    run: tuple[Run, ...]
    python: bool = False  # it knows nothing else, and reads the held-out modules
    outliers: bool = False  # planted into the source
    k_bias: float | None = None


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Mean KL divergence of a type, at most so many times that of another one: limits by model."""

    types: str
    reference: str
    at_most: dict[str, float]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    batch: int
    noise_batch: int
    others: str  # model whose runs a model of --source has
    list: tuple[TypeList, ...]
    model: tuple[Entry, ...]
    target: tuple[Target, ...]

    def sweep_of(self, entry: Entry) -> sweep.Sweep:
        """What a model is measured with."""
        named = {row.name: row for row in self.list}
        runs = []
        for run in entry.run:
            types = dict.fromkeys(str(spec) for name in run.lists for spec in named[name].specs())
            runs.append(sweep.SweepRun(ctx=run.ctx, chunks=run.chunks, types=tuple(types)))
        made = sweep.Sweep(run=tuple(runs), batch=self.batch, noise_batch=self.noise_batch)
        return sweep.check(made, f"eval/matrix/matrix.toml: {entry.name}")


def load(path: Path | None = None) -> Plan:
    """Read the file.

    Raises:
        UsageError: it is not of this form, or names a list or a model that it does not have.
    """
    file = path or assets.eval_dir() / "matrix" / "matrix.toml"
    try:
        plan = msgspec.convert(tomllib.loads(file.read_text("utf-8")), Plan)
        for entry in plan.model:
            plan.sweep_of(entry)
    except KeyError as error:
        raise UsageError(f"{file}: no list {error.args[0]}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{file}: {error}") from error
    known = {entry.name for entry in plan.model}
    if unknown := {plan.others, *(name for target in plan.target for name in target.at_most)} - known:
        raise UsageError(f"{file}: no model {', '.join(sorted(unknown))}")
    return plan


def chosen(plan: Plan, names: Sequence[str], sources: Sequence[str], small: bool) -> list[Entry]:
    """The models that are asked for, from where they are asked for.

    Raises:
        UsageError: a name that is not in the list, or a source without a name.
    """
    entries = {entry.name: entry for entry in plan.model}
    for text in sources:
        name, is_pair, source = text.partition("=")
        if not (name and is_pair and source):
            raise UsageError(f"--source {text}: no name", "write --source NAME=MODEL; a new name adds a model")
        new = msgspec.structs.replace(entries[plan.others], name=name, about=source)
        entries[name] = msgspec.structs.replace(entries.get(name, new), source=source)
    if unknown := [name for name in names if name not in entries]:
        raise UsageError(f"no model {', '.join(unknown)}", f"there are {', '.join(entries)}; --source NAME=MODEL adds one")
    picked = [entries[name] for name in names or entries]
    return [_small(entry) for entry in picked] if small else picked


def _small(entry: Entry) -> Entry:
    lists = tuple(dict.fromkeys(name for run in entry.run for name in run.lists))
    return msgspec.structs.replace(entry, run=(Run(SMALL, 1, lists),))


# --- measuring ------------------------------------------------------------------------------------------------------------


def prepare(entry: Entry, folder: Path) -> ModelFile:
    """Find or make a model of the matrix. A planted one is made each time: its bytes are the same. It has a name of its own, by which
    llama.cpp tells its automatic calibration from that of its source, whose norms it has.
    """
    here = assets.eval_dir() / entry.source
    source = models.embedded() if entry.source == "embedded" else models.resolve(here if here.is_file() else entry.source)
    if not entry.outliers and entry.k_bias is None:
        return source
    model = plant_model.Model(source.path)
    if entry.outliers:
        plant_model.plant_outliers(model)
    if entry.k_bias is not None:
        plant_model.plant_k_bias(model, entry.k_bias)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{entry.name}.gguf"
    temporary = path.with_suffix(".part")
    model.write(temporary, f", {entry.name}")
    temporary.replace(path)
    return models.resolve(path)


def measure(plan: Plan, entry: Entry, build: Build, text: TextFile, threads: int) -> list[Result]:
    """Measure a model."""
    model = prepare(entry, assets.home() / "matrix")
    setup = sweep.Setup(
        build_id=build.id,
        model_sha256=model.sha256,
        text_sha256=text.sha256,
        backend=presets.backend_of(build.preset),
        env=environment.settings_in_environment(),
    )
    job = kld.Job(build=build, model=model, text=text, threads=threads)
    return kld.measure(sweep.cases(plan.sweep_of(entry), setup), job, Store())


# --- report ---------------------------------------------------------------------------------------------------------------

Found = Mapping[str, Sequence[Result]]
"""Results by model."""

Column = tuple[str, int]
"""A model and a context."""


def columns(found: Found) -> dict[Column, dict[str, Result]]:
    """Results by type, of each model at each context."""
    made: dict[Column, dict[str, Result]] = {}
    for name, results in found.items():
        for r in results:
            if not r.case.is_noise_floor:
                made.setdefault((name, r.case.ctx), {})[str(r.case.types)] = r
    return made


def met(value: Metric, limit: float) -> str:
    """A word on a target."""
    near = abs(value.value - limit) <= value.error
    return ("met" if value.value <= limit else "**missed**") + (", within the error" if near else "")


def target_rows(targets: Sequence[Target], found: Found) -> list[list[str]]:
    """What was aimed at, and what was reached."""
    table = columns(found)
    rows = []
    for target in targets:
        ours, theirs = str(parse_types(target.types)), str(parse_types(target.reference))
        for (name, ctx), group in table.items():
            if name in target.at_most and ours in group and theirs in group:
                value, limit = gate.ratio(group[ours].stats.mean, group[theirs].stats.mean), target.at_most[name]
                what = " / ".join(report.types_text(parse_types(types)) for types in (target.types, target.reference))
                rows.append([what, name, str(ctx), report.plus_minus(value, 4), f"{limit:g}", met(value, limit)])
    return rows


def worse_with_more(found: Found) -> list[str]:
    """Where a calibration, or exact tokens, make a type worse by more than the errors of both."""
    parts = (("calibration",), ("sink",), ("tail",), ("sink", "tail"))
    nothing = {row.field: row.parse(row.off) for row in SETTINGS if row.off}
    worse = []
    for (name, ctx), group in columns(found).items():
        by_spec = {_written_out(r.case.types): r for r in group.values()}
        for spec, more in by_spec.items():
            without = (msgspec.structs.replace(spec, **{field: nothing[field] for field in part}) for part in parts)
            for less in map(by_spec.get, dict.fromkeys(without)):
                if less and less is not more:
                    after, before = more.stats.mean, less.stats.mean
                    if after.value - before.value > math.hypot(after.error, before.error):
                        pair = ", and ".join(f"`{r.case.types}` {report.plus_minus(r.stats.mean, 5)}" for r in (more, less))
                        worse.append(f"{name}, context {ctx}: {pair}")
    return worse


def _written_out(types: CacheSpec) -> CacheSpec:
    """Types with all that is in force: what is off is said, too."""
    known = with_defaults(types)
    off = {row.field: row.parse(row.off) for row in SETTINGS if row.off and getattr(known, row.field) is None}
    return msgspec.structs.replace(known, **off)


def _relative(ours: Result | None, theirs: Result) -> str:
    """Ratio of the means with its error; in brackets those of median and 99.9 %."""
    if ours is None:
        return ""
    mean, median, last = (gate.ratio(of(ours.stats, field), of(theirs.stats, field)) for field in ("mean", "median", "p999"))
    digits = 3 if mean.value >= 0.1 else 4
    return f"{report.plus_minus(mean, digits)} ({median.value:.{digits}f}, {last.value:.{digits}f})"


def tables(plan: Plan, found: Found) -> Iterator[tuple[str, str]]:
    """Titles and tables over all models. A model at a context has a column where one of the lists of a table was measured."""
    measured = columns(found)
    for title in dict.fromkeys(listed.table for listed in plan.list):
        lists = [[str(spec) for spec in listed.specs()] for listed in plan.list if listed.table == title]
        shown = {column: group for column, group in measured.items() if any(group.keys() >= {REFERENCE, *types} for types in lists)}
        rows = []
        for types in dict.fromkeys(types for types_of_list in lists for types in types_of_list):
            group = [results.get(types) for results in shown.values()]
            if some := [r for r in group if r]:
                ratios = (_relative(r, results[REFERENCE]) for r, results in zip(group, shown.values(), strict=True))
                rows.append([report.types_text(some[0].case.types), report.short(some[0].bits.nominal), *ratios])
        if shown:
            yield title, report.markdown(["cache K/V", "bits", *(f"{name}, {ctx}" for name, ctx in shown)], rows)


def _calibration(results: Sequence[Result]) -> str:
    """Digest of the automatic calibration."""
    used = (cache.spec.calibration for r in results for cache in r.facts.caches if with_defaults(r.case.types).calibration == AUTO)
    return next((found.digest for found in used if found), "")


def document(plan: Plan, entries: Sequence[Entry], found: Found) -> str:
    """Everything: targets, a table for each list, then the whole tables of each model."""
    first = next(iter(found.values()))[0]
    about = {entry.name: entry.about for entry in entries}
    worse = worse_with_more(found)
    made = f"llama.cpp {first.upstream_commit[:12]}, patches {first.patch_digest[:12]}, {first.case.backend}"
    lines = [
        "# Quality of the cache types on several models",
        "",
        f"`make quality-matrix`: {made}. Models, types and targets are those of `eval/matrix/matrix.toml`.",
        "",
        "| model | what | text | automatic calibration |",
        "|---|---|---|---|",
        *(f"| [{name}](#{_anchor(name)}) | {about[name]} | {rows[0].text} | `{_calibration(rows)}` |" for name, rows in found.items()),
        "",
        "Turbo types are as a user types them: with an automatic calibration, and with an exact sink and tail. Settings behind a type take",
        f"something away, and `{OFF}` makes the plain type.",
        "",
        f"Tables over all models have ratios of mean KL divergences to plain {REFERENCE} in the same run; in brackets those of the",
        "median and of the 99.9 % quantile. Errors are propagated as if both sides were independent, and are too large therefore.",
        "Bits are those of the types; the tables of models have bits with the copies of a sink and tail.",
    ]
    for title, table in tables(plan, found):
        lines += ["", f"## {title}", "", table]
    lines += ["", "## What we aimed at", "", "Ratios of mean KL divergences.", ""]
    lines += [report.markdown(["", "model", "context", "ratio", "at most", ""], target_rows(plan.target, found), left=2), ""]
    lines += (
        ["Mean KL divergences that are larger with a setting than without, by more than the errors:", "", *(f"- {line}" for line in worse)]
        if worse
        else []
    )
    lines += [] if worse else ["Nothing is worse with a calibration, a sink or a tail than without."]
    for name, rows in found.items():
        lines += ["", f"## {name}", "", report.quality(rows).rstrip()]
    return "\n".join(lines) + "\n"


def _anchor(name: str) -> str:
    """Of a heading, as GitHub makes it."""
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter in "-_")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="[default: all]")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=MODEL", help="where a model comes from, or one more model")
    parser.add_argument("--text", type=Path, help="what real models read, UTF-8  [default: that of ppl-gate]")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp  [default: one per core]")
    parser.add_argument("--preset", default="cpu", help="what llama.cpp is built for  [default: cpu]")
    parser.add_argument("--small", action="store_true", help=f"a chunk of {SMALL} tokens only")
    parser.add_argument("--out", type=Path, default=assets.home() / "report" / "matrix", help="[default: build/report/matrix]")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measure, and write what was found after each model."""
    plan = load()
    entries = chosen(plan, args.models, args.source, args.small)
    held_out = models.held_out_text()
    text = models.text_file(args.text) if args.text else held_out
    build = ensure_build(args.preset, targets=("llama-perplexity",))
    found: dict[str, Sequence[Result]] = {}
    missing: TurboError | None = None
    for entry in entries:
        try:
            found[entry.name] = measure(plan, entry, build, held_out if entry.python else text, args.threads)
        except EnvironmentMissing as error:
            say(f"{entry.name}: {error.message}", error.hint)
            missing = error
            continue
        write_result(args.out / "README.md", document(plan, entries, found), patches=build.tree.digest)
    print(f"document: {args.out / 'README.md'}")
    return missing.exit_code if missing else 0


if __name__ == "__main__":
    sys.exit(main())
