"""Runs on lavapipe that the tests and the report share: selections of test-backend-ops, perplexity and KL divergence, a broken table."""

from __future__ import annotations

import functools
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import backend_jobs
import lavapipe_tools
from backend_jobs import DIAGONAL, ROW_JOBS, SMALL, TURBO, Job, Outcome, attention, measured, two_segments
from gpu_root_tools import Done

from turbo_gguf.assets import home
from turbo_gguf.codec import tables

PARTNERS = ("f16", "bf16", "q8_0", "q5_0", "q4_0")
LARGER = ("96", "128", "192-128", "256", "512", "576-512")
"""Head sizes beside 64."""

MIXED = {("turbo4", "turbo3"), ("q8_0", "turbo2"), ("turbo3t", "f16")}
ALL_PAIRS = {pair for pair in product((*TURBO, *PARTNERS), repeat=2) if set(pair) & set(TURBO)}

SOME = {(t, t) for t in ("turbo3", "turbo4t")}
ONE = {("turbo3", "turbo3")}

JOBS = {
    **ROW_JOBS,
    "attention, head size 64": attention("64", SMALL + "nb=(1|32),", pairs=DIAGONAL),
    "attention, head size 128": attention("128", SMALL + "nb=1,", pairs=MIXED),
    "attention, ALiBi, sinks, soft cap, sequences": attention("128", "nh=4,.*kv=256,", pairs=ONE),
    "attention, columns": attention("64", "nh=2,nr23=.(5|16),1.,kv=300,nb=(1|16),", pairs=ONE),
    "attention, two segments": two_segments("64", more="75,.*type_K=(q8_0|turbo3t?),"),
}
"""What the tests run. Shaders are compiled for each pair, head size and kind of batch; those of head size 64 take the least time."""

SIZES = {
    **{f"attention, head size {size}, two types": attention(size, SMALL + "nb=(1|32),", pairs=SOME) for size in ("96", "128")},
    **{f"attention, head size {size}, one type": attention(size, SMALL + "nb=1,", pairs=ONE) for size in ("192-128", "192", "256")},
}
"""What every report runs, too: larger shaders as users have them. lavapipe compiles each for a minute or two."""

ROLLED_JOBS = {
    **{f"attention, head size {size}, all types": attention(size, SMALL + "nb=1,", pairs=DIAGONAL) for size in (*LARGER, "192")},
    **{f"attention, two segments, head size {size}": two_segments(size, more="75,kind=0,.*type_K=turbo3,") for size in LARGER},
}
"""What the tests run with :func:`rolled_library`."""

MORE_JOBS = {
    "attention, head size 64, all pairs": attention("64", SMALL, pairs=ALL_PAIRS),
    **{f"attention, head size {size}, all types": attention(size, SMALL, pairs=DIAGONAL | MIXED) for size in (*LARGER, "192")},
    "attention, ALiBi, sinks, soft cap, sequences, all types": attention("128", "nh=4,.*kv=256,", pairs=DIAGONAL),
    **{
        f"attention, head size {size}, columns": attention(size, "nh=2,.*kv=300,", pairs=SOME)
        for size in ("64", "128", "256", "512", "576-512")
    },
    **{f"attention, head size {size}, many keys": attention(size, ".*kv=(1536|1700),", pairs=ALL_PAIRS) for size in ("64", "128", "256")},
    "attention, two segments, all types": two_segments("64"),
    **{f"attention, two segments, head size {size}": two_segments(size, more=".*type_K=(q8_0|turbo3t?),") for size in LARGER},
}
"""What only a whole report runs, with :func:`rolled_library`. Types and sizes are constants of one shader: not all need to meet."""

UPSTREAM = backend_jobs.upstream("f16|q8_0")
"""Upstream's shaders, which show that the driver is right."""

VALIDATED = {
    "SET_ROWS": Job("SET_ROWS", r"type_dst=turbo.*ne=.(96|192|1024),"),
    "GET_ROWS, CPY": Job("GET_ROWS,CPY", "turbo.*"),
    "decay": Job("MAP_CUSTOM1", "turbo.*rows=7,"),
    "attention": attention("64", SMALL + "nb=(1|32),", pairs=SOME),
    "attention, two segments": two_segments("64", more="75,kind=0,.*type_K=(turbo3|turbo3t),"),
}
"""What runs under the validation layers."""

FAULTY = Job("FLASH_ATTN_EXT", r"hsk=64,hsv=64,nh=2,.*kv=113,nb=[13],.*type_K=turbo3t,type_V=turbo3t,")
"""With a broken table these cases must fail."""


# --- test-backend-ops -----------------------------------------------------------------------------------------------------


def run_job(job: Job, folder: Path, **more: str) -> Outcome:
    """Run a job; ``folder`` gets its logs."""
    environment = {**dict(job.environment), **more}
    return measured(lambda: lavapipe_tools.backend_ops(job.op, job.pattern, folder, timeout=job.timeout, **environment))


def run_validated(job: Job, folder: Path) -> Outcome:
    """Run a job under the validation layers: what they say is an error."""
    (folder / "validation.txt").unlink(missing_ok=True)
    outcome = run_job(job, folder, **lavapipe_tools.validated(folder))
    said = [] if outcome.error else lavapipe_tools.messages(folder)
    if said:
        outcome.error = f"the validation layers said in {folder / 'validation.txt'}: {said[0][:500]}"
    return outcome


def rolled() -> Callable[[Job, Path], Outcome]:
    """What runs a job with :func:`rolled_library`."""
    return functools.partial(run_job, GGML_BACKEND_PATH=str(rolled_library()))


def run_jobs(
    jobs: Mapping[str, Job],
    folder: Path,
    *,
    run: Callable[[Job, Path], Outcome] = run_job,
    workers: int | None = None,
    resume: bool = False,
) -> dict[str, Outcome]:
    """Run jobs, one per core or so many at once; ``run`` is one of those above."""
    return backend_jobs.run_jobs(jobs, run, folder, code=code(), workers=workers, resume=resume)


@functools.cache
def code() -> str:
    """A hash of the library, in which the shaders are, and of the programs."""
    programs = lavapipe_tools.programs()
    files = [lavapipe_tools.library(), *sorted(programs.glob("lib*.so")), *(programs / name for name in lavapipe_tools.TARGETS)]
    return backend_jobs.code_of(files)


# --- changed libraries ----------------------------------------------------------------------------------------------------


def words(levels: Sequence[int]) -> list[bytes]:
    """Levels as shaders have them: four in a word, the first one lowest."""
    return [struct.pack("<4b", *levels[i : i + 4]) for i in range(0, len(levels), 4)]


OP_CONSTANT = struct.pack("<I", 4 << 16 | 43)
"""First word of SPIR-V's OpConstant of 32 bits; its type, its id and its value follow."""

OP_LOOP_MERGE = struct.pack("<I", 4 << 16 | 246)
"""First word of SPIR-V's OpLoopMerge; two labels and how to treat the loop follow."""
UNROLL, DONT_UNROLL = struct.pack("<I", 1), struct.pack("<I", 2)


def changed_library(folder: Path, changes: Mapping[bytes, bytes], instruction: bytes = OP_CONSTANT) -> Path:
    """Write a copy of the backend's library in which some constants of shaders have other values; returns it.

    Another ``instruction`` of four words is changed in its last word, too.

    Raises:
        RuntimeError: the library has none of them.
    """
    library = lavapipe_tools.library()
    content, count = library.read_bytes(), 0
    for old, new in changes.items():
        words_before = re.compile(re.escape(instruction) + rb"(.{8})" + re.escape(old), re.DOTALL)
        content, found = words_before.subn(lambda match, new=new: instruction + match[1] + new, content)
        count += found
    if not count:
        raise RuntimeError(f"{library} has no instruction {instruction.hex()} with {', '.join(old.hex() for old in changes)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / library.name).write_bytes(content)
    return folder / library.name


def rolled_library() -> Path:
    """A copy of the backend's library whose shaders' loops stay loops, with the same results.

    LLVM's time grows with the square of a shader (docs/lab/0019-vulkan.md): unrolled attention of head size 192 takes a minute or two, and
    of 512 more than seven. In loops each takes some seconds.
    """
    return changed_library(logs("lavapipe") / "rolled", {UNROLL: DONT_UNROLL}, OP_LOOP_MERGE)


def broken_library(folder: Path, name: str = "turbo3t") -> Path:
    """Write a copy of the backend's library in which the codebooks of a trellis type are nothing but zeros; returns it.

    Shaders that read rows have them, those of attention included; encoders have tables of their own.
    """
    table = next(t for t in tables.TRELLIS if t.name == name)
    levels = [level for book in table.codebooks for level in book]
    return changed_library(folder, dict.fromkeys(words(levels), bytes(4)))


def run_faulty(folder: Path) -> Outcome:
    """Run the cases that must fail."""
    broken = broken_library(folder / "library")
    return run_job(FAULTY, folder, GGML_BACKEND_PATH=str(broken))


# --- perplexity and KL divergence -----------------------------------------------------------------------------------------


def perplexity_run(model: Path, folder: Path, *arguments: str, on_cpu: bool, chunks: int, ctx: int, **more: str) -> Done:
    """Run llama-perplexity over the text that lies beside a model as ``text.txt``, on the device or on the CPU."""
    place = ["-dev", "none"] if on_cpu else lavapipe_tools.ON_DEVICE
    size = ["-c", str(ctx), "-b", str(ctx), "-ub", str(min(ctx, 128)), "--chunks", str(chunks)]
    command = ["llama-perplexity", "-m", str(model), "-f", str(model.parent / "text.txt"), *size, *arguments, *place]
    done = lavapipe_tools.lavapipe(*command, cwd=folder, LLAMA_CACHE=str(folder / "cache"), **more)
    if done.rc:
        raise RuntimeError(f"llama-perplexity ended with {done.rc}\n{done.err[-3000:]}")
    return done if on_cpu else lavapipe_tools.on_device(done)


PLAIN = {"TURBO_CACHE_CALIBRATION": "none", "TURBO_CACHE_SINK": "0", "TURBO_CACHE_TAIL": "0"}
"""Variables that leave out what turbo types get by default."""


def perplexity(model: Path, cache_type: str, folder: Path, *, on_cpu: bool, chunks: int = 2, ctx: int = 128, **more: str) -> float:
    """Perplexity of a model with a cache type."""
    cache = ("-fa", "on", "-ctk", cache_type, "-ctv", cache_type)
    done = perplexity_run(model, folder, *cache, on_cpu=on_cpu, chunks=chunks, ctx=ctx, **more)
    return float(re.findall(r"Final estimate: PPL = ([\d.]+)", done.out + done.err)[-1])


def divergence(model: Path, cache_type: str, folder: Path, *, on_cpu: bool, chunks: int, ctx: int, **more: str) -> tuple[float, float]:
    """Mean KL divergence of a cache type from the CPU's f32 cache, and its standard error.

    Logits of the base lie beside the model as ``base.bin`` and are made when they are not there.
    """
    base = model.parent / f"base-{chunks}-{ctx}.bin"
    if not base.exists():
        part = base.with_suffix(".part")
        options = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "--kl-divergence-base", str(part))
        perplexity_run(model, folder / "base", *options, on_cpu=True, chunks=chunks, ctx=ctx)
        part.rename(base)
    options = ("-fa", "on", "-ctk", cache_type, "-ctv", cache_type, "--kl-divergence-base", str(base), "--kl-divergence")
    done = perplexity_run(model, folder, *options, on_cpu=on_cpu, chunks=chunks, ctx=ctx, **more)
    found = re.search(r"Mean +KLD: +(-?[\d.]+) ± +([\d.]+)", done.out + done.err)
    if found is None:
        raise RuntimeError(f"llama-perplexity gave no KL divergence\n{(done.out + done.err)[-3000:]}")
    return float(found[1]), float(found[2])


def fresh(folder: Path) -> Path:
    """An empty folder for logs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def logs(name: str) -> Path:
    """Folder of the logs of a suite."""
    return home() / "logs" / name
