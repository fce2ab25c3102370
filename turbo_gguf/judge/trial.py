"""Trying the patch set on one llama.cpp: hooks, compiling, and a short set of runs that shows that the types work there.

A trial ends with a verdict and never with half of one: what the patch set or llama.cpp does wrong is a failed step, what this
machine lacks (network, compiler, disk) is an error. Verdicts are kept, so that a run over many upstreams continues where it
stopped.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from turbo_gguf import assets, patchset
from turbo_gguf.cache.settings import OFF
from turbo_gguf.cache.types import TURBO
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, TurboError
from turbo_gguf.inputs import models
from turbo_gguf.judge import gate
from turbo_gguf.make.build import Build, build_folder, ensure_build, read_manifest
from turbo_gguf.make.upstream import Upstream, fetch
from turbo_gguf.measure import calibrate, environment, kld, sweep
from turbo_gguf.measure.case import METRICS_VERSION
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.tools import describe_rc, run, tail

OPS = "SET_ROWS,GET_ROWS,CPY,MUL_MAT,FLASH_ATTN_EXT"
CTX, CHUNKS = 512, 8
TYPED = "turbo3t"
"""The type that is also measured as a user types it, with what it gets by default; all are measured plain."""

LIFE = {
    "test-turbo-cache": (
        *(("head128", scenario, "turbo3", "turbo2") for scenario in ("rotation", "shift", "sequences", "state")),
        *(("head64", scenario, "turbo4t", "turbo3t") for scenario in ("rotation", "shift", "sequences", "state")),
        ("swa", "swa", "turbo3", "turbo3"),
    ),
    "test-turbo-layers": (("layers4", "mixed", "turbo4", "turbo2"), ("head128", "state", "turbo4", "turbo2")),
    "test-turbo-decay": tuple(("head128", scenario, "turbo3", "turbo4") for scenario in ("by-hand", "sequences", "state")),
    "test-turbo-exact": tuple(("head64", scenario, "turbo3t", "turbo3t") for scenario in ("window", "batches", "state")),
    "test-turbo-calibration": (
        *(("head128", scenario, "f32", "f32") for scenario in ("equal", "stored", "refusals")),
        ("head128", "state", "turbo3", "turbo3"),
    ),
}
"""Our native test programs -> model, scenario and types of a few of their runs."""

TARGETS = ("llama-completion", "llama-perplexity", "llama-bench", "test-quantize-fns", "test-backend-ops", calibrate.TARGET, *LIFE)

TINY = "tiny-{}.gguf"
"""File name of a model of those runs, as ``tiny_models.py`` of the tests writes it."""

OK: Literal["ok"] = "ok"
FAILED: Literal["failed"] = "failed"
SKIPPED: Literal["skipped"] = "skipped"

_TIMEOUT = 1800.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Step(msgspec.Struct, frozen=True):
    """One part of a trial."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str = ""  # one line for a table; several when it failed


class Trial(msgspec.Struct, frozen=True):
    """A verdict on one upstream."""

    upstream: str
    build: int  # upstream's build number; 0: not known
    commit: str
    digest: str  # of the patch set
    compiler: str
    time: str  # UTC, ISO 8601
    seconds: float
    steps: tuple[Step, ...]
    mean_kld: dict[str, float] = {}  # by cache specification, f32 is the base
    kld_quantiles: dict[str, tuple[float, float]] = {}  # the same: median, and 99.9 %
    env: tuple[str, ...] = ()  # GGML_*, TURBO_* variables in force, as NAME=value
    metrics_version: int = 1  # of what was measured; verdicts from before this field have 1

    @property
    def passed(self) -> bool:
        """Whether no step failed."""
        return all(step.status != FAILED for step in self.steps)

    @property
    def failures(self) -> list[str]:
        """What failed, with its details."""
        return [f"{step.name}: {step.detail}" for step in self.steps if step.status == FAILED]


def try_upstream(
    source: Upstream, spec: str, *, threads: int, jobs: int | None = None, say: Callable[[Step], None] = lambda step: None
) -> Trial:
    """Fetch, patch, compile and run; stop at the first step without which the next ones mean nothing.

    Args:
        source: what is tried.
        spec: as :func:`turbo_gguf.make.upstream.resolve` takes it, the same source.
        threads: of llama.cpp.
        jobs: parallel compiler processes, one per core when ``None``.
        say: called with each step when it has ended.

    Raises:
        EnvironmentMissing: network, a compiler or disk space is missing: no verdict.
        UsageError: a variable is set that would change what is measured.
    """
    env = environment.settings_in_environment()
    started = time.monotonic()
    steps: list[Step] = []
    measured: list[Result] = []
    patches = patchset.load()

    def done(step: Step) -> bool:
        steps.append(step)
        say(step)
        return step.status != FAILED

    def trial(compiler: str) -> Trial:
        seconds, now = time.monotonic() - started, datetime.now(UTC).isoformat(timespec="seconds")
        return Trial(
            source.name,
            source.build,
            source.commit,
            patches.digest,
            compiler,
            now,
            seconds,
            tuple(steps),
            *_klds(measured),
            env,
            METRICS_VERSION,
        )

    if not done(_hooks(patches, fetch(source))):
        return trial("")
    try:
        built = ensure_build(upstream=spec, targets=TARGETS, jobs=jobs)
    except ToolFailed as error:
        done(Step("compiled", FAILED, error.message))
        return trial("")
    done(Step("compiled", OK, built.compiler))
    logs = assets.home() / "logs" / "try" / source.name
    done(_quantize_fns(built, logs))
    done(_backend_ops(built, logs))
    done(_gate(built, threads, measured, env))
    done(_life(built, logs))
    return trial(built.compiler)


def keep(trial: Trial) -> Path:
    """Store a verdict."""
    path = _path(trial.upstream, trial.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(trial), indent=1) + b"\n")
    return path


def kept(source: Upstream, digest: str) -> Trial | None:
    """The stored verdict on this upstream with this patch set, if it is a whole pass; what failed or was skipped is tried again."""
    try:
        found = msgspec.json.decode(_path(source.name, digest).read_bytes(), type=Trial)
    except (OSError, msgspec.MsgspecError):
        return None
    whole = all(step.status == OK for step in found.steps)
    asked = (source.commit, digest, environment.settings_in_environment(), METRICS_VERSION)
    same = (found.commit, found.digest, found.env, found.metrics_version) == asked
    return found if whole and same else None


def had_build(source: Upstream) -> bool:
    """Whether a CPU build of an upstream was there."""
    return read_manifest(build_folder(Tree(Path(), source.name, source.commit, "x"), "cpu")) is not None


def drop_build(source: Upstream) -> None:
    """Remove the CPU build of an upstream; its trees stay."""
    shutil.rmtree(build_folder(Tree(Path(), source.name, source.commit, "x"), "cpu"), ignore_errors=True)


def _path(name: str, digest: str) -> Path:
    return assets.home() / "results" / "upstreams" / f"{name}-{digest[:12]}.json"


def _hooks(patches: patchset.PatchSet, tree: Tree) -> Step:
    report = patchset.check(patches, [tree], reference="")
    if report.problems:
        found = [problem.removeprefix(f"{tree.upstream}: ") for problem in report.problems]
        return Step("hooks", FAILED, "\n".join(found))
    return Step("hooks", OK, f"{patches.added} lines land")


def _quantize_fns(build: Build, logs: Path) -> Step:
    try:
        done = run([build.tool("test-quantize-fns"), "-v"], log=logs / "quantize-fns", check=False, timeout=_TIMEOUT)
    except ToolFailed as error:  # no end in time
        return Step("test-quantize-fns", FAILED, error.message)
    if done.rc != 0:
        return Step("test-quantize-fns", FAILED, f"{describe_rc(done.rc)}; log: {done.stdout}\n{tail(done.stdout)}")
    missing = _unnamed(done.stdout.read_text("utf-8", errors="replace"))
    return Step("test-quantize-fns", FAILED, f"no case of {', '.join(missing)}") if missing else Step("test-quantize-fns", OK)


def _backend_ops(build: Build, logs: Path) -> Step:
    """Turbo cases of test-backend-ops on the CPU: "passed/all"."""
    name = "test-backend-ops"
    argv: list[str | Path] = [build.tool(name), "test", "-b", "CPU", "-o", OPS, "-p", "turbo"]
    try:
        done = run(argv, log=logs / name, check=False, timeout=_TIMEOUT)
    except ToolFailed as error:  # no end in time
        return Step(name, FAILED, error.message)
    text = _ANSI.sub("", done.stdout.read_text("utf-8", errors="replace"))
    counts = re.findall(r"(\d+)/(\d+) tests passed", text)
    passed, total = (sum(int(pair[side]) for pair in counts) for side in (0, 1))
    missing = _unnamed(text)
    if done.rc != 0 or passed != total or not total or missing:
        wrong = [line.strip() for line in text.splitlines() if "FAIL" in line or "not supported" in line][:5]
        detail = [f"{passed}/{total} passed, {describe_rc(done.rc)}; log: {done.stdout}", *wrong]
        return Step(name, FAILED, "\n".join([*detail, *([f"no case of {', '.join(missing)}"] if missing else [])]))
    return Step(name, OK, f"{passed}/{total}")


def _unnamed(text: str) -> list[str]:
    """Our types that a log does not name: a program that checks nothing passes nothing."""
    return [kind for kind in TURBO if not re.search(rf"\b{kind}\b", text)]


def _klds(results: Sequence[Result]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """KL divergence by cache specification: means, and quantiles."""
    by_type = {str(r.case.types): r.stats for r in results if not r.case.is_noise_floor}
    return {name: s.mean.value for name, s in by_type.items()}, {name: (s.median.value, s.p999.value) for name, s in by_type.items()}


def _gate(build: Build, threads: int, measured: list[Result], env: tuple[str, ...]) -> Step:
    """Mean KL divergence of each type on the embedded model, plain, and of one as it is typed; judged as ``ppl-gate`` does."""
    model, text = models.embedded(), models.held_out_text()
    limits = gate.load(assets.eval_dir() / "gates.toml")
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=CTX, chunks=CHUNKS, types=(*map(_plain, TURBO), TYPED)),))
    setup = sweep.Setup(build_id=build.id, model_sha256=model.sha256, text_sha256=text.sha256, backend="CPU", env=env)
    cases = sweep.cases(plan, setup, gate.references(limits))
    try:
        results = kld.measure(cases, kld.Job(build=build, model=model, text=text, threads=threads), Store())
        verdicts = gate.judge(results, limits)
    except EnvironmentMissing:
        raise
    except TurboError as error:
        return Step("gate", FAILED, error.message)
    measured += results
    failed = [str(verdict.types) for verdict in verdicts if verdict.status == gate.FAIL]
    return Step("gate", FAILED, f"failed: {', '.join(failed)}") if failed else Step("gate", OK, f"{len(verdicts)} types")


def _plain(kind: str) -> str:
    """A type without what it gets by default."""
    return f"{kind} {OFF}"


def _life(build: Build, logs: Path) -> Step:
    """A few scenarios of our native test programs, on tiny models that a script of the checkout writes."""
    name = "cache life"
    script = next(iter(sorted((assets.patches_dir().parent / "tests").glob("*/tiny_models.py"))), None)
    if script is None:
        return Step(name, SKIPPED, "needs a checkout: its tests write the models")
    folder = assets.home() / "models" / "tiny"
    run([sys.executable, script, folder], log=logs / "tiny-models", timeout=_TIMEOUT)
    failed, count = [], 0
    with tempfile.TemporaryDirectory(prefix="turbo-gguf-") as scratch:  # the programs write files where they run
        for program, runs in LIFE.items():
            for model, scenario, *types in runs:
                log = logs / f"{program}-{model}-{scenario}-{'-'.join(types)}"
                argv: list[str | Path] = [build.tool(program), folder / TINY.format(model), scenario, *types]
                count += 1
                if wrong := _wrong_in_life(argv, log, Path(scratch)):
                    failed.append(f"{program} {model} {scenario} {' '.join(types)}: {wrong}")
    return Step(name, FAILED, "\n".join(failed)) if failed else Step(name, OK, f"{count} runs")


def _wrong_in_life(argv: list[str | Path], log: Path, scratch: Path) -> str:
    """What is wrong with a run of a native test program, "" when nothing is."""
    try:
        done = run(argv, log=log, check=False, cwd=scratch, env={"GGML_NO_BACKTRACE": "1"}, timeout=_TIMEOUT)
    except ToolFailed as error:  # no end in time
        return error.message
    text = done.stdout.read_text("utf-8", errors="replace")
    if done.rc == 0 and "FAIL" not in text and text.endswith("all checks passed\n"):
        return ""
    wrong = [line for line in text.splitlines() if line.startswith("FAIL")][:3]
    return "\n  ".join([f"{describe_rc(done.rc)}; log: {done.stdout}", *wrong])


def table(trials: Iterable[Trial], not_tried: Iterable[str] = ()) -> str:
    """Write verdicts as ``eval/results/upstreams.md``."""
    trials = list(trials)
    compilers = ", ".join(dict.fromkeys(trial.compiler for trial in trials if trial.compiler)) or "no compiler"
    date = max((trial.time for trial in trials), default="")[:10]
    steps = ("hooks", "compiled", "test-quantize-fns", "test-backend-ops", "cache life", "gate")
    measured = {"q4_0": "q4_0", **{kind: _plain(kind) for kind in TURBO}, f"{TYPED} as typed": TYPED}
    columns = ["upstream", "build", "commit", *steps, *measured]
    lines = [
        "# The patch set on every supported upstream",
        "",
        f"`make check-upstreams`, {date}, {compilers}.",
        "Turbo cases of test-backend-ops that passed; runs of our native test programs; mean KL divergence of the embedded model "
        f"(median, 99.9 %), {CHUNKS} chunks of {CTX} tokens. Types are plain (`{OFF}`) but for the last column.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for trial in trials:
        by_name = {step.name: step for step in trial.steps}
        cells = [_cell(by_name.get(name)) for name in steps]
        values = [_kld_cell(trial, kind) for kind in measured.values()]
        lines.append(f"| {' | '.join([trial.upstream, f'b{trial.build}' if trial.build else '', f'`{trial.commit}`', *cells, *values])} |")
    failures = [f"- {trial.upstream}, {text}" for trial in trials for text in trial.failures]
    failures += [f"- not tried: {text}" for text in not_tried]
    if failures:
        home = str(assets.home())
        lines += ["", "Failed:", "", *(re.sub(r"\n\s*", "\n  ", text.replace(home, "build")) for text in failures)]
    return "\n".join(lines) + "\n"


def _kld_cell(trial: Trial, kind: str) -> str:
    mean, quantiles = trial.mean_kld.get(kind), trial.kld_quantiles.get(kind)
    if mean is None:
        return ""
    return f"{mean:.5f}" + (f" ({quantiles[0]:.5f}, {quantiles[1]:.4f})" if quantiles else "")


def _cell(step: Step | None) -> str:
    if step is None:
        return ""
    if step.status == OK and re.fullmatch(r"\d+(/\d+)?( runs)?", step.detail):
        return step.detail
    return step.status
