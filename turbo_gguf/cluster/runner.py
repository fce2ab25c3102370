"""The driver's side: each case is a task with its needs, on the nodes that have what it takes; results come as they are done.

Base logits do not travel: they are gigabytes. A node makes those of a context once, as a single machine does, so a context costs one more
run on each node that takes part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf import assets
from turbo_gguf.cluster import node, pool
from turbo_gguf.cluster.node import Failed, Measured, Order
from turbo_gguf.cluster.pool import Lost, Needs, Node, Pool
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, TurboError
from turbo_gguf.files import write_whole
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.measure import base_logits
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.kld import Elsewhere, Job, Results
from turbo_gguf.measure.progress import Progress, label
from turbo_gguf.measure.result import Result

AHEAD = 2
"""Tasks that Ray knows of, for each that can run: no node waits for the driver, and contexts come one after the other."""

LOOK_SECONDS = 0.3
"""How often the driver looks for news and lost nodes."""

PROGRAM_BYTES = 512 << 20
"""Estimate of what llama-perplexity takes beside weights, cache and logits."""


@contextmanager
def joined(address: str | None, *, upstream: str | None, model: str | None) -> Iterator[Elsewhere | None]:
    """For :class:`turbo_gguf.measure.kld.Job`: what runs cases on the cluster at ``--ray ADDRESS``; ``None`` without an address.

    Args:
        address: ``HOST:PORT``, ``auto`` or ``local``.
        upstream: as ``--upstream``, for nodes that build.
        model: as ``--model``, for nodes that fetch it.

    Raises:
        EnvironmentMissing, UsageError: as :func:`turbo_gguf.cluster.pool.connected`.
    """
    if address is None:
        yield None
        return
    with pool.connected(address) as found:
        yield Cluster(found, upstream=upstream, model=model)


def needs_of(case: Case, job: Job) -> Needs:
    """What a case takes: threads, a GPU, and an estimate of host memory (weights, f32 cache, logits of a chunk and their base)."""
    model = job.model
    cache = 4 * case.ctx * sum(model.n_head_kv) * (model.head_k + model.head_v)
    logits = 4 * case.ctx * model.n_vocab + base_logits.size_of(case.ctx, model.n_vocab, 1)
    return Needs(job.threads, int(bool(gpu_layers(case.backend))), model.size + cache + logits + PROGRAM_BYTES)


class Cluster:
    """Runs cases on a cluster. Nodes are prepared once for a build, model and text."""

    def __init__(self, found: Pool, *, upstream: str | None, model: str | None) -> None:
        self._pool = found
        self._upstream = upstream
        self._model = "" if model and Path(model).expanduser().is_file() else model
        self._names: dict[str, str] = {}
        self._calibrations: dict[str, Any] = {}  # handles to files, by digest
        self._prepared: dict[tuple[str, str, str], dict[str, Job | Failed]] = {}

    def __call__(self, cases: Sequence[Case], job: Job, progress: Progress) -> Results:
        """Measure cases; see :data:`turbo_gguf.measure.kld.Elsewhere`.

        Raises:
            EnvironmentMissing: no node has what the cases need, or all that had are gone.
            ToolFailed: a tool failed on a node; its log is here now.
        """
        if not cases:
            return
        needs = {case: needs_of(case, job) for case in cases}
        _require_room(needs, self._alive())
        jobs = self._prepare(cases[0], job, needs, progress)
        _require_room(needs, [one for one in self._alive() if one.id in jobs])
        handle, on = self._pool.share(jobs), tuple(jobs)
        waiting, tasks = list(reversed(cases)), dict[Any, Case]()
        lost: set[str] = set()
        try:
            while waiting or tasks:
                room = sum(needs[cases[0]].times(one) for one in self._alive() if one.id in jobs)
                while waiting and len(tasks) < max(1, AHEAD * room):
                    case = waiting.pop()
                    args = (case, handle, self._calibration(case))
                    tasks[self._pool.submit(node.measure, *args, needs=needs[case], on=on)] = case
                done = self._pool.finished(list(tasks), LOOK_SECONDS)
                self._say_news(progress)
                for task in done:
                    yield self._result(task, tasks.pop(task))
                alive = self._alive()
                for gone in sorted(jobs.keys() - {one.id for one in alive} - lost):
                    lost.add(gone)
                    progress.say(f"{self._names[gone]} is lost: its case runs again elsewhere")
                _require_room({case: needs[case] for case in (*tasks.values(), *waiting)}, [one for one in alive if one.id in jobs])
        finally:
            self._pool.cancel(list(tasks))

    def _calibration(self, case: Case) -> Any:
        """A handle to the calibration of a case, which travels to each node once; ``None``: it is from no file."""
        chosen = case.types.calibration
        if chosen is None or not chosen.is_file:
            return None
        if chosen.digest not in self._calibrations:
            self._calibrations[chosen.digest] = self._pool.share(Path(chosen.path).read_bytes())
        return self._calibrations[chosen.digest]

    def _alive(self) -> list[Node]:
        found = self._pool.nodes()
        self._names |= {one.id: one.name for one in found}
        return found

    def _prepare(self, case: Case, job: Job, needs: dict[Case, Needs], progress: Progress) -> dict[str, Job]:
        """Let each node that has room bring what the cases need; returns the jobs of those that could, by node."""
        known = self._prepared.setdefault((job.build.id, job.model.sha256, job.text.sha256), {})
        least = min(needs.values(), key=lambda need: need.memory)
        new = [one for one in self._alive() if one.id not in known and least.times(one)]
        if new:
            order = Order(
                msgspec.structs.replace(job, elsewhere=None), case.env, self._upstream, self._model, gpus=node.gpu_names(job.build.preset)
            )
            text = self._pool.share(job.text.path.read_bytes())
            tasks = {self._pool.submit(node.prepare, order, text, needs=least, on=[one.id], retries=0): one for one in new}
            try:
                while tasks:
                    done = self._pool.finished(list(tasks), LOOK_SECONDS)
                    self._say_news(progress)
                    for task in done:
                        one = tasks.pop(task)
                        known[one.id] = self._brought(task, one, progress)
            finally:
                self._pool.cancel(list(tasks))
        jobs = {one.id: found for one in self._alive() if isinstance(found := known.get(one.id), Job)}
        failures = [found for found in known.values() if isinstance(found, Failed)]
        if not jobs and failures:
            raise type(failures[0].error)(f"no node can take part: {failures[0].error.message}", failures[0].error.hint)
        return jobs

    def _brought(self, task: Any, one: Node, progress: Progress) -> Job | Failed:
        """What came of preparing a node. One that is not like this machine is named, and the others go on without it."""
        try:
            found = self._pool.result(task)
        except Lost as error:
            found = Failed(ToolFailed(f"lost while it was prepared: {error}"), {}, "")
        except EnvironmentMissing as error:
            found = Failed(error, {}, "")
        if isinstance(found, Failed):
            found = Failed(_fetched(found, one.name), {}, "")
            progress.say(f"without {found.error.message}" + (f"; {found.error.hint}" if found.error.hint else ""))
            return found
        assert isinstance(found, Job)
        return found

    def _result(self, task: Any, case: Case) -> tuple[Result, str]:
        try:
            found = self._pool.result(task)
        except Lost as error:
            message = f"ctx {case.ctx}, {label(case)}: lost with its node or worker {pool.RETRIES + 1} times, the last time: {error}"
            raise ToolFailed(message, "look for a node that runs out of memory; the same command again continues") from error
        assert isinstance(found, Measured)
        name = self._names.get(found.node, found.node)
        if isinstance(found.outcome, Failed):
            raise _fetched(found.outcome, name)
        if found.outcome.key != case.key:
            raise ToolFailed(f"{name}: a result of another case than ctx {case.ctx}, {label(case)}", "this is a fault of turbo-gguf")
        return msgspec.structs.replace(found.outcome, case=case), name

    def _say_news(self, progress: Progress) -> None:
        for where, text in self._pool.news():
            progress.say(f"{self._names.get(where, where)}: {text}")


def _require_room(needs: dict[Case, Needs], nodes: Sequence[Node]) -> None:
    """Refuse what would wait forever: a case for which no node has enough."""
    for case, need in needs.items():
        if not any(need.times(one) for one in nodes):
            raise _no_room(case, need, nodes)


def _no_room(case: Case, need: Needs, nodes: Sequence[Node]) -> EnvironmentMissing:
    """Why no node can run a case, and what to do."""
    what = f"ctx {case.ctx}, {label(case)}"
    if not nodes:
        return EnvironmentMissing(f"{what}: no node is left", "start one, and run the same command again: finished cases are kept")
    if max(one.gpus for one in nodes) < need.gpus:
        return EnvironmentMissing("no node of the Ray cluster has a GPU", "ray start --address=HOST:6379 --num-gpus=1 on one that has")
    cpus = int(max(one.cpus for one in nodes))
    if cpus < need.cpus:
        hint = f"--threads {cpus}" if cpus else "ray start --address=HOST:6379 on a machine that is to measure"
        return EnvironmentMissing(f"{what} takes {need.cpus} CPUs, and the largest node of the Ray cluster has {cpus}", hint)
    return EnvironmentMissing(
        f"{what} takes {need.cpus} CPUs, {need.gpus} GPUs and about {need.memory / 1e9:.1f} GB of memory, and no node has them all",
        "ray start --memory=BYTES says how much a node may give; or use a shorter --ctx",
    )


def _fetched(failed: Failed, name: str) -> TurboError:
    """The error of a node with its name, and with the logs that it names, which are written below our own."""
    message = failed.error.message
    for path, data in failed.logs.items():
        local = assets.home() / "logs" / "cluster" / name / Path(path).relative_to(Path(failed.home) / "logs")
        message = message.replace(path, str(write_whole(local, data)))
    return type(failed.error)(f"{name}: {message}", failed.error.hint)
