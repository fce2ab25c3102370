"""Time cache types on the CPU beside f16, q8_0 and q4_0 of the same build: single ops, odd shapes, sharp attention, a model against depth.

    python scripts/bench/bench_cpu.py --check                  # builds and measures all: two to three hours on two idle cores
    python scripts/bench/bench_cpu.py --parts ops shapes       # without the model, which takes most of that to fill caches: half an hour
    python scripts/bench/bench_cpu.py --small --rounds 1       # to try the script; its ratios mean nothing

All goes in rounds over all types, so that what slows the machine down hits all alike. A round of ops is one process; compared are
medians over the rounds, with half the range of the rounds behind "±". Attention runs on --threads, what a single row takes on one.

Writes ops.jsonl and results.jsonl (what is there is not measured again), table.md and plot.png. Exit codes: 0 measured, 1 a target is
missed (only with --check), 3 something is missing, 4 a program crashed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import bench_model
import msgspec
from bench_ops import KV_HEADS, PROGRAM, TYPES, Case, Check, Row, build_of, fits, keep, load, measure, shape_text, table, targets

from turbo_gguf.assets import home
from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.cache.types import QUANTIZED_RIVALS, RIVALS, SCALAR, TURBO
from turbo_gguf.failures import exit_code
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.judge import plot
from turbo_gguf.judge.report import by_setting, plus_minus
from turbo_gguf.judge.report import markdown as markdown_table
from turbo_gguf.judge.report import speed as speed_table
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make.build import Build, ensure_build, read_manifest
from turbo_gguf.measure import bench, environment
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import BenchRow
from turbo_gguf.measure.store import Store
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.tools import default_threads

PARTS = ("ops", "shapes", "sharp", "model")
CHEAP = 3
"""Rounds of ops, and of the model with an empty cache, for each round of what takes long."""

SHAPE = (128, 4)  # head size, GQA
DECODE = ((1, 4096), (1, 16384))  # queries, keys
PREFILL = (256, 4096)
WRITE = (256, 4096)  # rows, keys
DOT = (1, 256)  # vectors, rows
ODD_HEADS = (64, 96, 192, 256)
ODD_GQA = (1, 2, 8, 16)
ODD_QUERIES = (1, 2, 3, 7)
ODD_KEYS = 4096
SHARP_TYPES = ("turbo4", "turbo3", "turbo4t", "turbo3t")
SHARP_GQA = (1, 4)
SHARP_KEYS = (16384, 65536)
DEVIATIONS = (0.5, 2, 4, 8, 16)
"""Of scores; with the first all keys have weight, and no value is left out."""

DEPTHS = (0, 4096, 16384)
N_PROMPT, N_GEN = 256, 64


class Target(msgspec.Struct, frozen=True):
    """The least speed of some types, as a multiple of another type's."""

    types: tuple[str, ...]
    rival: str
    least: float


AS_F16 = (Target(SCALAR, "f16", 1.0),)
OP_TARGETS = {
    DECODE[-1]: (
        Target(("turbo4", "turbo3"), "f16", 4.0),
        *(Target(("turbo4", "turbo3"), rival, 5.0) for rival in QUANTIZED_RIVALS),
        Target(("turbo2",), "turbo3", 1.0),
    ),
    PREFILL: AS_F16,
}
"""Of attention at SHAPE, by queries and keys."""
WRITE_TARGET = 2.0  # most microseconds of writing 1,024 values of a scalar type; there is none for the trellis, which takes longer
MODEL_TARGETS = {
    ("pp", 0): (Target(SCALAR, "f16", 0.98),),
    ("tg", 0): (Target(SCALAR, "f16", 0.98),),
    ("pp", 4096): AS_F16,
    ("tg", 4096): (Target(SCALAR, "f16", 2.2),),
    ("tg", 16384): (Target(SCALAR, "f16", 3.0),),
}
"""By test of llama-bench and depth."""


# --- single ops -----------------------------------------------------------------------------------------------------------


def op_cases(small: bool = False) -> Iterator[Case]:
    """The cases of the part "ops", those that are compared next to each other."""
    shape = (64, 2) if small else SHAPE
    for size in ((1, 256), (16, 256)) if small else (*DECODE, PREFILL):
        yield from (Case("fattn", types, *shape, *size) for types in TYPES)
    for op, size in (("set_rows", (16, 256) if small else WRITE), ("vec_dot", DOT)):
        yield from (Case(op, types, SHAPE[0], 1, *size) for types in (*RIVALS, *TURBO))


def odd_cases(small: bool = False) -> Iterator[Case]:
    """The cases of the part "shapes"."""
    shapes = product((96,), (1,), (3,), (256,)) if small else product(ODD_HEADS, ODD_GQA, ODD_QUERIES, (ODD_KEYS,))
    for shape in shapes:
        yield from (Case("fattn", types, *shape) for types in ("f16", *TURBO) if fits(types, shape[0]))


def sharp_cases(small: bool = False) -> Iterator[Case]:
    """The cases of the part "sharp": decode, the sharper the fewer values that have weight."""
    for gqa, keys, types in product((1,) if small else SHARP_GQA, (256,) if small else SHARP_KEYS, SHARP_TYPES):
        yield from (Case("fattn", types, SHAPE[0], gqa, 1, keys, deviation) for deviation in DEVIATIONS)


def measure_ops(program: Path, wanted: Sequence[Case], store: Path, *, rounds: int, seconds: float, threads: int, build: str) -> list[Row]:
    """Measure what no earlier call has, round by round; returns all rows of the cases."""

    def threads_of(case: Case) -> int:
        return threads if case.op == "fattn" else 1

    asked = {(case, number) for case in wanted for number in range(rounds)}
    rows = [row for row in load(store) if (row.case, row.round) in asked and (row.build, row.threads) == (build, threads_of(row.case))]
    known = {(row.case, row.round) for row in rows}
    for number in range(rounds):
        for count in sorted({threads, 1}, reverse=True):
            missing = [case for case in wanted if threads_of(case) == count and (case, number) not in known]
            if missing:
                print(f"round {number + 1} of {rounds}, {len(missing)} cases, threads: {count}", file=sys.stderr)
                found = measure(program, "CPU", missing, seconds, count)
                rows += keep(store, (msgspec.structs.replace(row, build=build, round=number) for row in found))
    return rows


def medians(rows: Iterable[Row]) -> list[Row]:
    """One row per case: the median over the rounds, and their range; the words of a round that was not measured win."""
    groups: dict[Case, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    found = []
    for group in groups.values():
        times = [row.us for row in group]
        first = next((row for row in group if not row.ok), group[0])
        found.append(msgspec.structs.replace(first, us=statistics.median(times), us_min=min(times), us_max=max(times)))
    return found


def speed(row: Row) -> Metric:
    """Ops per second and half the range of the rounds; 0 where it was not measured."""
    return Metric(1e6 / row.us, (1e6 / row.us_min - 1e6 / row.us_max) / 2) if row.ok else Metric(0.0, 0.0)


def per_1024(row: Row) -> Metric:
    """Microseconds for 1,024 values of a row that is written or multiplied."""
    rows = row.case.queries if row.case.op == "set_rows" else row.case.keys
    values = rows * row.case.head_size * KV_HEADS / 1024
    return Metric(row.us / values, (row.us_max - row.us_min) / 2 / values)


# --- whole model ----------------------------------------------------------------------------------------------------------


def model_file(small: bool) -> ModelFile:
    """The model of random weights in Q4_0, written when it is not there yet."""
    path = home() / "bench-cpu" / f"random-{'small' if small else '0.6b'}-q4_0.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        layers, n_embd, feed_forward = (2, 256, 256) if small else (28, 1024, 3072)
        bench_model.write(part, layers=layers, kv_heads=8, gqa=2, n_embd=n_embd, feed_forward=feed_forward, weights="q4_0")
        part.replace(path)
    return models.read(path)


def plans(depths: Sequence[int], rounds: int, threads: int, small: bool = False) -> Iterator[bench.BenchPlan]:
    """What llama-bench measures: a plan per depth, and types as a user types them that are compared in the same one.

    With tokens in the cache upstream's quantized types come last, with one round and only where they are fewest: filling the cache takes
    them longest, hours with 16,384, and no target is theirs.
    """
    env = environment.settings_in_environment(("GGML_", "TURBO_", "OMP_", "GOMP_"))
    sizes = (32, 4) if small else (N_PROMPT, N_GEN)
    deep = [depth for depth in depths if depth]
    planned = [((*RIVALS, *TURBO), depth, CHEAP * rounds) for depth in depths if not depth]
    planned += [(("f16", *TURBO), depth, rounds) for depth in deep]
    planned += [(QUANTIZED_RIVALS, depth, 1) for depth in sorted(deep)[:1]]
    for names, depth, count in planned:
        types = tuple(CacheSpec(name, name) for name in names)
        yield bench.BenchPlan(types, (depth,), *sizes, count, threads, "CPU", env)


def measure_model(build: Build, folder: Path, depths: Sequence[int], *, small: bool, rounds: int, threads: int) -> list[BenchRow]:
    """Run the plans; rounds that are there are not repeated. llama.cpp takes any model of 28 layers for a 3B one: rows say what it is."""
    model, store = model_file(small), Store(folder)
    return [
        msgspec.structs.replace(row, row=row.row | {"model_type": model.name})
        for plan in plans(depths, rounds, threads, small)
        for row in bench.run(plan, build, model, store, lambda text: print(text, file=sys.stderr))
    ]


# --- targets --------------------------------------------------------------------------------------------------------------


def checks(ops: Sequence[Row], model: Sequence[BenchRow]) -> list[Check]:
    """Hold medians of ops and rows of the model against the targets; what was not measured is left out, what is not supported fails."""
    shapes: dict[Case, dict[str, Metric]] = {}
    for row in ops:
        if row.case.op == "fattn" and row.case.deviation == 1:
            shapes.setdefault(msgspec.structs.replace(row.case, types=""), {})[row.case.types] = speed(row)
    tests: dict[tuple[str, int], dict[str, Metric]] = {}
    for (types, test, depth), metric in by_setting(model).items():
        tests.setdefault((test[:2], depth), {})[types.k] = metric
    found: list[Check] = []
    for (test, depth), metrics in tests.items():
        what = f"model, {'prefill' if test == 'pp' else 'decode'} at {depth},"
        found += _compare(what, metrics, MODEL_TARGETS.get((test, depth), ()))
    for shape, metrics in shapes.items():
        chosen = OP_TARGETS.get((shape.queries, shape.keys), ()) if (shape.head_size, shape.gqa) == SHAPE else AS_F16
        found += _compare(f"attention {shape_text(shape)}", metrics, chosen)
    for row in ops:
        if row.case.op == "set_rows" and row.case.types in SCALAR:
            time = per_1024(row) if row.ok else Metric(math.inf, 0.0)
            words = f"SET_ROWS {row.case.types}: us for 1,024 values"
            found.append(Check(words, time.value, WRITE_TARGET, time.value <= WRITE_TARGET, time.error))
    return found


def _compare(what: str, metrics: Mapping[str, Metric], chosen: Iterable[Target]) -> Iterator[Check]:
    """Ratios of speeds; their spread as if both speeds varied independently."""
    for target in chosen:
        rival = metrics.get(target.rival)
        for types in target.types:
            ours = metrics.get(types)
            if ours is not None and rival is not None and rival.value > 0:
                ratio = ours.value / rival.value
                spread = math.hypot(ours.error, ratio * rival.error) / rival.value
                yield Check(f"{what} {types}: speed / {target.rival}", ratio, target.least, ratio >= target.least, spread)


# --- report ---------------------------------------------------------------------------------------------------------------


def markdown(ops: Sequence[Row], model: Sequence[BenchRow], about: str) -> str:
    """All tables."""
    lines = [
        "# Cache types on the CPU",
        "",
        f"{about}. Medians over rounds that alternate over the types, ± half the range of the rounds.",
        "",
    ]
    attention = [row for row in ops if row.case.op == "fattn" and row.case.deviation == 1]
    sharp = [row for row in ops if row.case.deviation != 1]
    odd = set(odd_cases()) | set(odd_cases(small=True))
    groups = [
        ("Decode, one query", [row for row in attention if row.case not in odd and row.case.queries == 1]),
        ("Prefill", [row for row in attention if row.case not in odd and row.case.queries > 1]),
        ("Odd shapes", [row for row in attention if row.case in odd]),
    ]
    for title, rows in groups:
        if rows:
            unit = f"Attention of one layer, {KV_HEADS} KV heads: milliseconds, in brackets the speed against f16."
            lines += [f"## {title}", "", unit, "", *table(rows, _cell), ""]
    if sharp:
        words = "Decode, milliseconds; in brackets the speed against scores of the smallest deviation, where no value is left out."
        lines += ["## Sharp attention, by standard deviation of the scores", "", words, "", _sharp(sharp), ""]
    single = [row for row in ops if row.case.op != "fattn"]
    if single:
        lines += ["## Single rows", "", "Nanoseconds for 1,024 values, one thread.", "", _single_rows(single), ""]
    if model:
        first = model[0].row
        size = f"{first['model_n_params'] / 1e6:.0f} million weights, {first['model_size'] / 1e6:.0f} MB"
        words = f"llama-bench on {first['model_type']}: {size}."
        lines += ["## Whole model", "", words, "", speed_table(model, PLAIN).rstrip("\n"), "", "![speed against depth](plot.png)", ""]
    return "\n".join(lines + targets(checks(ops, model))) + "\n"


def _cell(row: Row, base: float) -> str:
    ratio = f" ({base / row.us:.2f})" if base else ""
    return f"{plus_minus(Metric(row.us / 1e3, (row.us_max - row.us_min) / 2e3), 2)}{ratio}"


def _sharp(rows: Sequence[Row]) -> str:
    by_case = {row.case: row for row in rows}
    header = ["cache type", "GQA", "keys", *(f"{deviation:g}" for deviation in DEVIATIONS)]
    body = []
    for case, flat in by_case.items():
        if case.deviation == DEVIATIONS[0]:
            found = [by_case.get(msgspec.structs.replace(case, deviation=deviation)) for deviation in DEVIATIONS]
            cells = ["" if row is None else _cell(row, flat.us) for row in found]
            body.append([case.types, str(case.gqa), str(case.keys), *cells])
    return markdown_table(header, body)


def _single_rows(rows: Sequence[Row]) -> str:
    by_op: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_op.setdefault(row.case.op, {})[row.case.types] = row
    header = ["cache type", *by_op]
    body = [[types, *(_nanoseconds(found.get(types)) for found in by_op.values())] for types in (*RIVALS, *TURBO)]
    return markdown_table(header, body)


def _nanoseconds(row: Row | None) -> str:
    if row is None or not row.ok:
        return "" if row is None else row.status
    time = per_1024(row)
    return plus_minus(Metric(1e3 * time.value, 1e3 * time.error), 1)


def cpu_name() -> str:
    """Name of this CPU, as Linux tells it."""
    text = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


# --- command --------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure  [default: all]")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="of the model: tokens in the cache  [default: all]")
    parser.add_argument("--build", type=Path, help="folder of a finished build  [default: the preset cpu, built when it is not there]")
    parser.add_argument("--threads", type=int, default=default_threads(), help="[default: one per core]")
    parser.add_argument("--rounds", type=int, default=3, help=f"of what takes long; of the rest {CHEAP} times as many  [default: 3]")
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring each case of a round  [default: 0.2]")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("build/report/bench-cpu"))
    parser.add_argument("--check", action="store_true", help="end with 1 when a target is missed")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    env = environment.settings_in_environment(("GGML_", "TURBO_", "OMP_", "GOMP_"))
    build = _build(options.build)
    program = build.tool(PROGRAM)
    what = " ".join([build_of(program), *env])  # how threads wait decides speed
    ops: list[Row] = []
    for part, cases in (("ops", op_cases), ("shapes", odd_cases), ("sharp", sharp_cases)):
        if part in options.parts:
            wanted, store = list(cases(options.small)), options.out / "ops.jsonl"
            rounds = options.rounds * (CHEAP if part == "ops" else 1)
            ops += measure_ops(program, wanted, store, rounds=rounds, seconds=options.seconds, threads=options.threads, build=what)
    model: list[BenchRow] = []
    if "model" in options.parts:
        depths = (0, 128) if options.small else options.depths
        model = measure_model(build, options.out, depths, small=options.small, rounds=options.rounds, threads=options.threads)
        plot.speed(model, options.out / "plot.png")
    ops = medians(ops)
    text = markdown(ops, model, f"`scripts/bench/bench_cpu.py` on {cpu_name()}, {options.threads} threads, build {what}")
    write_result(options.out / "table.md", text, patches=build.tree.digest)
    print(text, end="")
    return 1 if options.check and not all(check.ok for check in checks(ops, model)) else 0


def _build(folder: Path | None) -> Build:
    if folder is None:
        return ensure_build("cpu", targets=(PROGRAM, "llama-bench"))
    found = read_manifest(folder)
    commit, digest, compiler = (found.commit, found.digest, found.compiler) if found is not None else ("unknown", "", "unknown")
    tree = Tree(path=folder, upstream="unknown", commit=commit, digest=digest)
    return Build(id=build_of(folder / "bin" / PROGRAM), path=folder, preset="cpu", tree=tree, compiler=compiler)


if __name__ == "__main__":
    sys.exit(main())
