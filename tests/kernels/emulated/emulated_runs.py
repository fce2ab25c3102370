"""Runs on the emulator that the tests and the report share: selections of test-backend-ops side by side, and perplexity."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TypeVar

import emulated_tools
import msgspec
from emulated_tools import Case

from turbo_gguf.codec import tables

SCALAR = tuple(t.name for t in tables.SCALAR)
TRELLIS = tuple(t.name for t in tables.TRELLIS)
HEAD_SIZES = ("64", "96", "128", "256")
BATCHES = ("1", "3", "32")

PARTNERS = ("f16", "q8_0", "bf16", "q5_0", "q4_0")
PAIRS = {*product(SCALAR, SCALAR), *product(SCALAR, PARTNERS), *product(PARTNERS, SCALAR)}
TRELLIS_PAIRS = {
    *((t, t) for t in TRELLIS),
    ("turbo4t", "turbo3t"),
    ("turbo3t", "turbo4t"),
    ("f16", "turbo2t"),
    ("turbo3t", "q8_0"),
    ("turbo4", "turbo4t"),
}
"""The default decode kernels but two of those with K in f16, and two pairs without one. All pairs would take longer than all else here."""

DIAGONAL = {(t, t) for t in (*SCALAR, *TRELLIS)}

CONTEXT, UBATCH = 128, 32  # one chunk of the tiny models; several queries at once, so that prefill runs, too


T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Cases of one operation whose parameters match a regular expression."""

    op: str
    pattern: str
    environment: tuple[tuple[str, str], ...] = ()
    timeout: float = 3600


@dataclass
class Outcome:
    """What a job gave: its cases, or why there are none; seconds by kernel."""

    cases: list[Case] = field(default_factory=list)
    error: str = ""
    seconds: float = 0
    kernels: dict[str, float] = field(default_factory=dict)


def attention(head_size: str, more: str, *environment: tuple[str, str], pairs: Iterable[tuple[str, str]] = PAIRS | TRELLIS_PAIRS) -> Job:
    """Cases of flash attention with types of ``pairs``; ``head_size`` of K and of V, "192-128"."""
    key, _, value = head_size.partition("-")
    types = "|".join(f"{type_k},type_V={type_v}" for type_k, type_v in sorted(pairs))
    return Job("FLASH_ATTN_EXT", rf"hsk={key},hsv={value or key},{more}.*type_K=({types}),", environment)


def two_segments(head_size: str, *environment: tuple[str, str], more: str = "") -> Job:
    """Cases of attention over two segments of keys, of all types or those that ``more`` lets pass."""
    key, _, value = head_size.partition("-")
    return Job("FLASH_ATTN_EXT", rf"hsk={key},hsv={value or key},rows={more}", environment)


SLICE = ("GGML_TURBO_CUDA_SLICE", "512")  # keys; otherwise the caches of these tests fit into one slice
MATRIX = ("GGML_TURBO_CUDA_DECODE", "mma")  # for the 4 columns of one query, too, which gfx1100 decodes without
WITHOUT_MATRIX = ("GGML_TURBO_CUDA_DECODE", "dp4a")  # for the 12 columns of three queries, too

SMALL = "nh=2,nr23=.4,1.,kv=113,"
SEVERAL_SLICES = "512,.*kv=1536,"

JOBS = {
    "SET_ROWS": Job("SET_ROWS", "turbo"),
    "GET_ROWS": Job("GET_ROWS", "turbo"),
    "CPY": Job("CPY", "turbo"),
    "CONT, DUP": Job("CONT,DUP", "turbo"),
    "decay": Job("MAP_CUSTOM1", "turbo"),
    **{f"attention, head size {size}": attention(size, SMALL) for size in HEAD_SIZES},
    **{f"attention by matrix instructions, head size {size}": attention(size, SMALL + "nb=1,", MATRIX) for size in ("64", "128")},
    "attention without matrix instructions": attention("128", SMALL + "nb=3,", WITHOUT_MATRIX, pairs=DIAGONAL),
    "attention, ALiBi, sinks, soft cap, sequences": attention("128", "nh=4,.*kv=256,"),
    "attention, slices, head size 64": attention("64", "nh=2,.*kv=(1536|1700),", SLICE),
    "attention, slices, head size 128": attention("128", "nh=.,.*kv=1536,", SLICE),
    "attention, two segments, head size 128": two_segments("128", more="(?!512)"),
    "attention, two segments in slices, head size 128": two_segments("128", SLICE, more=SEVERAL_SLICES + ".*type_K=(q8_0|turbo3|turbo3t),"),
}
"""What the tests run."""

MORE_JOBS = {
    **{f"attention, head size {size}": attention(size, SMALL) for size in ("192-128",)},
    **{f"attention, head size {size}": attention(size, "") for size in ("512", "576-512")},
    **{
        f"attention without matrix instructions, head size {size}": attention(size, SMALL + "nb=3,", WITHOUT_MATRIX)
        for size in ("64", "128")
    },
    **{f"attention, slices, head size {size}": attention(size, ".*kv=(1536|1700),", SLICE) for size in ("96", "192-128", "256")},
    **{f"attention, two segments, head size {size}": two_segments(size) for size in ("64", "96", "192-128", "256", "512", "576-512")},
    "attention, two segments in slices, head size 128, all types": two_segments("128", SLICE, more=SEVERAL_SLICES),
}
"""What only the report runs."""

UPSTREAM = Job(
    "FLASH_ATTN_EXT",
    "hsk=(64|128),hsv=(64|128),nh=4,nr23=.4,1.,kv=512,nb=(1|3|32),mask=1,sinks=0,max_bias=0.000000,logit_softcap=0.000000,prec=f32,"
    "type_K=f16,type_V=f16,permute=.0,1,2",
)
"""Upstream's vector, tile and WMMA kernels, which are known to be right."""

FAULTY = Job(
    "FLASH_ATTN_EXT", r"hsk=64,hsv=64,nh=2,.*kv=113,nb=[13],.*type_K=turbo(\d),type_V=turbo\1,", (("TURBO_EMULATOR_FAULT", "V_PERM_B32"),)
)
"""With an instruction that gives wrong results: these cases must fail."""


def run_job(job: Job, folder: Path) -> Outcome:
    """Run a job; ``folder`` gets its logs."""
    outcome, began = Outcome(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    launches = folder / "launches.txt"
    launches.unlink(missing_ok=True)
    try:
        outcome.cases = emulated_tools.backend_ops(
            job.op, job.pattern, folder, timeout=job.timeout, TURBO_EMULATOR_LOG=str(launches), **dict(job.environment)
        )
    except Exception as error:  # a job must not end the others
        outcome.error = str(error)
    outcome.seconds = time.monotonic() - began
    for name, seconds in launches_of(launches):
        outcome.kernels[name] = outcome.kernels.get(name, 0) + seconds
    return outcome


def launches_of(log: Path) -> list[tuple[str, float]]:
    """Kernel and seconds of each launch in a file that ``TURBO_EMULATOR_LOG`` named."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.split(" ", 1)[0], float(line.rsplit(" ", 1)[1])) for line in lines]


def run_jobs(jobs: Mapping[str, Job], folder: Path, *, workers: int | None = None, resume: bool = False) -> dict[str, Outcome]:
    """Run jobs, one per core or so many at once; :func:`kept` tells what ``resume`` does."""
    emulated_tools.build(), emulated_tools.runtime(), emulated_tools.modules()

    def run(name: str) -> Outcome:
        logs = folder / re.sub(r"\W+", "-", name)
        return kept(logs, repr(jobs[name]), lambda: run_job(jobs[name], logs), Outcome, resume=resume)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


def kept(folder: Path, what: str, make: Callable[[], T], kind: type[T], *, resume: bool) -> T:
    """What ``make`` gives, which is also written to a folder.

    With ``resume`` it is taken from there, if it is of the same code: what was asked for, the programs, and the emulator. An outcome with
    an error or a wrong case is not.
    """
    file = folder / "kept.json"
    mark = hashlib.sha256(f"{what} {_code()}".encode()).hexdigest()[:16]
    if resume and file.exists():
        found = msgspec.json.decode(file.read_bytes())
        if found["mark"] == mark:
            return msgspec.convert(found["result"], kind)
    result = make()
    if not isinstance(result, Outcome) or not (result.error or any(not case.ok for case in result.cases)):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode({"mark": mark, "result": result}))
    return result


@functools.cache
def _code() -> str:
    files = [*sorted(emulated_tools.build().glob("lib*.so")), *(emulated_tools.build() / name for name in emulated_tools.TARGETS)]
    files += sorted((emulated_tools.REPOSITORY / "dev" / "emulator").glob("*.py")) + sorted(emulated_tools.runtime().glob("lib*"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def perplexity(
    model: Path, cache_type: str, folder: Path, *, on_cpu: bool, ubatch: int = UBATCH, chunks: int = 2, **environment: str
) -> float:
    """Perplexity of a model over a text that lies beside it as ``text.txt``, on the emulated device or on the CPU.

    The folder gets the logs, ``launches.txt`` of the kernels among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    launches = folder / "launches.txt"
    launches.unlink(missing_ok=True)
    where = ["-dev", "none"] if on_cpu else ["-ngl", "99"]
    size = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-ub", str(ubatch), "--chunks", str(chunks)]
    cache = ["-fa", "on", "-ctk", cache_type, "-ctv", cache_type]
    command = ["llama-perplexity", "-m", str(model), "-f", str(model.parent / "text.txt"), *size, *cache]
    done = emulated_tools.emulated(*command, *where, cwd=folder, TURBO_EMULATOR_LOG=str(launches), **environment)
    found = re.findall(r"Final estimate: PPL = ([\d.]+)", done.out + done.err)
    if done.rc or not found:
        raise RuntimeError(f"llama-perplexity ended with {done.rc}\n{done.err[-3000:]}")
    return float(found[-1])
