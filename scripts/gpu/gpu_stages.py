"""The stages of gpu_suite.py: what is run on the GPU, and how its output is judged. Each returns a status and a note."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import bench_gpu
import bench_model

from turbo_gguf import patchset
from turbo_gguf.assets import embedded_model, home
from turbo_gguf.cache.types import RIVALS, TURBO
from turbo_gguf.errors import ToolFailed, TurboError
from turbo_gguf.inputs import models
from turbo_gguf.make import toolkits
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.tools import capture, run, tail

TARGETS = ("test-backend-ops", "test-turbo-perf", "llama-perplexity", "llama-bench")
OPS = "SET_ROWS,GET_ROWS,CPY,CONT,DUP,FLASH_ATTN_EXT"
CACHE_TYPES = (*RIVALS, *TURBO)
SANITIZED_PAIRS = (
    *((name, name) for name in TURBO),
    *(("turbo4", "turbo3"), ("turbo4t", "turbo3t"), ("q8_0", "turbo3"), ("f16", "turbo4"), ("f16", "turbo2t")),
)
"""Of each kind of decode kernel one, at all head sizes and numbers of queries."""
SANITIZER_CASES = (
    ("SET_ROWS", r"type_dst=turbo.*ne=\[(32|128|1024),"),
    ("GET_ROWS", r"type=turbo"),
    ("CPY", r"turbo"),
    ("FLASH_ATTN_EXT", f"type_K=({'|'.join(f'{k},type_V={v}' for k, v in SANITIZED_PAIRS)}),"),
)
_PYTHON_CLI = (sys.executable, "-c", "from turbo_gguf.cli import main; main()")

Status = Literal["pass", "fail", "skip", "error"]
Words = tuple[Status, str]


class Suite:
    """The machine, the results folder and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.preset: str = options.preset
        self.device: str = options.device
        self.small: bool = options.small
        self.out: Path = options.out.resolve()
        self.deadline = time.monotonic() + options.seconds
        self.key = f"{patchset.load().digest[:12]} {self.device}{' small' if self.small else ''}"
        self.build: Build | None = None
        self.stage_deadline = self.deadline

    @property
    def gpu_layers(self) -> tuple[str, ...]:
        """Options of llama.cpp's tools that put all layers on the device."""
        return toolkits.gpu_layers(toolkits.of_device(self.device).backend)

    def tool(self, name: str) -> Path:
        """A program of the build."""
        if self.build is None:
            self.build = ensure_build(self.preset, targets=TARGETS)
        return self.build.tool(name)

    def run(self, log: str, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a tool within the limit of its stage; returns its return code and all it printed."""
        timeout = max(self.stage_deadline - time.monotonic(), 1.0)
        done = run(argv, log=self.out / "logs" / log, env=env, timeout=timeout, check=False)
        return done.rc, done.stdout.read_text("utf-8", errors="replace") + done.stderr.read_text("utf-8", errors="replace")


def build(suite: Suite) -> Words:
    """Compile for exactly this GPU what the other stages run."""
    # in a process of its own, so that it can be ended in time; what is compiled by then stays
    targets = [part for target in TARGETS for part in ("--target", target)]
    rc, _ = suite.run("build", [*_PYTHON_CLI, "build", "--preset", suite.preset, *targets])
    if rc != 0:
        return "error", tail(suite.out / "logs" / "build.err", 5).replace("\n", "; ")
    suite.build = ensure_build(suite.preset, targets=TARGETS)
    return "pass", f"build {suite.build.id}, {suite.build.compiler}"


def _count(text: str) -> tuple[int, int]:
    """Cases that passed, and all, in what test-backend-ops printed."""
    pairs = re.findall(r"(\d+)/(\d+) tests passed", text)
    return sum(int(a) for a, _ in pairs), sum(int(b) for _, b in pairs)


def _backend_ops(
    suite: Suite, log: str, arguments: Sequence[str], prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Words:
    rc, text = suite.run(log, [*prefix, suite.tool("test-backend-ops"), "test", "-b", suite.device, *arguments], env)
    passed, total = _count(text)
    note = f"{passed} of {total} cases, {len(re.findall('not supported', text))} not supported"
    if rc == 0 and total > 0 and passed == total:
        return "pass", note
    failed = re.findall(r"^\s*(\w+\(.*?\)).*FAIL", text, re.MULTILINE)[:3]
    return ("fail" if total > passed else "error"), "; ".join([f"{note}, return code {rc}", *failed])


def ops(suite: Suite) -> Words:
    """All ops of a turbo cache against the CPU."""
    pattern = r"hsk=64,.*nb=(1|3),.*turbo3,type_V=turbo3" if suite.small else "turbo"
    return _backend_ops(suite, "ops", ["-o", "FLASH_ATTN_EXT" if suite.small else OPS, "-p", pattern])


def slices(suite: Suite) -> Words:
    """Prefill over caches of several slices, which the caches of the other cases do not reach."""
    pattern = "kv=1536.*turbo3,type_V=turbo3" if suite.small else "kv=(1536|1700),.*turbo"
    return _backend_ops(suite, "slices", ["-o", "FLASH_ATTN_EXT", "-p", pattern], env={"GGML_TURBO_CUDA_SLICE": "512"})


def _sanitizer(suite: Suite, tool: str) -> Words:
    program = shutil.which("compute-sanitizer") or next((str(p) for p in Path("/usr/local/cuda/bin").glob("compute-sanitizer")), None)
    if not suite.device.startswith("CUDA") or program is None:
        return "skip", "needs an NVIDIA GPU and compute-sanitizer"
    words = capture([program, "--help"])
    # only our kernels: upstream's and cuBLAS' are not ours to check, and each takes 10 to 100 times as long
    only = ["--kernel-name", "kns=turbo"] if "--kernel-name" in words else ["--filter", "kns=turbo"] if "--filter" in words else []
    notes = []
    for op, pattern in SANITIZER_CASES:
        command = [program, "--tool", tool, *only, "--error-exitcode", "9"]
        status, note = _backend_ops(suite, f"{tool}-{op.lower()}", ["-o", op, "-p", pattern], command)
        errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", _log(suite, f"{tool}-{op.lower()}"))
        notes.append(f"{op}: {note}{', ' + errors[-1] if errors else ''}")
        if status != "pass":
            return "fail" if errors else status, "; ".join(notes)
    return "pass", "; ".join(notes)


def _log(suite: Suite, name: str) -> str:
    return "".join((suite.out / "logs" / f"{name}{end}").read_text("utf-8", errors="replace") for end in (".out", ".err"))


def memcheck(suite: Suite) -> Words:
    """No access out of bounds."""
    return _sanitizer(suite, "memcheck")


def racecheck(suite: Suite) -> Words:
    """No race on shared memory."""
    return _sanitizer(suite, "racecheck")


def order(suite: Suite) -> Words:
    """The same perplexity with and without graphs, and with launches one after the other: token by token, so that graphs are used."""
    text = models.held_out_text()
    model, size = embedded_model(), ("128", "1") if suite.small else ("512", "2")
    common: list[str | Path] = [
        suite.tool("llama-perplexity"),
        "-m",
        model,
        "-f",
        text.path,
        "-c",
        size[0],
        "--chunks",
        size[1],
        "-b",
        "1",
        "-ub",
        "1",
    ]
    variants: dict[str, dict[str, str]] = {
        "as it is": {},
        "no graphs": {"GGML_CUDA_DISABLE_GRAPHS": "1"},
        "serial": {"CUDA_LAUNCH_BLOCKING": "1", "AMD_SERIALIZE_KERNEL": "3"},
    }
    notes = [f"perplexity {' / '.join(variants)}"]
    for types in TURBO:
        found = {}
        for name, env in variants.items():
            argv: list[str | Path] = [*common, *suite.gpu_layers, "-fa", "on", "-ctk", types, "-ctv", types]
            rc, text_out = suite.run(f"order-{types}-{name.replace(' ', '-')}", argv, env)
            match = re.search(r"Final estimate: PPL = ([\d.]+)", text_out)
            if rc != 0 or match is None:
                return "error", f"{types}, {name}: return code {rc}, no perplexity"
            found[name] = match[1]
        notes.append(f"{types} {' / '.join(found.values())}")
        if len(set(found.values())) != 1:
            return "fail", "; ".join(notes)
    return "pass", "; ".join(notes)


def gate(suite: Suite) -> Words:
    """KL divergence on the embedded model, judged beside upstream's types."""
    config = ["--config", "smoke"] if suite.small else []
    argv: list[str | Path] = [sys.executable, "-m", "turbo_gguf.ppl-gate", "--preset", suite.preset, *config, "--out", suite.out / "gate"]
    rc, text = suite.run("gate", argv)
    verdicts = re.findall(r"^\S+ at context \d+: .*", text, re.MULTILINE)
    note = "; ".join(verdicts) if verdicts else tail(suite.out / "logs" / "gate.err", 3)
    return ("pass" if rc == 0 else "fail" if rc == 1 and verdicts else "error"), note


def perf(suite: Suite) -> Words:
    """Times of single ops, held against the targets."""
    argv = [
        sys.executable,
        Path(bench_gpu.__file__),
        "--program",
        suite.tool("test-turbo-perf"),
        "--device",
        suite.device,
        "--out",
        suite.out,
    ]
    rc, text = suite.run("perf", [*argv, "--check", *(["--small", "--seconds", "0.02"] if suite.small else [])])
    met = re.search(r"^\d+ of \d+ met\.", text, re.MULTILINE)
    if met is None:
        return "error", tail(suite.out / "logs" / "perf.err", 3)
    return ("pass" if rc == 0 else "fail"), f"targets: {met[0]}"


def _model(suite: Suite) -> Path:
    """The model of random weights."""
    layers, kv_heads, feed_forward = (2, 2, 256) if suite.small else (4, 8, 14336)
    path = home() / "gpu-suite" / f"random-{layers}-{kv_heads}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        bench_model.write(part, layers=layers, kv_heads=kv_heads, feed_forward=feed_forward)
        part.replace(path)
    return path


def _llama_bench(suite: Suite, types: str, arguments: Sequence[str], log: str) -> list[dict[str, object]]:
    """Run llama-bench; returns its rows."""
    base: list[str | Path] = [
        "-m",
        _model(suite),
        "-ctk",
        types,
        "-ctv",
        types,
        "-fa",
        "on",
        "-o",
        "jsonl",
        *suite.gpu_layers,
    ]
    rc, _ = suite.run(log, [suite.tool("llama-bench"), *base, *arguments])
    if rc != 0:
        raise ToolFailed(f"llama-bench with {types} ended with {rc}: {tail(suite.out / 'logs' / f'{log}.err', 3)}")
    return [json.loads(line) for line in (suite.out / "logs" / f"{log}.out").read_text("utf-8").splitlines() if line.startswith("{")]


def bench(suite: Suite) -> Words:
    """llama-bench over depths, all types; ratios to f16 go to summary.md."""
    depths = "0,128" if suite.small else "0,4096,16384,32768"
    sizes = ["-p", "32", "-n", "4"] if suite.small else ["-p", "512", "-n", "64"]
    rows: list[dict[str, object]] = []
    for types in CACHE_TYPES:
        rows += _llama_bench(suite, types, [*sizes, "-d", depths, "-r", "1" if suite.small else "3"], f"bench-{types}")
    (suite.out / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "pass", f"{len(rows)} rows"


def memory(suite: Suite) -> Words:
    """Peak device memory of a prompt behind a deep cache: types of three bits must take less than q8_0 and than q4_0."""
    sizes = ["-p", "64", "-n", "0", "-d", "256"] if suite.small else ["-p", "2048", "-n", "0", "-d", "32768"]
    if read_memory(suite.device) is None:
        return "skip", "device memory cannot be read (nvidia-smi, or mem_info_vram_used of the amdgpu driver)"
    peaks: dict[str, int] = {}
    for types in CACHE_TYPES:
        with MemoryPeak(suite.device) as peak:
            _llama_bench(suite, types, [*sizes, "-r", "1", "--no-warmup"], f"memory-{types}")
        peaks[types] = peak.megabytes
    (suite.out / "memory.json").write_text(json.dumps(peaks) + "\n", encoding="utf-8")
    ok = max(peaks["turbo3"], peaks["turbo3t"]) < min(peaks["q8_0"], peaks["q4_0"])
    return ("pass" if ok else "fail"), ", ".join(f"{types} {peaks[types]} MiB" for types in CACHE_TYPES)


class MemoryPeak:
    """Most memory in use on the device above what was in use before, sampled while the block runs."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._end = threading.Event()
        self.megabytes = 0

    def __enter__(self) -> MemoryPeak:
        self._before = read_memory(self._device) or 0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.is_set():
            self.megabytes = max(self.megabytes, (read_memory(self._device) or 0) - self._before)
            self._end.wait(0.02)


def read_memory(device: str) -> int | None:
    """MiB in use on the first GPU; ``None`` where that cannot be read."""
    if device.startswith("CUDA"):
        try:
            return int(capture(["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]))
        except (TurboError, ValueError):
            return None
    used = [int(path.read_text()) for path in sorted(Path("/sys/class/drm").glob("card*/device/mem_info_vram_used"))]
    return max(used) >> 20 if used and device.startswith("ROCm") else None


STAGES: dict[str, tuple[Callable[[Suite], Words], float]] = {
    "build": (build, 540),
    "ops": (ops, 300),
    "slices": (slices, 120),
    "memcheck": (memcheck, 450),
    "racecheck": (racecheck, 450),
    "order": (order, 420),
    "gate": (gate, 300),
    "perf": (perf, 420),
    "bench": (bench, 360),
    "memory": (memory, 180),
}
"""Name -> function and time limit in seconds, in the order in which they run."""
