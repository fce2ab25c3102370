"""Measure KL divergence: base logits once per context, then each case against them, each result stored as soon as it is there.

Finished cases are never repeated: the store is asked for the key of a case first. A run that is interrupted or killed loses the
case in hand and nothing else.

Temporal decay is measured with batches that are small against the context. It runs between batches, so a chunk in one batch would
decay nothing; and the tokens of a batch see the cache as it was when the batch began, so a large batch scores tokens that see less
decay than they would in generation, where the batch is one token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec

from turbo_gguf import assets, errors, tools
from turbo_gguf.cache import decay, fit, spec
from turbo_gguf.cache.spec import BASE, CacheSpec, is_turbo
from turbo_gguf.errors import LogNotUnderstood, SilentFallback, UsageError, with_log
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.measure import base_logits, guard, log, perplexity
from turbo_gguf.measure.bits import bits_per_value
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.log import LogFacts
from turbo_gguf.measure.progress import Estimate, Listener, Progress
from turbo_gguf.measure.result import BaseRun, Result
from turbo_gguf.measure.store import Store
from turbo_gguf.tools import Run

TARGET = "llama-perplexity"
"""CMake target and name of the program."""

TRIES = 5
"""Runs of one case when the tool loses the end of its log (see :class:`turbo_gguf.errors.LogCut`).

Measured with upstream 0c1e57098 on two busy cores, streams in files: 9 of 36 runs lost it, 2 of 36 with :data:`ENVIRONMENT` (more
under heavier load), 0 of 24 when the logger is flushed at exit. Five tries make it rare enough to be an error when it happens.
"""

ENVIRONMENT = {} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "passive"}
"""OpenMP workers that sleep instead of spin leave the core to the thread that prints the log; on busy cores they are also faster."""

T = TypeVar("T")

Results = Generator[tuple[Result, str], None, None]
"""Results as they come, each with the machine that it is from. To close it ends what still runs."""

Elsewhere = Callable[[Sequence[Case], "Job", Progress], Results]
"""Runs cases on other machines (:mod:`turbo_gguf.cluster`)."""


class Job(msgspec.Struct, frozen=True):
    """What the cases of a run are measured with."""

    build: Build
    model: ModelFile
    text: TextFile
    threads: int
    packed: ModelFile | None = None  # the model of which ``model`` has the unpacked weights (:mod:`turbo_gguf.measure.unpacked`)
    elsewhere: Elsewhere | None = None  # None: this machine, one case after the other


def measure(cases: Sequence[Case], job: Job, store: Store, stream: TextIO | None = None) -> list[Result]:
    """Measure what is not in the store yet, and return the results of all cases in their order, each with the case asked for.

    Args:
        cases: grouped by context, as :func:`turbo_gguf.measure.sweep.cases` returns them.
        job: build, model and text, which the cases must have been made for, and where they run.
        store: where results are looked up and appended.
        stream: where words about progress go; standard error when None.

    Raises:
        UsageError: a case does not fit the model (head size, context), or the text is too short.
        EnvironmentMissing: disk space.
        ToolFailed: the tool crashed, its log is incomplete or not understood, or it ran something else than asked for.
    """
    check_fit(cases, job.model)
    done = {result.key: result for result in store.results()}
    todo = list({case.key: case for case in cases if case.key not in done}.values())
    stored = sum(case.key in done for case in cases)
    progress = Progress(todo, Estimate(r for r in done.values() if r.case.model_sha256 == job.model.sha256), stream)
    if stored:
        progress.say(f"{stored} of {len(cases)} cases are in the store already")
    with closing((job.elsewhere or _here)(todo, job, progress)) as results:
        for result, where in results:
            store.append([result])
            done[result.key] = result
            progress.finish(result.case, result, where)
    return [msgspec.structs.replace(done[case.key], case=case) for case in cases]


def _here(cases: Sequence[Case], job: Job, progress: Progress) -> Results:
    """Results of this machine, one after the other."""
    return ((measure_case(case, job, progress), "") for case in cases)


def measure_case(case: Case, job: Job, progress: Listener) -> Result:
    """Run one case, after its base logits where they are not there yet, and check everything that the logs say. Nothing is stored.

    Raises:
        EnvironmentMissing, ToolFailed: as :func:`measure`.
    """
    with _base(case, job, progress) as (path, base):
        return _compare(case, job, path, base, progress)


def check_fit(cases: Sequence[Case], model: ModelFile) -> None:
    """Refuse cases that this model cannot run, or in which nothing would decay; what the user asked for is named before the competitors.

    Raises:
        UsageError: head size, layers, context, or batches too long for decay.
    """
    for case in sorted(cases, key=lambda case: not is_turbo(case.types)):
        fit.check_fit(case.types, model)
        if case.types.decay and not decayed_cells(case):
            raise UsageError(
                f"{case.types}: nothing decays in a context of {case.ctx} with batches of {case.batch}: decay runs between batches",
                f"use --batch {max(2, case.ctx // 8)} or less, or a longer --ctx",
            )
        if 0 < model.n_ctx_train < case.ctx:
            raise UsageError(
                f"context {case.ctx} is longer than the {model.n_ctx_train} tokens that {model.name} was trained on",
                f"use --ctx {model.n_ctx_train} or less",
            )


def decayed_cells(case: Case) -> int:
    """Tokens that decay in a chunk of a case, on each side of the cache that decays; 0 for a chunk in one batch."""
    if not case.types.decay or case.batch >= case.ctx:
        return 0
    return decay.cells(case.ctx, case.batch, _ubatch(case.batch), case.types.decay.cold)


def _base(case: Case, job: Job, progress: Listener) -> AbstractContextManager[tuple[Path, BaseRun]]:
    """Find or make the base logits of a case."""

    def write(part: Path) -> BaseRun:
        base_logits.require_disk(case, job.model, job.text)
        progress.start(case, f"{BASE} (base logits)")
        argv = [*_argv(case, job, BASE, case.base_batch), "--kl-divergence-base", str(part), "--chunks", str(case.chunks)]

        def read(run: Run, out: str, err: str) -> BaseRun:
            facts = log.log_facts(err)
            guard.check(facts, BASE, backend=case.backend, model=job.model)
            ppl, chunks = perplexity.perplexity(out, err)
            return BaseRun(
                key=base_logits.key_of(case),
                chunks=chunks,
                ppl=ppl,
                splits=facts.splits,
                seconds=run.seconds,
                size=base_logits.size_of(case.ctx, job.model.n_vocab, chunks),
            )

        made = _run(argv, f"base-{base_logits.key_of(case)}", job, read, progress)
        if 0 < case.chunks != made.chunks:
            progress.say(f"    the text has only {made.chunks} chunks of {case.ctx} tokens, {case.chunks} were asked for")
        return made

    return base_logits.ensured(case, write)


def _compare(case: Case, job: Job, path: Path, base: BaseRun, progress: Listener) -> Result:
    """Run one case against its base and check everything that its log says."""
    argv = [*_argv(case, job, case.types, case.batch), "--kl-divergence", "--kl-divergence-base", str(path)]

    def read(run: Run, out: str, err: str) -> Result:
        facts: LogFacts = log.log_facts(err)
        guard.check(facts, case.types, backend=case.backend, model=job.model, base_splits=base.splits)
        bits = bits_per_value(facts, case.types, job.model)
        guard.check_bits(bits, case.types)
        stats = perplexity.kld_stats(out, err)
        if stats.chunks != base.chunks:
            raise LogNotUnderstood(f"{stats.chunks} chunks were compared, the base has {base.chunks}")
        guard.check_decayed(facts, stats.chunks * decayed_cells(case))
        return Result(
            key=case.key,
            case=case,
            stats=stats,
            bits=bits,
            model=job.model.name,
            text=job.text.name,
            upstream_commit=job.build.tree.commit,
            patch_digest=job.build.tree.digest,
            facts=facts,
            seconds=run.seconds,
            argv=run.argv,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def on_line(line: str) -> None:
        if chunk := re.match(r"\s*(\d+) +[\d.]+ ±", line):
            progress.chunk(case, int(chunk[1]), base.chunks)

    progress.start(case)
    return _run(argv, f"kld-{case.key}", job, read, progress, on_line=on_line)


def _ubatch(batch: int) -> int:
    """Tokens that are computed at a time."""
    return min(batch, 512)


def _argv(case: Case, job: Job, types: CacheSpec, batch: int) -> list[str]:
    """Command line of a run: everything that decides the numbers is said, nothing is left to a default."""
    return [
        str(job.build.tool(TARGET)),
        *("-m", str(job.model.path), "-f", str(job.text.path)),
        *("-c", str(case.ctx), "-b", str(batch), "-ub", str(_ubatch(batch)), "-t", str(job.threads)),
        *spec.options(types),
        *("-fa", "on" if spec.flash_attention(types) else "off", "-fit", "off"),
        *gpu_layers(case.backend),
        *("-lv", "4"),  # the lines about the KV cache are of level trace
    ]


def _variables(job: Job) -> dict[str, str]:
    """Variables of a run. Build and model have a cache folder of their own: a calibration that llama.cpp makes by itself fits all
    quantizations of a model, so in a shared folder numbers would depend on which of them was run first.
    """
    return ENVIRONMENT | {"LLAMA_CACHE": str(assets.home() / "cache" / f"{job.build.id}-{job.model.sha256[:12]}")}


def _run(
    argv: Sequence[str],
    name: str,
    job: Job,
    read: Callable[[Run, str, str], T],
    progress: Listener,
    *,
    on_line: Callable[[str], None] | None = None,
) -> T:
    """Run the tool and read its log; once more when the end of the log was lost, and only then."""
    log = assets.home() / "logs" / "ppl-gate" / f"{name}.log"
    for left in reversed(range(TRIES)):
        for end in (".out", ".err"):  # a tool that outlived a killed driver may still write to the old files
            log.with_suffix(end).unlink(missing_ok=True)
        hint = "the log says more; a crash is no verdict on quality"
        run = tools.run(argv, log=log, env=_variables(job), on_line=on_line, fail_hint=hint)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (run.stdout, run.stderr))
        try:
            return read(run, out, err)
        except errors.LogCut as error:
            if not left:
                raise LogNotUnderstood(f"{error.message}, in {TRIES} runs; log: {run.stdout}") from error
            progress.say(f"    {error.message}: llama.cpp lost the end of its log; running it again")
        except (LogNotUnderstood, SilentFallback) as error:
            raise with_log(error, run.stderr) from error
    raise AssertionError("unreachable")
