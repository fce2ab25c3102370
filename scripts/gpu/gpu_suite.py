"""Everything that is to be known about the kernels on a real GPU, in stages that can be spread over several calls.

Called by gpu_suite.sh. Each stage has a log, a time limit and a verdict; one that ended is not repeated for the same patches and device.
The results folder holds summary.md, stages.jsonl and what the stages leave (ops.md, ops.jsonl, bench.jsonl, gate/table.md).

Exit codes: 0 all stages passed or were skipped with a reason, 1 one failed, 3 no GPU or no toolkit, 4 a tool crashed or ran out of time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from gpu_stages import STAGES, Status, Suite

from turbo_gguf.assets import home
from turbo_gguf.errors import EnvironmentMissing, TurboError
from turbo_gguf.failures import exit_code
from turbo_gguf.make import presets, toolkits
from turbo_gguf.measure import environment

SMALLEST_START = 20
"""Seconds that must be left for another stage to be begun."""


class Stage(msgspec.Struct, frozen=True):
    """How a stage ended."""

    name: str
    key: str  # patches and device
    status: Status
    note: str
    seconds: float


def run_stage(suite: Suite, name: str) -> Stage:
    """Run one stage within its limit and within what is left of all."""
    function, limit = STAGES[name]
    started = time.monotonic()
    suite.stage_deadline = min(started + limit, suite.deadline)
    print(f"{name}: at most {suite.stage_deadline - started:.0f} s", file=sys.stderr, flush=True)
    try:
        status, note = function(suite)
    except EnvironmentMissing:
        raise
    except TurboError as error:
        status, note = "error", error.message
    for folder in (suite.out, home(), Path.cwd()):  # the results are to be committed
        note = note.replace(f"{folder}/", "")
    note = note.replace("\n", "; ").replace("|", "/")
    done = Stage(name, suite.key, status, note, round(time.monotonic() - started, 1))
    print(f"{name}: {status} in {done.seconds} s: {note}", file=sys.stderr, flush=True)
    return done


def load(path: Path, key: str) -> dict[str, Stage]:
    """Stages of earlier calls that ended, for the same patches and device."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = (msgspec.json.decode(line, type=Stage) for line in lines)
    return {stage.name: stage for stage in found if stage.key == key and stage.status != "error"}


def summary(suite: Suite, stages: Mapping[str, Stage]) -> str:
    """summary.md: the verdicts, the machine, and tables that have no file of their own."""
    lines = ["# GPU suite", "", f"{machine(suite)}; patches and device `{suite.key}`.", "", "| stage | | seconds | |", "|---|---|---|---|"]
    for name in STAGES:
        stage = stages.get(name)
        lines.append(f"| {name} | {stage.status} | {stage.seconds} | {stage.note} |" if stage else f"| {name} | not run yet | | |")
    rows = suite.out / "bench.jsonl"
    if rows.exists():
        found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
        lines += ["", "## llama-bench", "", "Tokens per second, in brackets against f16 at the same depth.", "", *bench_table(found)]
    return "\n".join(lines) + "\n"


def bench_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Tests by depth down, types across."""
    speed = {
        (_number(row["n_depth"]), "prefill" if row["n_prompt"] else "decode", str(row["type_k"])): float(str(row["avg_ts"])) for row in rows
    }
    types = list(dict.fromkeys(str(row["type_k"]) for row in rows))
    lines = [f"| test | depth | {' | '.join(types)} |", "|---" * (len(types) + 2) + "|"]
    for depth, test in sorted({(depth, test) for depth, test, _ in speed}, key=lambda pair: (pair[1], pair[0])):
        base = speed.get((depth, test, "f16"), 0.0)
        cells = [f"{speed[depth, test, t]:.1f}{f' ({speed[depth, test, t] / base:.2f})' if base else ''}" for t in types]
        lines.append(f"| {test} | {depth} | {' | '.join(cells)} |")
    return lines


def _number(value: object) -> int:
    return int(str(value or 0))


def machine(suite: Suite) -> str:
    """The GPU, its driver and the compiler, in words."""
    return toolkits.of_device(suite.device).about_machine() or f"CPU, {os.cpu_count()} cores"


def find_device() -> tuple[str, str]:
    """Preset and device of the GPU here.

    Raises:
        EnvironmentMissing: there is none.
    """
    for toolkit in toolkits.with_gpu():
        return toolkit.name, toolkit.device
    raise EnvironmentMissing("no GPU found (nvidia-smi, rocm_agent_enumerator)", "try the script itself with --device CPU --small")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}  [default: all]")
    parser.add_argument("--device", default="", help="CUDA0, ROCm0 or CPU  [default: the GPU here]")
    parser.add_argument("--preset", default="", help="what to build for, such as cuda-all-pairs  [default: by the device]")
    parser.add_argument("--out", type=Path, default=home() / "report" / "gpu-suite", help="results folder")
    parser.add_argument("--seconds", type=float, default=86400.0, help="time for all stages of this call")
    parser.add_argument("--again", action="store_true", help="repeat stages that ended")
    parser.add_argument("--small", action="store_true", help="few and small cases, to try the script")
    options = parser.parse_args(argv)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return options


def _run(options: argparse.Namespace) -> int:
    if options.device:
        options.preset = options.preset or options.device.rstrip("0123456789").lower()
    else:
        preset, options.device = find_device()
        options.preset = options.preset or preset
    presets.preset(options.preset)
    environment.settings_in_environment()  # variables that would measure something else
    suite = Suite(options)
    record = suite.out / "stages.jsonl"
    suite.out.mkdir(parents=True, exist_ok=True)
    stages = {} if options.again else load(record, suite.key)
    for name in options.stages or STAGES:
        if name in stages:
            print(f"{name}: {stages[name].status} before", file=sys.stderr)
        elif suite.deadline - time.monotonic() < SMALLEST_START:
            print(f"{name}: left for another call, the time is over", file=sys.stderr)
        else:
            stages[name] = run_stage(suite, name)
            with record.open("a", encoding="utf-8") as file:
                file.write(msgspec.json.encode(stages[name]).decode() + "\n")
        (suite.out / "summary.md").write_text(summary(suite, stages), encoding="utf-8")
    print(suite.out / "summary.md")
    ends = {stage.status for stage in stages.values()}
    return 4 if "error" in ends else 1 if "fail" in ends else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = _parse(argv)
    return exit_code(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
