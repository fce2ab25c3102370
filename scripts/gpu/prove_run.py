"""Run a packed proof on the machine with the GPU: all stages, each within its share of the time, into one results file.

    python3 prove_run.py [STAGE...] [--seconds 560] [--out FOLDER]

Standard library only. The results folder gets results.jsonl (a row as soon as it is known, so that nothing is lost when this is ended),
summary.md (written anew after each stage) and log.txt. Called again, it goes on with what is missing for the same programs and GPU.

Exit codes: 0 every stage passed or was skipped with a reason and no target is missed, 1 a stage failed or a target is missed, 3 no GPU or
a library is missing, 4 a program crashed or the time was over, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import prove_measures
import prove_stages
import prove_targets
from prove_machine import gpu_name, library_folders, missing_libraries
from prove_ops import LAUNCHES, VARIANTS, Times
from prove_stages import Proof

STAGES = {
    "ops": (prove_stages.ops, 75),
    "slices": (prove_stages.slices, 25),
    "perf": (prove_measures.perf, 130),
    "variants": (prove_measures.variants, 30),
    "bench": (prove_measures.bench, 100),
    "order": (prove_stages.order, 40),
    "sanitizers": (prove_stages.sanitizers, 80),
    "counters": (prove_measures.counters, 80),
}
"""Name -> function and share of the time, in the order in which they run. What a stage leaves over goes to the later ones."""

LEAST = 1.0
"""Seconds below which a stage is not begun."""

ENDED = ("pass", "fail", "skip")
"""Statuses of stages that are not repeated."""


class Ended(BaseException):
    """A signal asks us to end; its number."""


def load(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of earlier calls with the same programs on the same GPU; what a cut line says is lost."""
    rows, mine = [], False
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["kind"] == "machine":
            mine = row["key"] == key
        elif mine and row["kind"] != "verdict":
            rows.append(row)
    return rows


def stages_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """How each stage ended last."""
    return {row["name"]: row for row in rows if row["kind"] == "stage"}


def find_libraries(folder: Path) -> tuple[list[str], list[str]]:
    """Folders for LD_LIBRARY_PATH, and names of libraries that are in none of them."""
    files = [path for path in sorted((folder / "bin").iterdir()) if path.is_file()]
    folders = [str(folder / "bin")]
    folders += library_folders(missing_libraries(files, folders))
    return folders, missing_libraries(files, folders)


def run_stage(proof: Proof, name: str, seconds: float) -> None:
    """Run a stage and record how it ended, whatever happens in it."""
    started = time.monotonic()
    proof.deadline = started + seconds
    print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
    status, note = "error", "interrupted"
    try:
        status, note = STAGES[name][0](proof)
    except Exception as error:  # a fault of ours in one stage must not cost the others
        note = f"{type(error).__name__}: {error}"
    finally:
        for folder in (proof.folder, proof.out, proof.scratch):  # results are to be shown around
            note = note.replace(f"{folder}/", "")
        note = " ".join(note.replace("|", "/").split())
        took = round(time.monotonic() - started, 1)
        proof.record({"kind": "stage", "name": name, "status": status, "note": note, "seconds": took})
        print(f"{name}: {status} in {took} s: {note}", file=sys.stderr, flush=True)


def run(proof: Proof, names: Sequence[str], end: float, machine: Mapping[str, Any]) -> None:
    """Run stages that have not ended yet, until the time is over; the summary is up to date after each of them."""
    ended = stages_of(proof.rows)
    wanted = [name for name in names if name not in ended or ended[name]["status"] not in ENDED]
    shares = sum(STAGES[name][1] for name in wanted)
    begun = time.monotonic()
    planned = begun
    for name in wanted:
        planned += (end - begun) * STAGES[name][1] / shares
        seconds = planned - time.monotonic()
        if seconds < LEAST:
            print(f"{name}: left for another call, the time is over", file=sys.stderr)
            continue
        run_stage(proof, name, seconds)
        (proof.out / "summary.md").write_text(summary(proof, machine), encoding="utf-8")


def summary(proof: Proof, machine: Mapping[str, Any]) -> str:
    """summary.md: verdicts first, then how the stages ended, then tables."""
    times, done = Times(proof.rows), stages_of(proof.rows)
    found = prove_targets.verdicts(proof.rows, prove_measures.shapes(proof), machine["gpu"])
    lines = ["# Proof on a GPU", "", f"{machine['gpu'] or machine['device']}; {machine['about']}; key `{machine['key']}`.", ""]
    lines += [] if proof.on_gpu else ["This tries the proof on a CPU, where its targets mean nothing.", ""]
    lines += ["## Targets", "", *prove_targets.table(found), "", "## Stages", "", "| stage | | seconds | |", "|---|---|---|---|"]
    for name in STAGES:
        row = done.get(name)
        lines.append(f"| {name} | {row['status']} | {row['seconds']} | {row['note']} |" if row else f"| {name} | not run yet | | |")
    tables = {
        "Decode, one query: microseconds of a layer, in brackets the speed over f16": times.table("fattn", decode=True),
        "Several queries": times.table("fattn", decode=False),
        "Writing one row": times.table("set_rows", decode=True),
        "Writing the rows of a prompt": times.table("set_rows", decode=False),
        **{f"Decode with {name}": times.table("fattn", decode=True, variant=name) for name in VARIANTS},
        **{f"Writing one row with {name}": times.table("set_rows", decode=True, variant=name) for name in LAUNCHES},
        "llama-bench: tokens per second, in brackets over f16, and the peak of memory": prove_measures.bench_table(proof.rows),
        "Hardware counters": prove_measures.counters_table(proof.rows),
    }
    for title, table in tables.items():
        lines += ["", f"## {title}", "", *table] if table else []
    return "\n".join(lines) + "\n"


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(number)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}  [default: all]")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="the unpacked proof  [default: this file's]")
    parser.add_argument("--out", type=Path, default=Path("proof-results"), help="results folder")
    parser.add_argument("--model", type=Path, help="the embedded model  [default: the one that was packed]")
    parser.add_argument("--seconds", type=float, default=560.0, help="time for all stages of this call")
    parser.add_argument("--small", action="store_true", help="small shapes and few cases, to try the proof; so it is on a CPU")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    options = parser.parse_args(argv)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    end = time.monotonic()
    options = _parse(argv)
    end += options.seconds
    folder, out = options.folder.resolve(), options.out.resolve()
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    if options.again:
        for name in ("results.jsonl", "log.txt"):
            (out / name).unlink(missing_ok=True)
    device, gpu = plan["device"], gpu_name(plan["device"])
    small = options.small or device == "CPU"
    key = f"{plan['build']} {device} {gpu.partition(',')[0]}{' small' if small else ''}"
    machine = {"kind": "machine", "key": key, "device": device, "gpu": gpu, "about": plan["about"]}
    proof = Proof(folder, out, device=device, small=small, bits=plan["bits"], rows=load(out / "results.jsonl", key))
    if options.model is not None and not (folder / "model.gguf").exists():
        proof.model = options.model.resolve()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupted)
    code = None
    try:
        proof.record(machine)
        problem = _prepare(proof, folder)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 3
        run(proof, options.stages or list(STAGES), end, machine)
    except Ended as signalled:
        code = 128 + int(signalled.args[0])
    finally:
        found = prove_targets.verdicts(proof.rows, prove_measures.shapes(proof), gpu)
        for verdict in found:
            proof.record(verdict.row())
        (out / "summary.md").write_text(summary(proof, machine), encoding="utf-8")
        proof.close()
    print(out / "summary.md")
    statuses = {row["status"] for row in stages_of(proof.rows).values()}
    if code is not None:
        return code
    if "fail" in statuses or (proof.on_gpu and any(verdict.verdict == "missed" for verdict in found)):
        return 1
    names = options.stages or list(STAGES)
    return 4 if statuses & {"error", "partial"} or not stages_of(proof.rows).keys() >= set(names) else 0


def _prepare(proof: Proof, folder: Path) -> str:
    """Make the programs run here; returns what is missing."""
    libraries, missing = find_libraries(folder)
    proof.environment = {"LD_LIBRARY_PATH": ":".join(libraries), "LLAMA_CACHE": str(proof.scratch)}
    done = proof.run([proof.tool(prove_measures.PROGRAM), proof.device], seconds=60)
    if done.rc == 0:
        return ""
    lacking = f"; libraries not found: {', '.join(missing)}" if missing else ""
    return f"{proof.device} cannot be used: {done.words}{lacking}"


if __name__ == "__main__":
    sys.exit(main())
