"""Time attention and cache writes of single layers on a GPU, type against type, and hold the result against the targets.

    python scripts/gpu/bench_gpu.py                          # builds for the GPU here, all cases: about five minutes
    python scripts/gpu/bench_gpu.py --device CPU --small     # the same script, small, on the CPU
    python scripts/gpu/bench_gpu.py --program build/.../bin/test-turbo-perf --device CUDA0 --out results

Writes ops.jsonl (a line per case, appended; cases that are there are not measured again) and ops.md. Exit codes: 0 measured, 1 a target
is missed (only with --check), 3 something is missing, 4 the program crashed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))  # called as a script
from bench_ops import (
    KV_HEADS,
    PROGRAM,
    TYPES,
    Case,
    Check,
    Row,
    Rows,
    build_of,
    keep,
    load,
    measure,
    microseconds,
    shape_text,
    table,
    targets,
)

from turbo_gguf.cache.types import QUANTIZED_RIVALS, TURBO
from turbo_gguf.failures import exit_code
from turbo_gguf.make.build import ensure_build

DECODE_KEYS = (4096, 16384, 65536, 262144)
PREFILL = (512, 32768)  # queries, keys
WRITE = (512, 8192)  # rows, keys of the attention that it is compared with

DECODE_TARGETS = {4096: 1.0, 65536: 2.0, 262144: 2.5}
"""Keys -> least speed against f16 of each of our types."""
PREFILL_TARGET = 1.05  # most time against f16
WRITE_TARGET = 0.02  # most time against the attention of the same tokens, for K and V together


def cases(small: bool = False) -> Iterator[Case]:
    """All cases, those that are compared next to each other."""
    shapes = [(64, 2)] if small else [(128, 4), (128, 8), (256, 4), (256, 8)]
    decode = (256, 1024) if small else DECODE_KEYS
    prefill = (16, 512) if small else PREFILL
    write = (16, 256) if small else WRITE
    for head, gqa in shapes:
        for keys in decode:
            yield from (Case("fattn", types, head, gqa, 1, keys) for types in TYPES)
        yield from (Case("fattn", types, head, gqa, *prefill) for types in TYPES)
        yield from (Case("fattn", types, head, gqa, *write) for types in TYPES if "/" not in types)
        yield from (Case("set_rows", types, head, gqa, *write) for types in TYPES if "/" not in types)


def checks(rows: Iterable[Row]) -> list[Check]:
    """Hold the rows against the targets; a target whose rows were not measured is left out, one that is not supported fails."""
    by_case = {row.case: row for row in rows}
    found: list[Check] = []
    for case, row in by_case.items():
        if case.op == "fattn" and case.queries == 1:
            found += _decode_checks(case, row, by_case)
        elif case.op == "fattn" and (case.queries, case.keys) == PREFILL and case.types.startswith("turbo"):
            base = microseconds(by_case, case, "f16")
            if base:
                ratio = row.us / base if row.ok else float("inf")
                found.append(Check(f"prefill {shape_text(case)} {case.types}: time / f16", ratio, PREFILL_TARGET, ratio <= PREFILL_TARGET))
        elif case.op == "set_rows" and case.types.startswith("turbo"):
            attention = by_case.get(msgspec.structs.replace(case, op="fattn"))
            if attention is not None and attention.ok:
                ratio = 2 * row.us / attention.us if row.ok else float("inf")
                found.append(Check(f"write {shape_text(case)} {case.types}: time / attention", ratio, WRITE_TARGET, ratio < WRITE_TARGET))
    return found


def _decode_checks(case: Case, row: Row, by_case: Rows) -> Iterator[Check]:
    base, least = microseconds(by_case, case, "f16"), DECODE_TARGETS.get(case.keys)
    what = f"decode {shape_text(case)} {case.types}: "
    if base and least is not None and case.types in TURBO:
        speed = base / row.us if row.ok else 0.0
        yield Check(f"{what}speed / f16", speed, least, speed >= least)
    if case.types.startswith("turbo"):
        for rival in QUANTIZED_RIVALS:
            other = microseconds(by_case, case, rival)
            if other:
                speed = other / row.us if row.ok else 0.0
                yield Check(f"{what}speed / {rival}", speed, 1.0, speed >= 1.0)


def markdown(rows: Sequence[Row], about: str) -> str:
    """The whole table: a row per shape, a column per pair of types."""
    lines = [
        "# Single ops",
        "",
        f"{about}; {KV_HEADS} KV heads. Median microseconds of one layer's op (the cache has as many layers as a GPU's L2 cannot hold), "
        "in brackets its speed against f16, and GB/s of cache read.",
        "",
    ]
    for title, op, decode in (("Decode, one query", "fattn", True), ("Prefill", "fattn", False), ("Writing rows", "set_rows", False)):
        chosen = [row for row in rows if row.case.op == op and (row.case.queries == 1) == decode]
        if chosen:
            lines += [f"## {title}", "", *table(chosen, _cell), ""]
    return "\n".join(lines + targets(checks(rows))) + "\n"


def _cell(row: Row, base: float) -> str:
    ratio = f" ({base / row.us:.2f})" if base else ""
    return f"{row.us:.1f}{ratio}, {row.bytes / row.us / 1e3:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="", help="build for this  [default: cuda or rocm, by --device]")
    parser.add_argument("--program", type=Path, help="test-turbo-perf of a finished build")
    parser.add_argument("--device", default="CUDA0", help="CUDA0, ROCm0 or CPU")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring each case")
    parser.add_argument("--out", type=Path, default=Path("build/report/ops"))
    parser.add_argument("--check", action="store_true", help="end with 1 when a target is missed")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    preset = options.preset or options.device.rstrip("0123456789").lower()
    program = options.program or ensure_build(preset, targets=(PROGRAM,)).tool(PROGRAM)
    store = options.out / "ops.jsonl"
    build = build_of(program)
    rows = [row for row in load(store) if (row.device, row.build) == (options.device, build)]
    known = {row.case for row in rows}
    wanted = [case for case in cases(options.small) if case not in known]
    rows += keep(store, measure(program, options.device, wanted, options.seconds))
    text = markdown(rows, f"`scripts/gpu/bench_gpu.py` on {options.device}, build {build}")
    (options.out / "ops.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 1 if options.check and not all(check.ok for check in checks(rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
