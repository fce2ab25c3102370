"""Everything that Mesa's driver for CPUs can show of the Vulkan backend, written to ``eval/results/vulkan.md``: make test-vulkan."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path

import lavapipe_runs
import lavapipe_tools
import radv_stats
from backend_jobs import TURBO, Job, Outcome, kept
from gpu_root_tools import REPOSITORY, in_root
from lavapipe_runs import FAULTY, JOBS, MORE_JOBS, PLAIN, ROLLED_JOBS, SIZES, UPSTREAM, VALIDATED
from lavapipe_tools import SINGLE

from turbo_gguf import patchset
from turbo_gguf.assets import embedded_model, home
from turbo_gguf.inputs.eval_text import write_held_out_text
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make.upstream import default_name

RESULT = REPOSITORY / "eval" / "results" / "vulkan.md"
PARTS = ("operations", "validation", "table", "life", "divergence", "text", "registers")
CHUNKS, CONTEXT = 4, 256
TOKENS = 48

HEAD = """# The Vulkan backend on Mesa's driver for CPUs

`make test-vulkan`, {date}, llama.cpp {upstream}, {versions}; {hooks}. Its runs took {minutes:.0f} minutes of a shared core.

The real `libggml-vulkan.so` and its SPIR-V, run by lavapipe. Not covered: the compilers and the subgroups of GPUs, their matrix
instructions, several queues at once, and speed. The expected values are the CPU backend's.
"""

OPERATIONS = """
## Operations

Cases of `test-backend-ops -b Vulkan0` with a turbo type (and some of upstream's own, which show that the driver is right), compared with
the CPU within upstream's bounds. Cases that `supports_op` refuses are not counted.{extent}

| cases | equal to the CPU | seconds |
|---|---|---|
"""

SMALL = """ This run was a small one (`--small`):
other pairs of types, more keys and more columns are left out."""

ROLLED = """
The same shaders without their hints that loops are to be unrolled. lavapipe compiles these in seconds, and large ones with their hints in
minutes or, from head size 512, not at all.

| cases | equal to the CPU | seconds |
|---|---|---|
"""

VALIDATION = """
## Validation layers

The same programs under `VK_LAYER_KHRONOS_validation` with checks of synchronization. A message is an error.

| cases | equal to the CPU, and no message | seconds |
|---|---|---|
"""

TABLE = """
## A wrong table

With zeros for negative levels of turbo3t in the library, {failed} of {all} cases of its attention fail, as they must.
"""

LIFE = """
## Life of a cache

Programs of `tests/llama` with all layers on the device, products in binary32: rotation, shift, sequences, state, types by layer, decay,
calibration, exact tokens.

| test file | passed | failed | seconds |
|---|---|---|---|
"""

DIVERGENCE = """
## KL divergence

Of the embedded model ({chunks} chunks of {context} tokens) from its f32 cache on the CPU, in nats. "plain" is a type without its defaults,
the other rows have a calibration and exact tokens. In binary32 products are as exact as the CPU's, and the difference to the CPU is in
standard errors of the two; 3 would fail, and -3 of a type of ours, too. Beside q8_0 the CPU rounds queries to 8 bits, which Vulkan does
not. In binary16 products are what users get, those of weights included: the row of f16 shows what that costs by itself.

| cache | CPU | Vulkan, binary32 | difference | Vulkan, binary16 |
|---|---|---|---|---|
"""

TEXT = """
## Continued text

`llama-completion` without sampling, {tokens} tokens behind real text, all layers on the device, products in binary32. Characters that are
equal to those of the CPU with its prompt in one batch. Sums in another order part the CPU's own texts, too, as the last column shows for
batches of 64.

| cache | Vulkan | CPU in other batches |
|---|---|---|
"""

REGISTERS = """
## Registers and instructions

Our shaders as RADV, Mesa's driver for AMD GPUs, compiles them; the GPUs are stand-ins that execute nothing. Pipelines of a shader
differ in types and head sizes.
"""

_TYPES = "turbo2-turbo2 or turbo3-turbo3 or turbo3t-turbo3t or turbo4t-turbo4t or turbo3-f16 or q8_0-turbo4"
LIFE_CASES = {
    "test_cache_life.py": f"test_cache_life and (head64 or head128 or head96 or swa) and ({_TYPES})",
    "test_exact.py": "test_exact and (head64 or head128 or sinks or qk-norm) and (turbo3 or turbo3t or q8_0 or f16)",
    "test_calibration.py": "test_calibration and (head64 or head128) and (turbo3 or turbo3t)",
    "test_decay_life.py": "test_decay and head64",
    "test_layer_types.py": "test_layer and head64",
}
"""Cases of each file: some of all types at some head sizes. All of them would take a day here."""


class Report:
    """What the parts give: text, seconds, and whether all was well."""

    def __init__(self, folder: Path, workers: int, resume: bool, small: bool) -> None:
        self.folder, self.workers, self.resume, self.small = folder, workers, resume, small
        self.text, self.seconds, self.good = "", 0.0, True

    def run(self, jobs: Mapping[str, Job], run: Callable[[Job, Path], Outcome], folder: str = "") -> dict[str, Outcome]:
        """Run selections of test-backend-ops, or find what an earlier report kept."""
        return lavapipe_runs.run_jobs(jobs, self.folder / folder, run=run, workers=self.workers, resume=self.resume)

    def add(self, head: str, rows: Sequence[str], seconds: float, good: bool) -> None:
        """Add a part with its table."""
        self.text += head + "\n".join(rows) + ("\n" if rows else "")
        self.seconds += seconds
        self.good = self.good and good

    def add_outcomes(self, head: str, outcomes: dict[str, Outcome]) -> None:
        """Add a table of cases; what is wrong goes to the terminal, too."""
        for name, outcome in outcomes.items():
            for line in outcome.faults():
                print(f"{name}: {line}", file=sys.stderr)
        rows = [outcome.row(name) for name, outcome in outcomes.items()]
        seconds = sum(outcome.seconds for outcome in outcomes.values())
        self.add(head, rows, seconds, all(outcome.passed for outcome in outcomes.values()))


def operations(report: Report) -> None:
    """test-backend-ops, all that it has, or what the tests run."""
    shipped = {**JOBS, **SIZES, "upstream's own shaders": UPSTREAM}
    rolled = ROLLED_JOBS if report.small else MORE_JOBS
    report.add_outcomes(OPERATIONS.format(extent=SMALL if report.small else ""), report.run(shipped, lavapipe_runs.run_job))
    report.add_outcomes(ROLLED, report.run(rolled, lavapipe_runs.rolled()))


def validation(report: Report) -> None:
    """Some of it under the validation layers."""
    report.add_outcomes(VALIDATION, report.run(VALIDATED, lavapipe_runs.run_validated, "validated"))


def table(report: Report) -> None:
    """Cases that must fail."""
    outcome = lavapipe_runs.run_faulty(report.folder / "faulty")
    failed = sum(not case.ok for case in outcome.cases)
    if outcome.error or not failed:
        print(f"a wrong table was not noticed: {outcome.error or FAULTY.pattern}", file=sys.stderr)
    report.add(TABLE.format(failed=failed, all=len(outcome.cases)), [], outcome.seconds, 0 < failed == len(outcome.cases))


def life(report: Report) -> None:
    """The programs of tests/llama, through pytest."""
    programs = lavapipe_tools.wrappers()

    def measure(name: str) -> tuple[int, int, float]:
        began = time.monotonic()
        log = report.folder / "life" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", f"tests/llama/{name}", "-k", LIFE_CASES[name], "-p", "no:cacheprovider"]
        with log.open("w") as out:
            subprocess.run(
                command, cwd=REPOSITORY, stdout=out, stderr=out, env={**os.environ, "TURBO_GGUF_NATIVE_BIN": str(programs)}, check=False
            )
        said = log.read_text("utf-8", errors="replace")
        counts = [int((re.findall(rf"(\d+) {word}", said) or ["0"])[-1]) for word in ("passed", "failed")]
        return counts[0], counts[1], time.monotonic() - began

    def row(name: str) -> tuple[int, int, float]:
        return kept(
            report.folder / "life" / name,
            f"{name} {lavapipe_runs.code()}",
            lambda: measure(name),
            tuple[int, int, float],
            resume=report.resume,
        )

    with ThreadPoolExecutor(report.workers) as pool:
        found = dict(zip(LIFE_CASES, pool.map(row, LIFE_CASES), strict=True))
    rows = [f"| `{name}` | {passed} | {failed} | {seconds:.0f} |" for name, (passed, failed, seconds) in found.items()]
    good = all(passed and not failed for passed, failed, _ in found.values())
    report.add(LIFE, rows, sum(seconds for *_, seconds in found.values()), good)


def _embedded(report: Report) -> Path:
    model = report.folder / "embedded" / "eval-model.gguf"
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        model.write_bytes(embedded_model().read_bytes())
        write_held_out_text(model.parent / "text.txt")
    return model


def divergence(report: Report) -> None:
    """KL divergences of all types, on the device and on the CPU."""
    model = _embedded(report)

    places: dict[str, dict[str, str]] = {"CPU": {}, "binary32": SINGLE, "binary16": {}}

    def measure(case: tuple[str, bool]) -> list[float]:
        kind, plain = case
        began = time.monotonic()
        found: list[float] = []
        for place, variables in places.items():
            if place == "binary16" and kind in TURBO and kind != "turbo3":  # emulated matrix units take minutes
                continue
            folder = report.folder / "divergence" / f"{kind}-{'plain' if plain else 'defaults'}-{place}"
            more = {**variables, **(PLAIN if plain else {})}
            found += lavapipe_runs.divergence(model, kind, folder, on_cpu=place == "CPU", chunks=CHUNKS, ctx=CONTEXT, **more)
        return [*found, time.monotonic() - began]

    def row(case: tuple[str, bool]) -> list[float]:
        what = f"{case} {CHUNKS} {CONTEXT} {lavapipe_runs.code()}"
        folder = report.folder / "divergence" / f"{case[0]}-{case[1]}"
        return kept(folder, what, lambda: measure(case), list[float], resume=report.resume)

    cases = [(kind, True) for kind in ("f16", "q8_0", "q4_0", *reversed(TURBO))] + [(kind, False) for kind in reversed(TURBO)]
    row(cases[0])  # makes the base
    with ThreadPoolExecutor(report.workers) as pool:
        values = dict(zip(cases, pool.map(row, cases), strict=True))
    rows, good = [], True
    for (kind, plain), (cpu, cpu_error, gpu, gpu_error, *half, _) in values.items():
        errors = (gpu - cpu) / math.hypot(cpu_error, gpu_error) if cpu_error or gpu_error else 0.0
        good = good and (abs(errors) if kind in TURBO else errors) < 3
        name = kind if kind not in TURBO else f"{kind} plain" if plain else kind
        told = [f"{value:.6f} ± {error:.6f}" for value, error in ((cpu, cpu_error), (gpu, gpu_error), *([half] if half else []))]
        rows.append(f"| {name} | {told[0]} | {told[1]} | {errors:+.2f} | {told[2] if half else ''} |")
    report.add(DIVERGENCE.format(chunks=CHUNKS, context=CONTEXT), rows, sum(value[-1] for value in values.values()), good)


def text(report: Report) -> None:
    """Greedy continuations on the device and on the CPU."""
    model = _embedded(report)
    prompt = (model.parent / "text.txt").read_text("utf-8")[:600]
    asked = ("-m", model, "-p", prompt, "-n", str(TOKENS), "--temp", "0", "-no-cnv", "--no-display-prompt")

    def continued(kind: str, name: str, *place: str) -> str:
        folder = report.folder / "text" / f"{kind}-{name}"
        variables = {"LLAMA_CACHE": str(report.folder / "text" / "cache"), **SINGLE}
        done = lavapipe_tools.lavapipe("llama-completion", *asked, "-ctk", kind, "-ctv", kind, *place, cwd=folder, **variables)
        if done.rc:
            raise RuntimeError(f"llama-completion ended with {done.rc}\n{done.err[-2000:]}")
        return (lavapipe_tools.on_device(done) if name == "gpu" else done).out

    def measure(kind: str) -> tuple[list[str], float]:
        began = time.monotonic()
        places = {"cpu": ("-dev", "none"), "gpu": lavapipe_tools.ON_DEVICE, "batches": ("-dev", "none", "-ub", "64")}
        return [continued(kind, name, *place) for name, place in places.items()], time.monotonic() - began

    def row(kind: str) -> tuple[list[str], float]:
        what = f"{kind} {TOKENS} {lavapipe_runs.code()}"
        return kept(report.folder / "text" / kind, what, lambda: measure(kind), tuple[list[str], float], resume=report.resume)

    def equal(expected: str, got: str) -> str:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, got, strict=False)))
        return "all" if expected == got else f"{same} of {len(expected)}"

    found = {kind: row(kind) for kind in ("f16", "turbo4", "turbo3", "turbo3t")}
    rows = [f"| {kind} | {equal(cpu, gpu)} | {equal(cpu, batches)} |" for kind, ((cpu, gpu, batches), _) in found.items()]
    report.add(TEXT.format(tokens=TOKENS), rows, sum(seconds for _, seconds in found.values()), found["f16"][0][0] == found["f16"][0][1])


def registers(report: Report) -> None:
    """What the shaders take on AMD GPUs."""
    began, lines, good = time.monotonic(), [], True
    for gpu, about in radv_stats.GPUS.items():
        found = radv_stats.stats(gpu, report.folder / "registers")
        head = f"| shader | pipelines | {' | '.join(radv_stats.COLUMNS.values())} |"
        lines += ["", f"### {about}", "", head, "|---" * (len(radv_stats.COLUMNS) + 2) + "|", *radv_stats.rows(found)]
        good = good and not radv_stats.most(found, "Spilled VGPRs")
    report.add(REGISTERS, lines, time.monotonic() - began, good)


def versions() -> str:
    """Compilers and driver of the root."""
    script = (
        'echo "glslc $(glslc --version | sed -n "s/^shaderc //p"), '
        '$(vulkaninfo --summary 2>/dev/null | sed -n "s/.*driverInfo *= //p" | head -n 1)"'
    )
    return in_root(["bash", "-c", script], cwd=home()).out.strip()


def main() -> None:
    """Write the report; ends with 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="programs at once (default: one per core)")
    parser.add_argument("--resume", action="store_true", help="take up what an earlier run of the same code has finished")
    parser.add_argument("--small", action="store_true", help="of the operations what the tests run, and a type or two at other head sizes")
    parser.add_argument("--part", action="append", choices=PARTS, help="this part only (default: all)")
    arguments = parser.parse_args()
    report = Report(home() / "logs" / "lavapipe-report", arguments.jobs, arguments.resume, arguments.small)
    for name in arguments.part or PARTS:
        globals()[name](report)
    hooks = [hook for hook in patchset.load().hooks if hook.name.startswith("ggml-vulkan")]
    head = HEAD.format(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        upstream=default_name(),
        versions=versions(),
        hooks=f"{sum(hook.added for hook in hooks)} hook lines",
        minutes=report.seconds / 60,
    )
    write_result(arguments.result, head + report.text)
    print(arguments.result)
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()
