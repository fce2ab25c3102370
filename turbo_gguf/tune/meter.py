"""Measurements of a search: ordinary cases, so finished ones are found in the store and never repeated."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.measure import kld
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.metrics import KldStats
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store

BATCH = 512


class Meter:
    """Measures cache specifications on the same chunks of one text."""

    def __init__(self, job: Job, store: Store, case: Case) -> None:
        """Take what all measurements share.

        Args:
            job: build, model and text.
            store: of the results.
            case: any one; its types do not matter.
        """
        self.job, self._store, self._case = job, store, case

    @classmethod
    def of(cls, job: Job, store: Store, *, ctx: int, chunks: int, backend: str, env: tuple[str, ...]) -> Meter:
        """For chunks of ``ctx`` tokens, which the model must have been trained for; shorter ones where it was not."""
        longest = job.model.n_ctx_train or ctx
        ctx = min(ctx, longest - longest % 2)
        batch = min(BATCH, ctx)
        return cls(
            job,
            store,
            Case(
                types=CacheSpec("f16", "f16"),
                ctx=ctx,
                chunks=chunks,
                batch=batch,
                base_batch=batch,
                backend=backend,
                build_id=job.build.id,
                model_sha256=job.model.sha256,
                text_sha256=job.text.sha256,
                env=env,
            ),
        )

    @property
    def ctx(self) -> int:
        """Tokens of a chunk."""
        return self._case.ctx

    def results(self, asked: Sequence[CacheSpec]) -> list[Result]:
        """Measure what is not in the store."""
        return kld.measure([msgspec.structs.replace(self._case, types=types) for types in asked], self.job, self._store)

    def __call__(self, asked: Sequence[CacheSpec]) -> list[KldStats]:
        """The statistics alone."""
        return [result.stats for result in self.results(asked)]

    def times(self, n: int) -> Meter:
        """The same with so many times as many chunks."""
        return Meter(self.job, self._store, msgspec.structs.replace(self._case, chunks=n * self._case.chunks))
