"""What is kept of finished measurements, versioned because it reaches a file."""

from __future__ import annotations

from typing import Any

import msgspec

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.measure.bits import Bits
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.log import LogFacts
from turbo_gguf.measure.metrics import KldStats, Metric

SCHEMA_VERSION = 3
"""Version of every record written to the store. Readers refuse newer ones.

2: facts tell a KV cache by its specification; in records of 1 they are without it.
3: there are records of ``bench-serve``.
"""


class BaseRun(msgspec.Struct, frozen=True):
    """Base logits on disk: the run of the base that the others are compared with."""

    key: str
    chunks: int  # really in the file; the text may be shorter than asked for
    ppl: Metric
    splits: int | None
    seconds: float
    size: int  # bytes of the logits file
    schema_version: int = SCHEMA_VERSION


class Result(msgspec.Struct, frozen=True, tag_field="kind", tag="kld"):
    """One finished case."""

    key: str
    case: Case
    stats: KldStats
    bits: Bits
    model: str
    text: str
    upstream_commit: str
    patch_digest: str
    facts: LogFacts
    seconds: float
    argv: tuple[str, ...]
    time: str  # UTC, ISO 8601
    schema_version: int = SCHEMA_VERSION


class BenchRow(msgspec.Struct, frozen=True, tag_field="kind", tag="bench"):
    """One row of ``llama-bench``: prefill or decode speed at a depth, of one round."""

    key: str  # of the bench set-up: build, model, threads, backend, environment
    types: CacheSpec
    depth: int  # tokens in the cache before the test starts
    n_prompt: int
    n_gen: int
    round: int
    tokens_per_second: Metric
    build_id: str
    patch_digest: str
    row: dict[str, Any]  # as llama-bench printed it
    schema_version: int = SCHEMA_VERSION

    @property
    def test(self) -> str:
        """``pp512`` or ``tg32``, as llama-bench names it."""
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"


class Answer(msgspec.Struct, frozen=True):
    """What became of one request to a server. Times are in seconds."""

    prompt: int  # tokens
    sent: float  # since the load began
    seconds: float  # from sending it to its end
    tokens: int = 0  # generated
    first: float | None = None  # from sending it to the first token
    gaps: tuple[float, ...] = ()  # between tokens; those that came at once share the time that they took
    error: str = ""  # why it failed; what came before is not counted


class ServeRow(msgspec.Struct, frozen=True, tag_field="kind", tag="serve"):
    """One load on one server: so many clients, one cache type, one round."""

    key: str  # of the set-up: build, model, prompts, budget, threads, backend, environment
    types: CacheSpec
    clients: int
    round: int
    slots: int  # that fit into the budget; the server had them all
    ctx: int  # tokens of a slot
    slot_mib: float  # KV cache and copies of exact tokens of one slot, as the log gives them
    budget_mib: float
    seconds: float  # from the first request to the last answer
    peak_mib: float | None  # of the process; None: the system does not say
    answers: tuple[Answer, ...]
    model: str
    upstream_commit: str
    build_id: str
    patch_digest: str
    backend: str
    threads: int
    facts: LogFacts
    argv: tuple[str, ...]
    time: str  # UTC, ISO 8601
    schema_version: int = SCHEMA_VERSION
