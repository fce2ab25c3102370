"""What the benchmarks of single ops share: their cases, the program that times them, the rows they keep, and tables."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from turbo_gguf.cache.types import RIVALS, TURBO, cache_type
from turbo_gguf.errors import ToolFailed
from turbo_gguf.make.build import read_manifest

PROGRAM = "test-turbo-perf"
TYPES = (*RIVALS, *TURBO, "turbo4/turbo3", "turbo4t/turbo3t")
KV_HEADS = 8


class Case(msgspec.Struct, frozen=True, omit_defaults=True):
    """One op on one shape, with K/V types as in "turbo4/turbo3"."""

    op: str
    types: str
    head_size: int
    gqa: int
    queries: int
    keys: int
    deviation: float = 1.0
    """Standard deviation of the scores of attention."""

    @property
    def line(self) -> str:
        """The case as the program reads it."""
        k, _, v = self.types.partition("/")
        return f"{self.op} {k} {v or k} {self.head_size} {KV_HEADS} {self.gqa} {self.queries} {self.keys} {self.deviation:g}"


def fits(types: str, head_size: int) -> bool:
    """Whether heads of this size can be cut into blocks of these types."""
    return all(head_size % cache_type(name).block == 0 for name in types.split("/"))


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the program said about a case; times in microseconds, median over rounds."""

    case: Case
    us: float
    us_min: float
    us_max: float
    bytes: float
    status: str
    device: str
    build: str  # id of the build, so that rows of another one are measured anew
    threads: int = 0  # 0: the backend's default
    round: int = 0  # of the caller, who may run the program several times

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.status == "ok"


class Check(msgspec.Struct, frozen=True):
    """A target, what was measured, and whether it is met."""

    what: str
    value: float
    limit: float
    ok: bool
    spread: float = 0.0  # of the value, where rounds were measured


Rows = Mapping[Case, Row]


def build_of(program: Path) -> str:
    """Id of the build that a program belongs to; a hash of the program and its libraries where that is not written beside it."""
    manifest = read_manifest(program.resolve().parent.parent)
    if manifest is not None:
        return manifest.id
    files = [program, *sorted(program.parent.glob("libggml*.so"))]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:12]


def measure(program: Path, device: str, wanted: Sequence[Case], seconds: float, threads: int = 0) -> Iterator[Row]:
    """Run the program on the cases and hand on each row as it comes.

    Raises:
        ToolFailed: it crashed, or runs on another number of threads; rows before that were handed on.
    """
    argv = [str(program), device, str(seconds), *([str(threads)] if threads else [])]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        process.stdin.write("".join(f"{case.line}\n" for case in wanted))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once: its words and its return code follow
    done, build = 0, build_of(program)
    for line, case in zip(process.stdout, wanted, strict=False):
        found = json.loads(line)
        if threads and found.get("threads") != threads:
            process.kill()
            raise ToolFailed(f"{program} does not take a number of threads", "build it anew")
        yield Row(case, found["us"], found["us_min"], found["us_max"], found["bytes"], found["status"], device, build, threads)
        done += 1
    words = process.stderr.read()
    if process.wait() != 0 or done != len(wanted):
        last = wanted[done].line if done < len(wanted) else "the end"
        raise ToolFailed(f"{program.name} ended with {process.returncode} at: {last}\n{words[-1500:].strip()}")


def load(path: Path) -> list[Row]:
    """Rows of earlier calls."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [msgspec.json.decode(line, type=Row) for line in text.splitlines()]


def keep(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Append rows to a file as they come, so that those before a crash are there; returns them all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            kept.append(row)
            file.write(msgspec.json.encode(row).decode() + "\n")
            file.flush()
            print(f"{row.case.line}: {row.us:.1f} us {row.status}", file=sys.stderr)
    return kept


def microseconds(rows: Rows, case: Case, types: str) -> float:
    """Time of the same shape with other types; 0 when it was not measured."""
    row = rows.get(msgspec.structs.replace(case, types=types))
    return row.us if row is not None and row.ok else 0.0


def shape_text(case: Case) -> str:
    """The shape in the name of a target."""
    return f"{case.queries} x {case.keys}, head {case.head_size}, GQA {case.gqa},"


def table(rows: Sequence[Row], cell: Callable[[Row, float], str]) -> list[str]:
    """A line per shape, a column per pair of types; ``cell`` is given a row that was measured, and the time with f16."""
    by_case = {row.case: row for row in rows}
    shapes = list(dict.fromkeys(msgspec.structs.replace(row.case, types="") for row in rows))
    present = [types for types in TYPES if any(row.case.types == types for row in rows)]
    lines = [f"| head | GQA | queries | keys | {' | '.join(present)} |", "|---" * (len(present) + 4) + "|"]
    for shape in shapes:
        base = microseconds(by_case, shape, "f16")
        found = [by_case.get(msgspec.structs.replace(shape, types=types)) for types in present]
        cells = ["" if row is None else cell(row, base) if row.ok else row.status for row in found]
        lines.append(f"| {shape.head_size} | {shape.gqa} | {shape.queries} | {shape.keys} | {' | '.join(cells)} |")
    return lines


def targets(found: Sequence[Check]) -> list[str]:
    """How many targets are met, and all of them, the missed ones first."""
    ordered = sorted(found, key=lambda check: check.ok)
    lines = ["## Targets", "", f"{sum(check.ok for check in found)} of {len(found)} met.", ""]
    if found:
        lines += ["| target | measured | limit | |", "|---|---|---|---|"]
        lines += [f"| {c.what} | {_value(c)} | {c.limit:g} | {'pass' if c.ok else '**fail**'} |" for c in ordered]
    return lines


def _value(check: Check) -> str:
    return f"{check.value:.3f} ± {check.spread:.3f}" if check.spread else f"{check.value:.3f}"
