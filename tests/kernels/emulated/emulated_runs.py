"""Runs on the emulator that the tests and the report share: selections of test-backend-ops side by side, and perplexity."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import backend_jobs
import emulated_tools
from backend_jobs import DIAGONAL, ROW_JOBS, SCALAR, SMALL, TRELLIS, Job, Outcome, measured, two_segments

HEAD_SIZES = ("64", "96", "128", "256")
WIDE = ("512", "576-512")
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

CONTEXT, UBATCH = 128, 32  # one chunk of the tiny models; several queries at once, so that prefill runs, too


attention = functools.partial(backend_jobs.attention, pairs=PAIRS | TRELLIS_PAIRS)

SLICE = ("GGML_TURBO_CUDA_SLICE", "512")  # keys; otherwise the caches of these tests fit into one slice
MATRIX = ("GGML_TURBO_CUDA_DECODE", "mma")  # for the 4 columns of one query, too, which gfx1100 decodes without
WITHOUT_MATRIX = ("GGML_TURBO_CUDA_DECODE", "dp4a")  # for the 12 columns of three queries, too

SEVERAL_SLICES = "512,.*kv=1536,"

JOBS = {
    **ROW_JOBS,
    **{f"attention, head size {size}": attention(size, SMALL) for size in HEAD_SIZES},
    **{f"attention by matrix instructions, head size {size}": attention(size, SMALL + "nb=1,", MATRIX) for size in ("64", "128")},
    **{f"attention, wide heads, {size}": attention(size, SMALL + "nb=3,", pairs={("turbo3",) * 2, ("turbo3t",) * 2}) for size in WIDE},
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
    **{f"attention, head size {size}": attention(size, "") for size in WIDE},
    **{
        f"attention without matrix instructions, head size {size}": attention(size, SMALL + "nb=3,", WITHOUT_MATRIX)
        for size in ("64", "128")
    },
    **{f"attention, slices, head size {size}": attention(size, ".*kv=(1536|1700),", SLICE) for size in ("96", "192-128", "256")},
    **{f"attention, two segments, head size {size}": two_segments(size) for size in ("64", "96", "192-128", "256", *WIDE)},
    "attention, two segments in slices, head size 128, all types": two_segments("128", SLICE, more=SEVERAL_SLICES),
}
"""What only the report runs."""

UPSTREAM = backend_jobs.upstream("f16")
"""Upstream's vector, tile and WMMA kernels, which are known to be right."""

FAULTY = Job(
    "FLASH_ATTN_EXT", r"hsk=64,hsv=64,nh=2,.*kv=113,nb=[13],.*type_K=turbo(\d),type_V=turbo\1,", (("TURBO_EMULATOR_FAULT", "V_PERM_B32"),)
)
"""With an instruction that gives wrong results: these cases must fail."""


def run_job(job: Job, folder: Path) -> Outcome:
    """Run a job; ``folder`` gets its logs."""
    folder.mkdir(parents=True, exist_ok=True)
    launches = folder / "launches.txt"
    launches.unlink(missing_ok=True)
    environment = {"TURBO_EMULATOR_LOG": str(launches), **dict(job.environment)}
    outcome = measured(lambda: emulated_tools.backend_ops(job.op, job.pattern, folder, timeout=job.timeout, **environment))
    for name, seconds in launches_of(launches):
        outcome.kernels[name] = outcome.kernels.get(name, 0) + seconds
    return outcome


def launches_of(log: Path) -> list[tuple[str, float]]:
    """Kernel and seconds of each launch in a file that ``TURBO_EMULATOR_LOG`` named."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.split(" ", 1)[0], float(line.rsplit(" ", 1)[1])) for line in lines]


def run_jobs(jobs: Mapping[str, Job], folder: Path, *, workers: int | None = None, resume: bool = False) -> dict[str, Outcome]:
    """Run jobs on the emulator, one per core or so many at once."""
    return backend_jobs.run_jobs(jobs, run_job, folder, code=code(), workers=workers, resume=resume)


@functools.cache
def code() -> str:
    """A hash of all that decides what a run gives: programs, the stand-in for the runtime, and the emulator."""
    build, runtime = emulated_tools.build(), emulated_tools.runtime()
    emulated_tools.modules()
    files = [*sorted(build.glob("lib*.so")), *(build / name for name in emulated_tools.TARGETS)]
    files += sorted((emulated_tools.REPOSITORY / "dev" / "emulator").glob("*.py")) + sorted(runtime.glob("lib*"))
    return backend_jobs.code_of(files)


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
