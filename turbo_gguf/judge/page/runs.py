"""From records to runs: what was measured together, and what is its history.

A run is what one build measured in one set-up. Runs of the same set-up by other builds, with other patches or another upstream, are its
history. Numbers of two runs never share a table as if they were one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from turbo_gguf.judge import gate
from turbo_gguf.measure.result import BenchRow, Result, ServeRow

R = TypeVar("R", bound=Result | BenchRow | ServeRow)


class Build(msgspec.Struct, frozen=True):
    """What was measured."""

    id: str  # of the build, or of the set-up that has it in its name
    upstream: str
    patches: str

    def __str__(self) -> str:
        """As in headings of tables."""
        return f"{self.upstream[:12]}, patches {self.patches[:8] or 'none'}"


class Run(msgspec.Struct, Generic[R], frozen=True):
    """Records of one set-up and one build, in the order in which they were stored."""

    build: Build
    time: str  # of the last record, ISO 8601
    records: tuple[R, ...]


def of_results(results: Sequence[Result]) -> list[list[Run[Result]]]:
    """Histories of qualities, by model, text and context."""
    setup = [name for name in gate.SAME if name != "build_id"]
    found = _histories(
        results,
        lambda r: tuple(getattr(r.case, name) for name in setup),
        lambda r: Build(r.case.build_id, r.upstream_commit, r.patch_digest),
        lambda r: r.time,
    )
    return sorted(found, key=lambda runs: _place(runs[-1].records[0]))


def _place(result: Result) -> tuple[str, str, int, int]:
    return result.model.lower(), result.text, result.case.ctx, -result.stats.tokens


def of_bench(rows: Sequence[BenchRow]) -> list[list[Run[BenchRow]]]:
    """Histories of speeds, by model, device and threads."""
    return _histories(
        rows,
        lambda r: (model_of(r), r.row.get("model_size"), r.row.get("model_n_params"), r.row.get("backends"), r.row.get("n_threads")),
        lambda r: Build(r.key, str(r.row.get("build_commit", "")), r.patch_digest),
        lambda r: str(r.row.get("test_time", "")),
    )


def model_of(row: BenchRow) -> str:
    """Name of the file, which is all that llama-bench says of a model."""
    return Path(str(row.row.get("model_filename", ""))).name


def of_serving(rows: Sequence[ServeRow]) -> list[list[Run[ServeRow]]]:
    """Histories of loads, by model, budget, slot, longest prompt, device and threads."""
    return _histories(
        rows,
        lambda r: (r.model, r.ctx, round(r.budget_mib, 1), max((a.prompt for a in r.answers), default=0), r.backend, r.threads),
        lambda r: Build(r.key, r.upstream_commit, r.patch_digest),
        lambda r: r.time,
    )


def _histories(
    records: Iterable[R], setup: Callable[[R], Hashable], build: Callable[[R], Build], time: Callable[[R], str]
) -> list[list[Run[R]]]:
    """A list for each set-up, with a run for each build, the newest last."""
    groups: dict[Hashable, dict[Build, list[R]]] = {}
    for record in records:
        groups.setdefault(setup(record), {}).setdefault(build(record), []).append(record)
    return [
        sorted((Run(made, max(map(time, found)), tuple(found)) for made, found in builds.items()), key=lambda run: run.time)
        for builds in groups.values()
    ]
