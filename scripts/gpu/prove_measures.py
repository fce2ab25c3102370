"""The stages of a proof that measure: single ops, what is switched off, llama-bench at depth with peak memory, hardware counters."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import prove_model
from prove_machine import Done, MemoryPeak, find_tool
from prove_ops import FULL, RIVALS, SMALL, TURBO, VARIANTS, Case, Shapes, case_of, cases, row, variant_cases
from prove_stages import Proof, Words, unfit

PROGRAM = "test-turbo-perf"
MAX_CRASHES = 3
"""Cases that may crash before the device is held to be lost."""


def shapes(proof: Proof) -> Shapes:
    """Sizes of this proof."""
    return SMALL if proof.small else FULL


def _rounds(proof: Proof, wanted: Sequence[Case], env: dict[str, str] | None) -> tuple[int, Done]:
    """Time cases, each of which is recorded when it comes; returns how many came, which may be less than all."""
    coming = iter(wanted)
    before = len(proof.rows)

    def take(line: str) -> None:
        if line.startswith("{") and line.endswith("}\n"):  # whole, also when the program was ended in the middle of one
            proof.record(row(next(coming), line))

    argv = [proof.tool(PROGRAM), proof.device, "0.02" if proof.small else "0.15"]
    done = proof.run(argv, env, stdin="".join(f"{case.line}\n" for case in wanted), on_line=take)
    return len(proof.rows) - before, done


def _measure(proof: Proof, wanted: Sequence[Case], env: dict[str, str] | None = None) -> Words:
    """Time cases that have no row yet. One that crashes is noted, and the others follow."""
    known = {case_of(found) for found in proof.rows if found["kind"] == "op"}
    left = [case for case in wanted if case not in known]
    crashes = 0
    while left:
        count, done = _rounds(proof, left, env)
        left = left[count:]
        if left and (done.late or proof.left() < 1):
            return "partial", f"{len(wanted) - len(left)} of {len(wanted)} cases, then the time was over"
        if left:
            case, left, crashes = left[0], left[1:], crashes + 1
            proof.record({"kind": "op", **case._asdict(), "us": 0.0, "us_min": 0.0, "us_max": 0.0, "bytes": 0, "status": "crashed"})
            if crashes == MAX_CRASHES:
                return "error", f"{crashes} crashes, the last one at {case.line}: {done.words}"
    chosen = set(wanted)
    crashed = [case_of(found) for found in proof.rows if found["kind"] == "op" and found["status"] == "crashed"]
    crashed = [case for case in crashed if case in chosen]
    if crashed:
        return "error", f"{len(crashed)} of {len(wanted)} cases crashed: {crashed[0].line}"
    return "pass", f"{len(wanted)} cases"


def perf(proof: Proof) -> Words:
    """Times of single ops; the targets are held against them."""
    return _measure(proof, list(cases(shapes(proof))))


def variants(proof: Proof) -> Words:
    """Ops with PDL, graphs, or matrix instructions off."""
    found = [(variant, _measure(proof, list(variant_cases(shapes(proof), variant)), env)) for variant, env in VARIANTS.items()]
    worst = next((words for _, words in found if words[0] != "pass"), None)
    return worst or ("pass", f"{len(found)} variants")


# --- llama-bench ----------------------------------------------------------------------------------------------------------------

BENCH_TYPES = (*RIVALS, *TURBO)


def bench(proof: Proof) -> Words:
    """llama-bench at two depths, and the peak of memory meanwhile."""
    model = proof.scratch / "random.gguf"
    layers, kv_heads, gqa, feed_forward = (2, 2, 2, 256) if proof.small else (4, 8, 4, 14336)
    depths = (64, 256) if proof.small else (4096, 32768)
    tests = ["-p", "16", "-n", "4", "-r", "1"] if proof.small else ["-p", "512", "-n", "32", "-r", "2"]
    known = {(found["types"], found["depth"]) for found in proof.rows if found["kind"] == "bench"}
    wanted = [(types, depth) for depth in reversed(depths) for types in BENCH_TYPES]
    problems = []
    try:
        prove_model.write(model, layers=layers, kv_heads=kv_heads, gqa=gqa, feed_forward=feed_forward)
        for types, depth in wanted:
            if (types, depth) in known:
                continue
            if proof.left() < 2:
                return "partial", f"no time for {types} at depth {depth}"
            values = 2 * layers * kv_heads * prove_model.HEAD * depth
            problem = _bench(proof, types, depth, ["-m", str(model), *tests], values)
            if problem:
                problems.append(problem)
    finally:
        model.unlink(missing_ok=True)
    return ("error", "; ".join(problems)) if problems else ("pass", f"{len(wanted)} runs")


def _bench(proof: Proof, types: str, depth: int, options: Sequence[str], values: int) -> str:
    place = ["-ngl", "999"] if proof.on_gpu else []
    argv = [proof.tool("llama-bench"), *options, "-d", str(depth), "-ctk", types, "-ctv", types, "-fa", "on", "-o", "jsonl", *place]
    with MemoryPeak(proof.device) as peak:
        done = proof.run(argv)
    found = [json.loads(line) for line in done.lines if line.startswith("{")]
    if done.late or done.rc != 0 or len(found) != 2:
        return f"{types} at depth {depth}: {'the time was over' if done.late else done.words}"
    for said in found:
        test = "prefill" if said["n_prompt"] else "decode"
        speed = {"tokens_per_s": said["avg_ts"], "spread": said["stddev_ts"]}
        memory = {"peak_mib": peak.megabytes, "cache_mib": round(values * proof.bits[types] / 8 / (1 << 20), 3)}
        proof.record({"kind": "bench", "types": types, "depth": depth, "test": test, **speed, **memory})
    return ""


# --- hardware counters ----------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """A kernel whose counters are read: the one that a pattern names, in a case of test-turbo-perf."""

    name: str
    kernel: str
    case: Case


_DECODE = "turbo_attn_decode"
COUNTED = (
    Counted("decode turbo3, GQA 8", _DECODE, Case("fattn", "turbo3", 128, 8, 1, 65536)),
    Counted("decode turbo3, GQA 16", _DECODE, Case("fattn", "turbo3", 128, 16, 1, 65536)),
    Counted("decode turbo3t, GQA 8", _DECODE, Case("fattn", "turbo3t", 128, 8, 1, 65536)),
    Counted("decode turbo4t, GQA 8", _DECODE, Case("fattn", "turbo4t", 128, 8, 1, 65536)),
    Counted("decode f16 of upstream, GQA 8", "flash_attn", Case("fattn", "f16", 128, 8, 1, 65536)),
    Counted("writing a row of turbo3t", "turbo_quantize_few", Case("set_rows", "turbo3t", 128, 1, 1, 8192)),
    Counted("unpacking turbo3 for a prompt", "turbo_unpack_keys", Case("fattn", "turbo3", 128, 4, 512, 32768)),
    Counted("merging slices of a prompt", "turbo_attn_merge_slice", Case("fattn", "turbo3", 128, 4, 512, 32768)),
)
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
SHOWN = ("Duration", "Compute (SM) Throughput", "DRAM Throughput", "Executed Ipc Active", "Issued Instructions", "Achieved Occupancy")


def counters(proof: Proof) -> Words:
    """Hardware counters of eight kernels, read by ncu."""
    program = find_tool("ncu")
    if not proof.device.startswith("CUDA") or not program:
        return "skip", "needs an NVIDIA GPU and ncu"
    known = {found["name"] for found in proof.rows if found["kind"] == "counters"}
    # the first launches allocate; clocks are left as they are; a captured graph would be one kernel
    start = [program, "--clock-control", "none", "--launch-skip", "2", "--launch-count", "1", "--kill", "yes", "--csv", "--page", "details"]
    start += [part for section in SECTIONS for part in ("--section", section)]
    failed = []
    for counted in COUNTED:
        if counted.name in known:
            continue
        if proof.left() < 3:
            return "partial", f"no time for {counted.name}"
        argv = [*start, "--kernel-name", f"regex:{counted.kernel}", proof.tool(PROGRAM), proof.device, "0.01"]
        done = proof.run(argv, VARIANTS["no graphs"], stdin=f"{counted.case.line}\n", seconds=30)
        values = metrics(done.lines)
        if values:
            proof.record({"kind": "counters", "name": counted.name, "metrics": values})
            known.add(counted.name)
        elif unfit(done) and not known:
            return "skip", unfit(done)
        else:
            failed.append(f"{counted.name}: {'the time was over' if done.late else done.words}")
    return ("error", "; ".join(failed)) if failed else ("pass", f"{len(known)} kernels")


def metrics(lines: Sequence[str]) -> dict[str, str]:
    """Name -> value and unit, of the table that ncu prints among other lines."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found: dict[str, str] = {}
    for entry in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if entry.get("Metric Name"):
            found.setdefault("Kernel", (entry.get("Kernel Name") or "").partition("(")[0])
            found[entry["Metric Name"]] = f"{entry.get('Metric Value') or ''} {entry.get('Metric Unit') or ''}".strip()
    return found


def bench_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: tokens per second, in brackets against f16 at the same depth, and the peak of memory."""
    found = {(said["test"], said["depth"], said["types"]): said for said in rows if said["kind"] == "bench"}
    if not found:
        return []
    present = [types for types in BENCH_TYPES if any(key[2] == types for key in found)]
    lines = [f"| test | depth | {' | '.join(present)} |", "|---" * (len(present) + 2) + "|"]
    for test, depth in sorted({key[:2] for key in found}):
        base = found.get((test, depth, "f16"))
        cells = []
        for types in present:
            said = found.get((test, depth, types))
            ratio = f" ({said['tokens_per_s'] / base['tokens_per_s']:.2f})" if said and base else ""
            peak = f", {said['peak_mib']} MiB" if said and said["peak_mib"] is not None else ""
            cells.append(f"{said['tokens_per_s']:.1f}{ratio}{peak}" if said else "")
        lines.append(f"| {test} | {depth} | {' | '.join(cells)} |")
    return lines


def counters_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a line per kernel."""
    found = [said for said in rows if said["kind"] == "counters"]
    if not found:
        return []
    lines = [f"| kernel | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    return [*lines, *(f"| {said['name']} | {' | '.join(said['metrics'].get(name, '') for name in SHOWN)} |" for said in found)]
