"""Progress on standard error: which case of how many, and an estimate of the time left from what earlier cases took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, TextIO

from turbo_gguf.measure.case import Case
from turbo_gguf.measure.result import Result

QUIET_SECONDS = 30.0
"""Time between two lines about the same case when standard error is no terminal."""


def seconds_text(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Estimate:
    """Seconds that a case takes, from those that are done: same types and context first, then same context, then any."""

    def __init__(self, done: Iterable[Result]) -> None:
        """Learn from the results of earlier runs."""
        self._per_chunk: dict[tuple[str, int], float] = {}
        for result in done:
            self.add(result.case, result.stats.chunks, result.seconds)

    def add(self, case: Case, chunks: int, seconds: float) -> None:
        """Learn what a case took."""
        self._per_chunk[str(case.types), case.ctx] = seconds / max(1, chunks)

    def seconds(self, case: Case) -> float | None:
        """Guess for a case; None when nothing is known yet."""
        chunks = max(1, case.chunks)
        exact = self._per_chunk.get((str(case.types), case.ctx))
        if exact is not None:
            return exact * chunks
        same = [value for (_, ctx), value in self._per_chunk.items() if ctx == case.ctx]
        if same:
            return max(same) * chunks
        per_token = [value / ctx for (_, ctx), value in self._per_chunk.items()]
        return max(per_token) * case.ctx * chunks if per_token else None


class Listener(Protocol):
    """Hears how a case goes."""

    def start(self, case: Case, what: str = "") -> None:
        """A run of the case starts: that of ``what``, or its own."""

    def chunk(self, case: Case, done: int, chunks: int) -> None:
        """So many chunks are done."""

    def say(self, text: str) -> None:
        """Something else is worth a line."""


class Progress:
    """Writes words, never data, to a stream (standard error by default)."""

    def __init__(self, cases: Sequence[Case], estimate: Estimate, stream: TextIO | None = None) -> None:
        """Take the cases that are to be run, in order."""
        self._todo = list(cases)
        self._total = len(cases)
        self._estimate = estimate
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._said = self._started
        self._open_line = False

    def say(self, text: str) -> None:
        """Write a line."""
        end = "\r\033[K" if self._open_line else ""
        self._open_line = False
        print(end + text, file=self._stream, flush=True)

    def start(self, case: Case, what: str = "") -> None:
        """Say that a case starts, and how long the rest will take."""
        number = self._total - len(self._todo) + 1
        self._started = self._said = time.monotonic()
        known = [self._estimate.seconds(c) for c in self._todo]
        left = f", about {seconds_text(sum(s for s in known if s))} left" if all(s is not None for s in known) and known else ""
        self.say(f"[{number}/{self._total}] ctx {case.ctx}, {what or label(case)}{left}")

    def chunk(self, case: Case, done: int, chunks: int) -> None:
        """Say how far the running case is: always on a terminal, every now and then elsewhere."""
        now = time.monotonic()
        text = f"    chunk {done}/{chunks}, {seconds_text((now - self._started) / max(1, done) * (chunks - done))} left of this case"
        if self._stream.isatty():
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)
            self._open_line = True
        elif now - self._said >= QUIET_SECONDS:
            self._said = now
            self.say(text)

    def finish(self, case: Case, result: Result, where: str = "") -> None:
        """Say what came out, and of which case where several run at a time: on the machine ``where``."""
        self._todo = [c for c in self._todo if c != case]
        self._estimate.add(case, result.stats.chunks, result.seconds)
        of = f"[{self._total - len(self._todo)}/{self._total}] {where}: ctx {case.ctx}, {label(case)}:" if where else "   "
        mean = result.stats.mean
        self.say(f"{of} mean KLD {mean.value:.6f} ± {mean.error:.6f}, {seconds_text(result.seconds)}")


def label(case: Case) -> str:
    """Types of a case, or what the noise floor is."""
    return f"{case.types} at batch {case.batch} (noise floor)" if case.is_noise_floor else str(case.types)
