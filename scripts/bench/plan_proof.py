"""Compare what `turbo-gguf plan` says with what llama-server allocates.

    python scripts/bench/plan_proof.py --bin BUILD/bin --out eval/results/plan.md MODEL...

For each architecture that upstream's test-llama-archs makes, and for each MODEL:

- KV caches at 2**20 tokens, f16, by the header and by a dry run. There a byte per token is a MiB in the log, so its two digits are exact.
- A server that really starts: KV caches, copies, state, and everything together, by its log.

Exit codes: 0 all agrees, 1 something differs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from turbo_gguf import tools
from turbo_gguf.cache.spec import PLAIN, CacheSpec, parse_types
from turbo_gguf.cache.types import RIVALS, TRELLIS
from turbo_gguf.errors import ToolFailed
from turbo_gguf.inputs import headers
from turbo_gguf.inputs.headers import Header
from turbo_gguf.judge import results
from turbo_gguf.judge.report import markdown
from turbo_gguf.make.build import read_manifest
from turbo_gguf.plan import dry_run, memory
from turbo_gguf.plan.dry_run import DryRun
from turbo_gguf.plan.memory import Context, Memory
from turbo_gguf.plan.planner import Planner
from turbo_gguf.plan.shape import Shape, shape_of

LONG = Context(1 << 20)
SHORT = Context(2048, 2)
TYPES = ("turbo3", "q8_0", "f16")
"""An architecture runs with the first of these that it can have."""

WITHIN = 0.02

_ALL_LAYERS = "a dry run plans a calibration of all layers, and these random weights leave some without"
EXCEPTIONS = {
    "maple-moe": _ALL_LAYERS,
    "smallthinker-moe": _ALL_LAYERS,
    "minimax-01-moe": "upstream's own dry run is 2 MiB short with two slots, with q8_0 and f16, too",
}
"""Models whose compute buffers differ by more, and why. KV caches, copies and state are equal there, too."""

EXCEPTION_MIB = 2.5
ROUNDING = 0.03
"""MiB by which sums of sizes in a log may differ from the sum: there are up to six of them."""

DIFFERS = 1
SECONDS = 120.0

_MIB = 1 << 20
_WEIGHTS = re.compile(r"load_tensors:\s+\S+ model buffer size =\s*([\d.]+) MiB")


class Proof(msgspec.Struct, frozen=True):
    """A plan beside a run."""

    name: str
    types: CacheSpec
    context: Context
    per_token: float
    exact: bool  # KV caches at 2**20 tokens, to a hundredth of a byte per token
    same_kv: bool  # those of the run, to the last digit of its log
    planned: Memory  # by header and dry run
    estimated: Memory  # by the header alone
    run: Memory  # calibration: as planned, for no log tells it

    @property
    def off(self) -> float:
        """How far the plan is from the run, of the run."""
        return self.planned.total / self.run.total - 1

    @property
    def holds(self) -> bool:
        """Whether it is what was promised."""
        apart = {part: abs(getattr(self.planned, part) - getattr(self.run, part)) / _MIB for part in ("kv", "copies", "state", "compute")}
        near = abs(self.off) <= WITHIN or (self.name in EXCEPTIONS and apart["compute"] <= EXCEPTION_MIB)
        return self.exact and self.same_kv and near and all(apart[part] < ROUNDING for part in ("kv", "copies", "state"))


def prove(server: Path, path: Path, types: CacheSpec, context: Context, *, logs: Path, long: bool = True) -> Proof:
    """Plan and run one context.

    Args:
        server: llama-server of a build.
        path: of the model.
        types: of the cache.
        context: of the run.
        logs: folder for logs.
        long: look at 2**20 tokens, too.
    """
    header = headers.read(str(path))
    planner = Planner(header, server=server, backend="CPU")
    shape = shape_of(header.fields, header.tensors)
    exact = not long or dry_run.same_kv(memory.kv_bytes(shape, PLAIN, LONG), planner.ask(PLAIN, LONG))
    planned = planner.memory(types, context)
    found, weights = start(server, header, planner.args(types, context), logs / "plan-proof")
    run = Memory(found.kv, found.copies, planned.calibration, found.state, weights, found.compute)
    return Proof(
        name=path.stem,
        types=types,
        context=context,
        per_token=memory.per_token(shape, types),
        exact=exact,
        same_kv=dry_run.same_kv(memory.kv_bytes(shape, types, context), found),
        planned=planned,
        estimated=memory.estimate(shape, types, context),
        run=run,
    )


def start(server: Path, header: Header, args: Sequence[str], name: Path) -> tuple[DryRun, int]:
    """Start a server for real; returns what its log tells, and bytes of weights."""
    quiet = ("-fit", "off", "--no-warmup", "-t", "1", "-lv", "4")  # threads that wait for each other slow a busy machine down
    argv = [server, "-m", str(header.path), *args, "--host", "127.0.0.1", "--port", "0", *quiet]
    with tools.serving(argv, log=name, grace=0) as service:
        deadline = time.monotonic() + SECONDS
        while "all slots are idle" not in (text := service.stderr.read_text("utf-8", errors="replace")):
            service.require_alive("the log says more")
            if time.monotonic() > deadline:
                raise ToolFailed(f"llama-server is not ready after {SECONDS:g} s; log: {service.stderr}")
            time.sleep(0.02)
    return dry_run.sizes(text), round(sum(map(float, _WEIGHTS.findall(text))) * _MIB)


def made(programs: Path, folder: Path) -> list[Path]:
    """Models of all architectures, made by upstream's test-llama-archs: a gigabyte."""
    (folder / "archs").mkdir()
    tools.run([programs / "test-llama-archs", "-s", "1", "-o", f"{folder}/archs/"], log=folder / "made")
    return sorted((folder / "archs").glob("*.gguf"))


def types_for(shape: Shape) -> CacheSpec:
    """What an architecture runs with."""
    return next(types for types in map(parse_types, TYPES) if not memory.why_not(shape, types))


def architectures(server: Path, models: Sequence[Path], logs: Path) -> Iterator[Proof]:
    """Each model once. Those without a KV cache have nothing to plan."""
    for path in models:
        header = headers.read(str(path))
        shape = shape_of(header.fields, header.tensors)
        if shape.has_cache:
            yield prove(server, path, types_for(shape), SHORT, logs=logs)


def real(server: Path, path: Path, logs: Path) -> Iterator[Proof]:
    """A real model on one slot, on slots of their own, and on a pool."""
    for context in (Context(4096), Context(2048, 4), Context(4096, 4, unified=True)):
        for types in map(parse_types, (*RIVALS, *TRELLIS)):
            yield prove(server, path, types, context, logs=logs, long=context.parallel == 1 and types == PLAIN)


def row(proof: Proof) -> tuple[str, ...]:
    """A line of the table."""
    context = proof.context
    slots = f"{context.parallel} x {context.ctx:,}" if not context.unified else f"{context.parallel} on {context.ctx:,}"
    sides = (proof.planned, proof.run)
    guess = proof.estimated.total / proof.run.total - 1
    return (
        proof.name,
        str(proof.types),
        slots,
        f"{proof.per_token:,.0f}",
        "equal" if proof.exact and proof.same_kv else "DIFFERENT",
        *(f"{side.kv / _MIB:.2f}" for side in sides),
        *(f"{side.total / _MIB:.2f}" for side in sides),
        f"{100 * proof.off:+.2f} %",
        f"{100 * guess:+.1f} %",
    )


HEADER = ("model", "type", "slots", "bytes per token", "KV bytes", "KV planned", "KV run", "all planned", "all run", "off", "header alone")


def table(proofs: Sequence[Proof]) -> str:
    """All of them."""
    return markdown(HEADER, [row(proof) for proof in proofs], left=3)


def text(archs: Sequence[Proof], reals: Sequence[Proof], *, upstream: str) -> str:
    """The result."""
    every = (*archs, *reals)
    usual = [abs(proof.off) for proof in every if proof.name not in EXCEPTIONS]
    wrong = list(dict.fromkeys(proof.name for proof in every if not proof.holds))
    fine = f"All agree. Everything together is off by {100 * max(usual):.2f} % at most, but for the exceptions below."
    verdict = f"Different: {', '.join(wrong)}." if wrong else fine
    known = "\n".join(
        f"- `{proof.name}`, off by {100 * proof.off:+.1f} %: {EXCEPTIONS[proof.name]}." for proof in archs if _is_known(proof)
    )
    return f"""# What is planned, and what is allocated

`turbo-gguf plan` beside llama-server of llama.cpp {upstream}, preset `cpu`, on {len(archs)} models of upstream's
`test-llama-archs` and on real models. {verdict}

- **KV bytes** are equal when K and V of each cache agree with two logs to the last digit: with a dry run at 1,048,576 tokens
  in f16, where a byte per token is a MiB, and with the run of the line.
- **all** is MiB of weights, KV caches, copies of exact tokens, calibration, state, compute and output buffers. No log tells a
  calibration, so both sides have the planned one.
- **off** is the plan with a dry run, **header alone** the estimate without one. The models of `test-llama-archs` take a few MiB, and
  compute buffers are most of it. So the last column is worst there.

Exceptions, in compute buffers only:

{known}

## Real models

{table(reals)}

## Architectures

{table(archs)}
"""


def _is_known(proof: Proof) -> bool:
    return proof.name in EXCEPTIONS and abs(proof.off) > WITHIN


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="folder with llama-server and test-llama-archs")
    parser.add_argument("--upstream", default="b11549")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("models", nargs="*", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archs = list(architectures(options.bin / "llama-server", made(options.bin, folder), folder))
        reals = [proof for path in options.models for proof in real(options.bin / "llama-server", path, folder)]
    manifest = read_manifest(options.bin.resolve().parent)
    results.write(options.out, text(archs, reals, upstream=options.upstream), patches=manifest.digest if manifest else None)
    return DIFFERS if any(not proof.holds for proof in (*archs, *reals)) else 0


if __name__ == "__main__":
    sys.exit(main())
