"""The stages of a proof that check results: ops against the CPU, slices, sanitizers, the order of launches.

Those that measure are in prove_measures.py. A stage is a function of the proof that returns a status and a note. It records a row as soon
as it knows something, looks at earlier rows before it does anything, and ends when its time is over.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prove_machine import Done, ask, find_tool, run
from prove_ops import VARIANTS

Words = tuple[str, str]
"""Status ("pass", "fail", "skip", "partial" when the time was over, "error" when a program crashed) and note."""


class Proof:
    """What a stage works with: programs, the device, earlier rows, and the time that is left."""

    def __init__(self, folder: Path, out: Path, *, device: str, small: bool, bits: Mapping[str, float], rows: list[dict[str, Any]]) -> None:
        self.folder, self.out, self.device, self.small, self.rows = folder, out, device, small, rows
        self.bits = bits  # of a value, by cache type
        self.model: Path | None = None  # instead of the one that was packed
        self.deadline = float("inf")  # of the stage that runs; there is none before the first
        self.environment: dict[str, str] = {}  # for all programs
        self.scratch = Path(tempfile.mkdtemp(prefix="proof-"))  # large files, which are no results
        self._results = (out / "results.jsonl").open("a", encoding="utf-8")
        self._log = (out / "log.txt").open("a", encoding="utf-8")

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device != "CPU"

    def record(self, row: dict[str, Any]) -> None:
        """Keep a row; it is in the results file when this returns."""
        self.rows.append(row)
        self._results.write(json.dumps(row) + "\n")
        self._results.flush()

    def tool(self, name: str) -> Path:
        """A program that was packed."""
        return self.folder / "bin" / name

    def left(self) -> float:
        """Seconds that the stage may still take."""
        return self.deadline - time.monotonic()

    def run(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        stdin: str = "",
        on_line: Callable[[str], None] | None = None,
        seconds: float = float("inf"),
    ) -> Done:
        """Run a program within the stage's time, or less."""
        return run(
            argv, seconds=min(seconds, self.left()), log=self._log, env={**self.environment, **(env or {})}, stdin=stdin, on_line=on_line
        )

    def close(self) -> None:
        """Close the files, and remove those that are no results."""
        self._results.close()
        self._log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


# --- test-backend-ops -----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Cases of test-backend-ops that are run together."""

    name: str
    ops: str
    pattern: str
    env: Mapping[str, str] = {}


_PAIRS = r"type_K=(turbo3|turbo3t|turbo4t|f16|q8_0),type_V=(turbo3|turbo3t|turbo4|turbo4t),"
_COLUMNS = r"kv=300,.*type_V=turbo"
_COPIES = "SET_ROWS,GET_ROWS,CPY,CONT,DUP,MAP_CUSTOM1"
SLICED = {"GGML_TURBO_CUDA_SLICE": "512"}

OPS = (
    Part("1 to 16 query heads, 1 to 16 queries", "FLASH_ATTN_EXT", rf"hsk=(64|128|256),.*{_COLUMNS}"),
    Part("decode and prefill", "FLASH_ATTN_EXT", rf"hsk=(64|128|256),hsv=\d+,nh=\d+,nr23=\[\d+,\d+\],kv=(?!300,).*{_PAIRS}"),
    Part("writes, reads, copies", _COPIES, r"type(_dst|_src)?=turbo(3|4|3t|4t),"),
    Part("exact tokens", "FLASH_ATTN_EXT", r"hsk=128,hsv=128,rows=.*type_K=(turbo3|turbo3t|f16|q8_0),"),
    Part("other head sizes", "FLASH_ATTN_EXT", r"hsk=(96|192|512|576),hsv=\d+,nh=.*type_K=(turbo3|turbo3t),type_V=(turbo3|turbo3t),"),
)
SMALL_OPS = (
    Part("1 to 16 query heads, 1 to 16 queries", "FLASH_ATTN_EXT", rf"hsk=64,.*{_COLUMNS}3,"),
    Part("decode and prefill", "FLASH_ATTN_EXT", r"hsk=64,.*kv=113,nb=(1|3),.*type_K=turbo3,type_V=turbo3,"),
    Part("writes, reads, copies", _COPIES, r"type(_dst)?=turbo3,.*ne=\[32,"),
    Part("exact tokens", "FLASH_ATTN_EXT", r"hsk=64,hsv=64,rows=32,.*type_K=turbo3,"),
)
SLICES = (Part("slices", "FLASH_ATTN_EXT", r"kv=(1536|1700),.*turbo", SLICED),)
SMALL_SLICES = (Part("slices", "FLASH_ATTN_EXT", r"hsk=64,.*kv=1536,.*type_K=turbo3,type_V=turbo3,", SLICED),)

_RESULT = re.compile(r"(\w+\(.*\)):.*?\b(OK|FAIL|not supported)\b")


class Count:
    """What test-backend-ops said so far."""

    def __init__(self) -> None:
        self.passed, self.refused = 0, 0
        self.failed: list[str] = []

    def __call__(self, line: str) -> None:
        """Take a line of its output."""
        match = _RESULT.search(line)
        if match and match[2] == "OK":
            self.passed += 1
        elif match and match[2] == "FAIL":
            self.failed.append(match[1])
        elif match:
            self.refused += 1

    @property
    def note(self) -> str:
        """In words."""
        return f"{self.passed} passed, {len(self.failed)} failed, {self.refused} not supported"

    def words(self, done: Done) -> Words:
        """Status and note of a run."""
        note = self.note
        if self.failed:
            return "fail", "; ".join([note, *self.failed[:3]])
        if done.late:
            return "partial", f"{note}, then the time was over"
        if done.rc != 0 or self.passed == 0:
            return "error", f"{note}, {done.words}"
        return "pass", note


def _cases(proof: Proof, part: Part, prefix: Sequence[str] = (), seconds: float = float("inf")) -> tuple[Count, Done]:
    count = Count()
    argv = [*prefix, proof.tool("test-backend-ops"), "test", "-b", proof.device, "-o", part.ops, "-p", part.pattern]
    return count, proof.run(argv, part.env, on_line=count, seconds=seconds)


def _parts(proof: Proof, stage: str, parts: Sequence[Part]) -> Words:
    known = {row["part"]: row for row in proof.rows if row["kind"] == "cases" and row["stage"] == stage}
    found: list[tuple[str, Words]] = []
    for part in parts:
        old = known.get(part.name)
        if old is not None and old["status"] in ("pass", "fail"):
            words = old["status"], old["note"]
        elif proof.left() < 1:
            words = "partial", "not begun"
        else:
            rest = len(parts) - len(found)
            count, done = _cases(proof, part, seconds=proof.left() / min(rest, 2))  # one that hangs leaves time for the others
            words = count.words(done)
            proof.record({"kind": "cases", "stage": stage, "part": part.name, "status": words[0], "note": words[1]})
        found.append((part.name, words))
    return _together(found)


def _together(found: Sequence[tuple[str, Words]]) -> Words:
    """The worst status of parts, and all notes."""
    worst = ("fail", "error", "partial", "pass", "skip")
    status = min((words[0] for _, words in found), key=worst.index)
    return status, "; ".join(f"{name}: {'' if words[0] == 'pass' else words[0] + ', '}{words[1]}" for name, words in found)


def ops(proof: Proof) -> Words:
    """Ops of a turbo cache against the CPU."""
    return _parts(proof, "ops", SMALL_OPS if proof.small else OPS)


def slices(proof: Proof) -> Words:
    """Prefill over caches of several slices, which the caches of the other cases do not reach."""
    return _parts(proof, "slices", SMALL_SLICES if proof.small else SLICES)


# --- sanitizers -----------------------------------------------------------------------------------------------------------------

FAMILIES = {
    "writing, scalar": r"type_src=f32,type_dst=turbo3,type_idx=i64,ne=\[1024,11,2,7\],nr23=\[2,3\],r=7,v=0",
    "writing, trellis": r"type_src=f32,type_dst=turbo3t,type_idx=i64,ne=\[1024,11,2,7\],nr23=\[2,3\],r=7,v=0",
    "writing, few rows of trellis": r"type_src=f32,type_dst=turbo3t,type_idx=i64,ne=\[256,5,1,3\],nr23=\[1,1\],r=3,v=0",
    "reading rows": r"type=turbo4t,n=256,m=5,r=4,be1=7,be2=1,v=0,.*",
    "copying": r"type_src=turbo3,type_dst=turbo3,ne_src=\[256,2,3,4\],.*",
    "decode, scalar": r"hsk=128,hsv=128,nh=2,nr23=\[4,1\],kv=113,nb=3,.*type_K=turbo3,type_V=turbo3,.*",
    "decode, trellis": r"hsk=128,hsv=128,nh=2,nr23=\[4,1\],kv=113,nb=1,.*type_K=turbo4t,type_V=turbo4t,.*",
    "decode, f16 with exact tokens": r"hsk=128,hsv=128,rows=75,kind=0,nh=2,.*nb=1,type_K=f16,type_V=turbo4t,.*",
    "decode, trellis with exact tokens": r"hsk=64,hsv=64,rows=75,kind=0,nh=2,.*nb=1,type_K=turbo3t,type_V=turbo3t,.*",
    "decode, 16 query heads": r"hsk=128,hsv=128,nh=2,nr23=\[16,1\],kv=300,nb=1,.*type_K=turbo3,type_V=turbo3,.*",
    "decode, K without matrix instructions": r"hsk=128,hsv=128,nh=2,nr23=\[8,1\],kv=300,nb=1,.*type_K=q8_0,type_V=turbo4,.*",
    "decode, wide heads": r"hsk=512,hsv=512,nh=2,nr23=\[4,1\],kv=113,nb=3,.*type_K=turbo3,type_V=turbo3,.*",
    "prefill with exact tokens": r"hsk=64,hsv=64,rows=256,kind=0,nh=2,.*nb=40,type_K=turbo3,type_V=turbo4,.*",
    "prefill in slices": r"hsk=64,hsv=64,nh=2,nr23=\[4,2\],kv=1536,nb=20,.*type_K=turbo3,type_V=turbo3,.*",
}
"""One case of test-backend-ops for each family of our kernels."""
SANITIZED = Part("one case per family", "SET_ROWS,GET_ROWS,CPY,FLASH_ATTN_EXT", f"^({'|'.join(FAMILIES.values())})$", SLICED)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
_UNFIT = re.compile(
    r".*(Device not supported|not supported on this|Unable to find|LibraryNotLoaded|ERR_NVGPUCTRPERM|permission)", re.IGNORECASE
)


def unfit(done: Done) -> str:
    """What a tool of NVIDIA's says where it can't work on this machine, "" where it can."""
    return next((line.strip()[:200] for line in done.lines if _UNFIT.match(line)), "")


def sanitizers(proof: Proof) -> Words:
    """No access out of bounds, no race on shared memory, no barrier that some threads miss: one case per family of kernels."""
    program = find_tool("compute-sanitizer")
    if not proof.device.startswith("CUDA") or not program:
        return "skip", "needs an NVIDIA GPU and compute-sanitizer"
    said = ask(program, "--help")
    # only our kernels: upstream's and cuBLAS' are not ours to check, and each takes 10 to 100 times as long
    only = next(([option, "kns=turbo"] for option in ("--kernel-name", "--kernel-regex", "--filter") if option in said), [])  # by version
    known = {row["tool"]: row for row in proof.rows if row["kind"] == "sanitizer" and row["status"] in ("pass", "fail", "skip")}
    found: list[tuple[str, Words]] = []
    for tool in SANITIZERS:
        if tool in known:
            found.append((tool, (known[tool]["status"], known[tool]["note"])))
            continue
        if proof.left() < 5:
            found.append((tool, ("partial", "not begun")))
            continue
        share = proof.left() / (len(SANITIZERS) - len(found))
        words = _sanitizer(proof, [program, "--tool", tool, *only, "--error-exitcode", "9"], share)
        proof.record({"kind": "sanitizer", "tool": tool, "status": words[0], "note": words[1]})
        found.append((tool, words))
    return _together(found)


def _sanitizer(proof: Proof, command: Sequence[str], seconds: float) -> Words:
    count, done = _cases(proof, SANITIZED, command, seconds)
    summary = [line.strip("= \n") for line in done.lines if "SUMMARY:" in line][-1:]
    if summary and "SUMMARY: 0 " not in summary[0]:
        return "fail", f"{count.note}, {summary[0]}"
    status, note = count.words(done)
    if status == "error" and unfit(done):
        return "skip", unfit(done)
    return status, ", ".join([note, *summary])


# --- order ----------------------------------------------------------------------------------------------------------------------

ORDER_TYPES = ("turbo3", "turbo3t")
ORDERS: dict[str, dict[str, str]] = {
    "as it is": {},
    "no graphs": VARIANTS["no graphs"],
    "no PDL": VARIANTS["no PDL"],
    "serial": {"CUDA_LAUNCH_BLOCKING": "1", "AMD_SERIALIZE_KERNEL": "3"},
}
ON_CPU = "on the CPU"
CPU_TOLERANCE = 0.01
"""Relative difference of the perplexity on the GPU from that on the CPU, which is another arithmetic."""


def order(proof: Proof) -> Words:
    """The same perplexity however kernels are launched, token by token, so that graphs are used; and nearly that of the CPU."""
    model = proof.folder / "model.gguf" if proof.model is None else proof.model
    if not model.exists():
        return "skip", "needs the embedded model of the repository, which was not packed: --model"
    size = ["-c", "128", "--chunks", "1"] if proof.small else ["-c", "512", "--chunks", "1"]
    common = [
        proof.tool("llama-perplexity"),
        "-m",
        model,
        "-f",
        proof.folder / "text.txt",
        *size,
        "-b",
        "1",
        "-ub",
        "1",
    ]
    known = {(row["types"], row["variant"]): row["perplexity"] for row in proof.rows if row["kind"] == "order"}
    notes = [f"perplexity {' / '.join([*ORDERS, ON_CPU])}"]
    status = "pass"
    for types in ORDER_TYPES:
        for variant in (*ORDERS, ON_CPU):
            if (types, variant) in known:
                continue
            place = ["-ngl", "999"] if proof.on_gpu and variant != ON_CPU else ["-dev", "none"] if proof.on_gpu else []
            done = proof.run([*common, *place, "-fa", "on", "-ctk", types, "-ctv", types], ORDERS.get(variant, {}))
            match = re.search(r"Final estimate: PPL = ([\d.]+)", "".join(done.lines))
            if done.late:
                return "partial", f"{types}, {variant}: the time was over"
            if done.rc != 0 or match is None:
                return "error", f"{types}, {variant}: {done.words}"
            known[types, variant] = float(match[1])
            proof.record({"kind": "order", "types": types, "variant": variant, "perplexity": float(match[1])})
        notes.append(f"{types} {' / '.join(str(known[types, variant]) for variant in (*ORDERS, ON_CPU))}")
        same = {known[types, variant] for variant in ORDERS}
        if len(same) > 1 or abs(known[types, ON_CPU] / known[types, "as it is"] - 1) > CPU_TOLERANCE:
            status = "fail"
    return status, "; ".join(notes)
