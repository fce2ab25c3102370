"""Speed against depth: llama-bench over types x depths, in rounds, so that what slows the machine down hits all types alike.

llama-bench prints no log unless ``-v``, and ``-v`` costs time; so each type first makes a short run with it, whose log passes the
guard against silent fallback, and is then measured without. A round is one process per type over all depths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf import assets, tools
from turbo_gguf.cache import fit, spec
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import LogNotUnderstood, SilentFallback, UsageError, with_log
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.measure import guard, log
from turbo_gguf.measure.case import METRICS_VERSION
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import BenchRow
from turbo_gguf.measure.store import Store

REQUIRED_FIELDS = frozenset(
    {"build_commit", "type_k", "type_v", "n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts", "test_time", "backends", "flash_attn"}
)
"""Fields of a row that we read ourselves; all others are kept as they are."""


class BenchPlan(msgspec.Struct, frozen=True):
    """What to measure: all types at all depths, ``rounds`` times."""

    types: tuple[CacheSpec, ...]
    depths: tuple[int, ...]
    n_prompt: int
    n_gen: int
    rounds: int
    threads: int
    backend: str
    env: tuple[str, ...] = ()

    def key(self, build: Build, model: ModelFile) -> str:
        """Name of the set-up in the store: rows with the same key may be compared."""
        parts = (build.id, model.sha256, self.threads, self.backend, self.env, METRICS_VERSION)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:20]


def run(plan: BenchPlan, build: Build, model: ModelFile, store: Store, say: Callable[[str], None]) -> list[BenchRow]:
    """Measure and store; returns the rows of the plan with the types as asked for, stored ones of earlier rounds included.

    Interrupting loses the process in hand; the same plan again continues with the rounds that are missing.

    Raises:
        UsageError: a type does not fit the head sizes, or a depth the trained context.
        ToolFailed: llama-bench crashed, its output was not understood, or something else ran than asked for.
    """
    check_fit(plan, model)
    for types in plan.types:
        _probe(types, plan, build, model)
    say("cache types, device and rotation are as asked for")
    key, total = plan.key(build, model), plan.rounds * len(plan.types)
    for number in range(plan.rounds):
        for i, types in enumerate(plan.types):
            missing = _missing(plan, store, key, types, number)
            if missing:
                say(f"[{number * len(plan.types) + i + 1}/{total}] round {number + 1}, {types}, depths {', '.join(map(str, missing))}")
                store.append(_measure(types, missing, number, plan=plan, build=build, model=model))
    asked = {spec.measured(types): types for types in reversed(plan.types)}
    rows = (row for row in store.bench_rows() if row.key == key and _in_plan(row, plan))
    return [msgspec.structs.replace(row, types=asked[spec.measured(row.types)]) for row in rows]


def check_fit(plan: BenchPlan, model: ModelFile) -> None:
    """Refuse a plan that this model cannot run.

    Raises:
        UsageError: head size, layers, or a depth beyond the trained context.
    """
    longest = max(plan.depths) + max(plan.n_prompt, plan.n_gen)
    if 0 < model.n_ctx_train < longest:
        raise UsageError(f"depth {max(plan.depths)} needs {longest} tokens; {model.name} was trained on {model.n_ctx_train}")
    for types in plan.types:
        fit.check_fit(types, model)


def _in_plan(row: BenchRow, plan: BenchPlan) -> bool:
    test = (row.n_prompt, row.n_gen) in ((plan.n_prompt, 0), (0, plan.n_gen))
    types = spec.measured(row.types) in map(spec.measured, plan.types)
    return types and row.depth in plan.depths and row.round < plan.rounds and test


def _missing(plan: BenchPlan, store: Store, key: str, types: CacheSpec, number: int) -> list[int]:
    """Depths of a type that this round has no rows of yet."""
    rows = [r for r in store.bench_rows() if r.key == key and r.round == number and _in_plan(r, plan)]
    rows = [r for r in rows if spec.measured(r.types) == spec.measured(types)]
    wanted = (plan.n_prompt > 0) + (plan.n_gen > 0)
    return [depth for depth in plan.depths if sum(row.depth == depth for row in rows) < wanted]


def _argv(types: CacheSpec, plan: BenchPlan, build: Build, model: ModelFile) -> list[str]:
    flash = "on" if spec.flash_attention(types) else "off"
    return [
        str(build.tool("llama-bench")),
        *("-m", str(model.path), "-t", str(plan.threads), *spec.options(types), "-fa", flash, "-o", "jsonl"),
        *gpu_layers(plan.backend),
    ]


def _log(kind: str, types: CacheSpec) -> Path:
    """Log of a process."""
    return assets.home() / "logs" / "bench" / f"{kind}-{spec.file_name(types)}.log"


def _probe(types: CacheSpec, plan: BenchPlan, build: Build, model: ModelFile) -> None:
    """Run shortly with ``-v`` and check what really ran. So short a run decays nothing: decay is announced, and that is checked."""
    argv = [*_argv(types, plan, build, model), "-v", "-p", "16", "-n", "0", "-r", "1", "--no-warmup"]
    done = tools.run(argv, log=_log("probe", types))
    try:
        facts = log.log_facts(done.stderr.read_text(encoding="utf-8", errors="replace"))
        guard.check(facts, types, backend=plan.backend, model=model)
    except (LogNotUnderstood, SilentFallback) as error:
        raise with_log(error, done.stderr) from error


def _measure(types: CacheSpec, depths: Sequence[int], number: int, *, plan: BenchPlan, build: Build, model: ModelFile) -> list[BenchRow]:
    argv = [
        *_argv(types, plan, build, model),
        *("-p", str(plan.n_prompt), "-n", str(plan.n_gen), "-d", ",".join(map(str, depths)), "-r", "1"),
    ]
    done = tools.run(argv, log=_log(f"round-{number}", types))
    try:
        rows = rows_of(done.stdout.read_text(encoding="utf-8", errors="replace"))
        wanted = len(depths) * ((plan.n_prompt > 0) + (plan.n_gen > 0))
        if len(rows) != wanted:
            raise LogNotUnderstood(f"llama-bench printed {len(rows)} rows, {wanted} were expected")
        return [_record(row, types, number, plan=plan, build=build, model=model) for row in rows]
    except (LogNotUnderstood, SilentFallback) as error:
        raise with_log(error, done.stdout) from error


def rows_of(out: str) -> list[dict[str, Any]]:
    """Read the output of ``llama-bench -o jsonl``: one dict per test, exactly as it was printed.

    Raises:
        LogNotUnderstood: a line is no JSON object, or lacks a field.
    """
    rows = []
    for line in filter(str.strip, out.splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LogNotUnderstood(f"llama-bench printed a line that is no JSON ({error}): {line[:80]}") from error
        missing = REQUIRED_FIELDS - row.keys() if isinstance(row, dict) else REQUIRED_FIELDS
        if missing:
            raise LogNotUnderstood(f"llama-bench printed a row without {', '.join(sorted(missing))}")
        rows.append(row)
    return rows


def _record(row: dict[str, Any], types: CacheSpec, number: int, *, plan: BenchPlan, build: Build, model: ModelFile) -> BenchRow:
    if (row["type_k"], row["type_v"]) != (types.k, types.v):
        raise SilentFallback(f"llama-bench measured K {row['type_k']} / V {row['type_v']}; asked for was {types}")
    if plan.backend not in str(row["backends"]):
        raise SilentFallback(f"llama-bench measured on {row['backends']}; asked for was {plan.backend}")
    speed = float(row["avg_ts"] or 0)
    if not speed > 0:
        raise LogNotUnderstood(f"llama-bench measured {row['avg_ts']} tokens per second")
    return BenchRow(
        key=plan.key(build, model),
        types=types,
        depth=int(row["n_depth"] or 0),
        n_prompt=int(row["n_prompt"] or 0),
        n_gen=int(row["n_gen"] or 0),
        round=number,
        tokens_per_second=Metric(speed, float(row["stddev_ts"] or 0)),
        build_id=build.id,
        patch_digest=build.tree.digest,
        row=row,
    )
