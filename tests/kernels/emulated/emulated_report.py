"""Everything that the emulator can show of the HIP build, written to ``eval/results/hip-emulated.md``: make test-hip-emulated."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import emulated_tools
from backend_jobs import kept
from emulated_runs import JOBS, MORE_JOBS, UPSTREAM, code, perplexity, run_jobs

from turbo_gguf.assets import embedded_model, home
from turbo_gguf.codec import tables
from turbo_gguf.inputs.eval_text import write_held_out_text
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make.upstream import default_name

RESULT = Path(__file__).resolve().parents[3] / "eval" / "results" / "hip-emulated.md"
TYPES = ("f16", "q8_0", "q4_0", *(t.name for t in (*reversed(tables.SCALAR), *reversed(tables.TRELLIS))))
TINY = ("head64", "head128")
EMBEDDED_UBATCH = 8  # more queries at once would need upstream's matrix kernels for q8_0 weights, which are not compiled

HEAD = """# The HIP build on the emulator

`make test-hip-emulated`, {date}, llama.cpp {upstream}, {versions}; its runs took {minutes:.0f} minutes of a shared core.

The real `libggml-hip.so` for gfx1100, its code objects executed by `dev/emulator`: every memory access is checked against the
allocations, LDS against races between the waves of a block, and fresh memory, LDS and registers hold NaN. Not covered: other
architectures, waves of 64 lanes, timing, several streams, graphs, the last bit of exp, log, sin, cos, rcp and rsq. The expected values
are the CPU backend's.
"""

OPERATIONS = """
## Operations

Cases of `test-backend-ops -b ROCm0` with a turbo type (and some of upstream's own, which show that the emulator is right), compared with
the CPU within upstream's bounds. Slices: `GGML_TURBO_CUDA_SLICE=512`, so that prefill takes three or four of them.

| cases | equal to the CPU | seconds |
|---|---|---|
"""

PERPLEXITY = """
## Perplexity

On the emulated device and on the CPU, {context} tokens a chunk, flash attention. The tiny models (two chunks, untrained, so perplexity
is large) run 32 queries at once, which is prefill; the embedded model (one chunk of Python code) runs 8, which is decode. f16 shows what
the order of additions does, and on the embedded model also that activations are rounded to 8 bits in other places; a type of few bits
makes a whole step of it where a value lies at the border of two codes. A chunk scores 63 tokens: on the embedded model the difference
between turbo2 and f16 has a standard error of 5 %, and the KL divergences of turbo2 from f16 are 0.095 +- 0.023 on the CPU and
0.108 +- 0.024 emulated, of turbo3 0.0165 +- 0.0025 and 0.0175 +- 0.0024 (measured by hand, 2026-11-21).

| model | cache | CPU | emulated | difference |
|---|---|---|---|---|
"""


def models(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Model file, queries at once, and chunks by name; a text lies beside each."""
    found = {}
    for name in TINY:
        (folder / name).mkdir(parents=True, exist_ok=True)
        found[f"tiny {name}"] = emulated_tools.tiny_model(name, folder / name), 32, 2
    embedded = folder / "embedded" / "eval-model.gguf"
    embedded.parent.mkdir(exist_ok=True)
    embedded.write_bytes(embedded_model().read_bytes())
    write_held_out_text(embedded.parent / "text.txt")
    found["embedded"] = embedded, EMBEDDED_UBATCH, 1
    return found


def operations(folder: Path, workers: int, resume: bool) -> tuple[list[str], float, bool]:
    """Rows of the table of operations, seconds, and whether all cases passed."""
    outcomes = run_jobs({**JOBS, **MORE_JOBS, "upstream's own kernels": UPSTREAM}, folder, workers=workers, resume=resume)
    for name, outcome in outcomes.items():
        for line in outcome.faults():
            print(f"{name}: {line}", file=sys.stderr)
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return [outcome.row(name) for name, outcome in outcomes.items()], seconds, all(outcome.passed for outcome in outcomes.values())


def perplexities(folder: Path, workers: int, resume: bool) -> tuple[list[str], float]:
    """Rows of the table of perplexities, and seconds."""

    def measure(case: tuple[str, str]) -> tuple[float, float, float]:
        (model, ubatch, chunks), kind = found[case[0]], case[1]
        began = time.monotonic()
        cpu, gpu = (
            perplexity(model, kind, folder / "-".join((*case, where)), on_cpu=where == "cpu", ubatch=ubatch, chunks=chunks)
            for where in ("cpu", "gpu")
        )
        return cpu, gpu, time.monotonic() - began

    def kept_or_new(case: tuple[str, str]) -> tuple[float, float, float]:
        return kept(
            folder / "-".join(case), repr((case, found[case[0]], code())), lambda: measure(case), tuple[float, float, float], resume=resume
        )

    found = models(folder)
    cases = [(name, kind) for name in found for kind in TYPES]
    with ThreadPoolExecutor(workers) as pool:
        values = list(pool.map(kept_or_new, cases))
    rows = [
        f"| {name} | {kind} | {cpu:.4f} | {gpu:.4f} | {100 * (gpu / cpu - 1):+.3f} % |"
        for (name, kind), (cpu, gpu, _) in zip(cases, values, strict=True)
    ]
    return rows, sum(seconds for *_, seconds in values)


def versions() -> str:
    """Compiler and HIP of the root."""
    command = 'echo "clang $("$(hipconfig -l)/clang" -dumpversion), HIP $(hipconfig --version)"'
    return re.sub(r"-\d+$", "", emulated_tools.in_root(["bash", "-c", command], cwd=home()).out.strip())


def main() -> None:
    """Write the report; ends with 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="programs at once (default: one per core)")
    parser.add_argument("--resume", action="store_true", help="take up what an earlier run of the same code has finished")
    arguments = parser.parse_args()
    folder = home() / "logs" / "hip-emulated"
    emulated_tools.build()
    rows, seconds, passed = operations(folder, arguments.jobs, arguments.resume)
    perplexity_rows, more_seconds = perplexities(folder / "perplexity", arguments.jobs, arguments.resume)
    text = OPERATIONS + "\n".join(rows) + "\n" + PERPLEXITY.format(context=128) + "\n".join(perplexity_rows) + "\n"
    head = HEAD.format(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        upstream=default_name(),
        versions=versions(),
        minutes=(seconds + more_seconds) / 60,
    )
    write_result(arguments.result, head + text)
    print(arguments.result)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
