"""Serving under load: the same requests on a llama-server of each cache type, with as many slots as a fixed budget of KV memory holds.

A type of few bits makes room for more slots, so fewer requests wait for one. First each type is started with one slot: the guard compares
its log with what was asked for, and the log says what a slot takes, copies of exact tokens included. The budget divided by that is the
number of slots. Each load has a server of its own, so its peak of memory is that of the load. Loads of the same number of clients follow
each other over all types, so that what slows the machine down hits all alike, and what is there of a sweep can be compared.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

import msgspec

from turbo_gguf import assets
from turbo_gguf.cache import fit, spec
from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.errors import SilentFallback, ToolFailed, UsageError
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.make.build import Build
from turbo_gguf.measure import load, server
from turbo_gguf.measure.case import METRICS_VERSION
from turbo_gguf.measure.load import Request
from turbo_gguf.measure.result import ServeRow
from turbo_gguf.measure.store import Store

PAD = 256
"""llama.cpp rounds the tokens of a slot up to a multiple of this."""

MAX_SLOTS = 256
"""Sequences that a context of llama.cpp has at most."""

SPREAD = 4096
"""Tokens of the text beyond the longest prompt: prompts begin at different ones of them."""

BYTES_PER_TOKEN = 8
"""More than a token of a text has on average: so much of the text is read."""

STEP = 509
"""Tokens between the beginnings of two prompts: a prime, so that a level has no two alike."""


END_SECONDS = 2.0
"""How long a server that crashed may take to be gone."""


class ServePlan(msgspec.Struct, frozen=True):
    """What to measure: all types at all numbers of clients, ``rounds`` times."""

    types: tuple[CacheSpec, ...]  # PLAIN is one of them
    clients: tuple[int, ...]
    prompts: tuple[int, ...]  # tokens, in turn
    n_gen: int
    requests: int  # of a load, if there are not more clients
    ctx: int  # tokens of a slot
    budget_mib: float | None  # None: what ``plain_slots`` slots of f16 take
    plain_slots: int
    batch: int
    rounds: int
    timeout: float  # seconds for a request
    threads: int
    backend: str
    env: tuple[str, ...] = ()

    def key(self, budget: float, build: Build, model: ModelFile, text: TextFile) -> str:
        """Name of the set-up in the store: loads with the same key may be compared."""
        setup = (self.prompts, self.n_gen, self.requests, self.ctx, round(budget, 2), self.batch, self.timeout, self.threads, self.backend)
        parts = (setup, self.env, build.id, model.sha256, text.sha256, METRICS_VERSION)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:20]

    def shape(self, types: CacheSpec, slots: int, clients: int) -> server.Shape:
        """How the server of a load is started."""
        return server.Shape(types, slots, self.ctx, self.batch, self.threads, self.backend, clients)


class _Job(msgspec.Struct, frozen=True):
    """What all loads of a run share."""

    plan: ServePlan
    build: Build
    model: ModelFile
    tokens: tuple[int, ...]  # of the text
    slot_mib: dict[CacheSpec, float]
    budget: float
    key: str

    def slots(self, types: CacheSpec) -> int:
        """Slots of these types that the budget holds."""
        return slots_in(self.budget, self.slot_mib[types])


def slot_ctx(prompts: Sequence[int], n_gen: int) -> int:
    """Tokens that a slot needs for the longest prompt and its answer, as llama.cpp rounds them."""
    return math.ceil((max(prompts) + n_gen + 1) / PAD) * PAD  # one more: a server stops before its slot is full


def slots_in(budget: float, slot: float) -> int:
    """Slots of so many MiB in a budget. A budget that is made of slots holds them, whatever the last digit."""
    return min(MAX_SLOTS, int(budget / slot + 1e-6))


def run(plan: ServePlan, build: Build, model: ModelFile, text: TextFile, *, store: Store, say: Callable[[str], None]) -> list[ServeRow]:
    """Measure and store; returns the loads of the plan with the types as asked for, stored ones included.

    Interrupting loses the load in hand; the same plan again continues with those that are missing.

    Raises:
        UsageError: a type does not fit the model, a prompt the trained context, or the budget is too small for one slot.
        ToolFailed: the server crashed, runs something else than asked for, or answered nothing at all.
    """
    check_fit(plan, model)
    job = _prepare(plan, build, model, text, say)
    total = plan.rounds * len(plan.clients) * len(plan.types)
    for done, (number, clients, types) in enumerate(_loads(plan), start=1):
        if not any(_is(row, types, clients, number) for row in _stored(store, job)):
            say(f"[{done}/{total}] round {number + 1}, {clients} clients, {types}, {job.slots(types)} slots")
            row = _measure(types, clients, number, job)
            store.append([row])
            say(f"    {row.seconds:.0f} s, {sum(not answer.error for answer in row.answers)} of {len(row.answers)} requests answered")
    asked = {spec.measured(types): types for types in reversed(plan.types)}
    rows = {(row.round, row.clients, spec.measured(row.types)): row for row in _stored(store, job)}
    wanted = ((number, clients, spec.measured(types)) for number, clients, types in _loads(plan))
    return [msgspec.structs.replace(rows[name], types=asked[name[2]]) for name in wanted]


def check_fit(plan: ServePlan, model: ModelFile) -> None:
    """Refuse a plan that this model cannot run.

    Raises:
        UsageError: head size, layers, a slot that is too short, or one that is longer than the trained context.
    """
    longest = max(plan.prompts) + plan.n_gen
    if plan.ctx < slot_ctx(plan.prompts, plan.n_gen) or plan.ctx % PAD:
        raise UsageError(
            f"slots of {plan.ctx} tokens: a prompt of {max(plan.prompts)} and {plan.n_gen} generated tokens need a multiple of {PAD}",
            f"use --ctx {slot_ctx(plan.prompts, plan.n_gen)} or more",
        )
    if 0 < model.n_ctx_train < longest:
        raise UsageError(f"a prompt of {max(plan.prompts)} needs {longest} tokens; {model.name} was trained on {model.n_ctx_train}")
    for types in plan.types:
        fit.check_fit(types, model)


def _loads(plan: ServePlan) -> Iterator[tuple[int, int, CacheSpec]]:
    """Round, clients and types of each load, in order."""
    for number in range(plan.rounds):
        for clients in plan.clients:
            for types in plan.types:
                yield number, clients, types


def _stored(store: Store, job: _Job) -> Iterator[ServeRow]:
    """Loads of this set-up that are there."""
    return (row for row in store.serve_rows() if row.key == job.key)


def _is(row: ServeRow, types: CacheSpec, clients: int, number: int) -> bool:
    return (spec.measured(row.types), row.clients, row.round) == (spec.measured(types), clients, number)


# --- what fits ------------------------------------------------------------------------------------------------------------


def _prepare(plan: ServePlan, build: Build, model: ModelFile, text: TextFile, say: Callable[[str], None]) -> _Job:
    """Start each type with one slot, and divide the budget by what it takes.

    Raises:
        UsageError: the text is too short, or the budget is too small.
        ToolFailed: the server crashed, or runs something else than asked for.
    """
    slot_mib: dict[CacheSpec, float] = {}
    tokens: tuple[int, ...] = ()
    for types in plan.types:
        with server.started(plan.shape(types, 1, 1), build, model, _log("probe", types)) as running:
            slot_mib[types] = running.mib
            tokens = tokens or _tokens(running, text, max(plan.prompts))
    budget = plan.plain_slots * slot_mib[PLAIN] if plan.budget_mib is None else plan.budget_mib
    for types, mib in slot_mib.items():
        if not slots_in(budget, mib):
            raise UsageError(
                f"a budget of {budget:.1f} MiB has no room for a slot of {types}, which takes {mib:.1f} MiB", "use a larger --budget"
            )
    say(f"cache types and device are as asked for; {budget:.1f} MiB of KV memory hold, in slots of {plan.ctx} tokens:")
    say("    " + ", ".join(f"{types} {slots_in(budget, mib)} ({mib:.2f} MiB each)" for types, mib in slot_mib.items()))
    return _Job(plan, build, model, tokens, slot_mib, budget, plan.key(budget, build, model, text))


def _tokens(running: server.Running, text: TextFile, longest: int) -> tuple[int, ...]:
    """Token ids of the beginning of the text."""
    room = longest + SPREAD
    part = text.path.read_bytes()[: room * BYTES_PER_TOKEN].decode("utf-8", errors="ignore")
    found = running.call("/tokenize", {"content": part}).get("tokens")
    if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
        raise ToolFailed(f"llama-server did not make tokens of a text; log: {running.service.stderr}")
    if len(found) <= longest:
        raise UsageError(f"text {text.name}: {len(found)} tokens, a prompt takes {longest}", "name a longer one with --text FILE")
    return tuple(found[:room])


# --- one load -------------------------------------------------------------------------------------------------------------


def requests(tokens: Sequence[int], plan: ServePlan, clients: int, number: int) -> list[Request]:
    """Requests of a load: prompts of all lengths in turn, each from a place of its own in the text. They are the same for all types."""
    count = max(clients, plan.requests)
    made = []
    for i, length in enumerate(islice(cycle(plan.prompts), count)):
        at = (i + number * count) * STEP % (len(tokens) - length)
        made.append(Request(tuple(tokens[at : at + length]), plan.n_gen))
    return made


def _measure(types: CacheSpec, clients: int, number: int, job: _Job) -> ServeRow:
    """Start a server with all slots that fit, and send it the requests of so many clients."""
    plan, slots = job.plan, job.slots(types)
    name = _log(f"round-{number}-clients-{clients}", types)
    with server.started(plan.shape(types, slots, clients), job.build, job.model, name) as running:
        _check_budget(running, job.budget)
        answers, seconds = load.drive(running.port, requests(job.tokens, plan, clients, number), clients=clients, timeout=plan.timeout)
        running.service.require_alive(server.CRASHED, wait=END_SECONDS if any(answer.error for answer in answers) else 0.0)
        peak = running.service.peak_mib()
        if all(answer.error for answer in answers):
            raise ToolFailed(
                f"llama-server with {types} answered none of {len(answers)} requests: {answers[0].error}; log: {running.service.stderr}"
            )
        return ServeRow(
            key=job.key,
            types=types,
            clients=clients,
            round=number,
            slots=slots,
            ctx=plan.ctx,
            slot_mib=job.slot_mib[types],
            budget_mib=job.budget,
            seconds=seconds,
            peak_mib=peak,
            answers=answers,
            model=job.model.name,
            upstream_commit=job.build.tree.commit,
            build_id=job.build.id,
            patch_digest=job.build.tree.digest,
            backend=plan.backend,
            threads=plan.threads,
            facts=running.facts,
            argv=running.service.argv,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _check_budget(running: server.Running, budget: float) -> None:
    """All slots together take no more than the budget, as the log of this very server tells it."""
    slots = max(cache.streams for cache in running.facts.caches)
    if running.mib > budget + (slots + 1) * running.mib_error + 1e-6:  # the size of a slot was rounded, too
        raise SilentFallback(f"{slots} slots take {running.mib:.2f} MiB, the budget is {budget:.2f} MiB; log: {running.service.stderr}")


def _log(kind: str, types: CacheSpec) -> Path:
    """Log of a server."""
    return assets.home() / "logs" / "bench-serve" / f"{kind}-{spec.file_name(types)}.log"
