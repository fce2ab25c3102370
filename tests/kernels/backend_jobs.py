"""Selections of test-backend-ops that run side by side, and are kept so that a report that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
from gpu_root_tools import Case

from turbo_gguf.codec import tables

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Cases of one operation whose parameters match a regular expression."""

    op: str
    pattern: str
    environment: tuple[tuple[str, str], ...] = ()
    timeout: float = 3600


@dataclass
class Outcome:
    """What a job gave: its cases, or why there are none; seconds by kernel."""

    cases: list[Case] = field(default_factory=list)
    error: str = ""
    seconds: float = 0
    kernels: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there were cases, and all of them were right."""
        return bool(self.cases) and not self.error and all(case.ok for case in self.cases)

    def row(self, name: str) -> str:
        """Its row in a report."""
        result = "the program ended with an error" if self.error else f"{sum(case.ok for case in self.cases)} of {len(self.cases)}"
        return f"| {name} | {result} | {self.seconds:.0f} |"

    def faults(self) -> list[str]:
        """Why it did not pass."""
        return [line for line in (self.error, *(case.text for case in self.cases if not case.ok)) if line]


def attention(head_size: str, more: str, *environment: tuple[str, str], pairs: Iterable[tuple[str, str]]) -> Job:
    """Cases of flash attention with types of ``pairs``; ``head_size`` of K and of V, "192-128"."""
    key, _, value = head_size.partition("-")
    types = "|".join(f"{type_k},type_V={type_v}" for type_k, type_v in sorted(pairs))
    return Job("FLASH_ATTN_EXT", rf"hsk={key},hsv={value or key},{more}.*type_K=({types}),", environment)


def two_segments(head_size: str, *environment: tuple[str, str], more: str = "") -> Job:
    """Cases of attention over two segments of keys, of all types or those that ``more`` lets pass."""
    key, _, value = head_size.partition("-")
    return Job("FLASH_ATTN_EXT", rf"hsk={key},hsv={value or key},rows={more}", environment)


SCALAR = tuple(t.name for t in tables.SCALAR)
TRELLIS = tuple(t.name for t in tables.TRELLIS)
TURBO = (*SCALAR, *TRELLIS)
DIAGONAL = {(t, t) for t in TURBO}

SMALL = "nh=2,nr23=.4,1.,kv=113,"
"""Cases of attention with few keys, at every head size."""

ROW_JOBS = {
    "SET_ROWS": Job("SET_ROWS", "turbo"),
    "GET_ROWS": Job("GET_ROWS", "turbo"),
    "CPY": Job("CPY", "turbo"),
    "CONT, DUP": Job("CONT,DUP", "turbo"),
    "decay": Job("MAP_CUSTOM1", "turbo"),
}
"""All that a backend does with rows of our types."""


def upstream(types: str) -> Job:
    """Upstream's own attention with some types, which shows that a device is right."""
    return Job(
        "FLASH_ATTN_EXT",
        "hsk=(64|128),hsv=(64|128),nh=4,nr23=.4,1.,kv=512,nb=(1|3|32),mask=1,sinks=0,max_bias=0.000000,logit_softcap=0.000000,prec=f32,"
        f"type_K=({types}),type_V=({types}),permute=.0,1,2",
    )


def measured(cases: Callable[[], list[Case]]) -> Outcome:
    """What a run gives and how long it takes. An error in it is a part of the outcome, since a job must not end the others."""
    outcome, began = Outcome(), time.monotonic()
    try:
        outcome.cases = cases()
    except Exception as error:
        outcome.error = str(error)
    outcome.seconds = time.monotonic() - began
    return outcome


def run_jobs(
    jobs: Mapping[str, Job],
    run: Callable[[Job, Path], Outcome],
    folder: Path,
    *,
    code: str,
    workers: int | None = None,
    resume: bool = False,
) -> dict[str, Outcome]:
    """Run jobs, one per core or so many at once; :func:`kept` tells what ``code`` and ``resume`` are for."""

    def one(name: str) -> Outcome:
        logs = folder / re.sub(r"\W+", "-", name)
        return kept(logs, f"{jobs[name]!r} {code}", lambda: run(jobs[name], logs), Outcome, resume=resume)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(one, jobs), strict=True))


def kept(folder: Path, what: str, make: Callable[[], T], kind: type[T], *, resume: bool) -> T:
    """What ``make`` gives, which is also written to a folder.

    With ``resume`` it is taken from there, if ``what`` was asked for is the same, the code that ran among it. An outcome with an error or a
    wrong case is not.
    """
    file = folder / "kept.json"
    mark = hashlib.sha256(what.encode()).hexdigest()[:16]
    if resume and file.exists():
        found = msgspec.json.decode(file.read_bytes())
        if found["mark"] == mark:
            return msgspec.convert(found["result"], kind)
    result = make()
    if not isinstance(result, Outcome) or not (result.error or any(not case.ok for case in result.cases)):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode({"mark": mark, "result": result}))
    return result


def code_of(files: Iterable[Path]) -> str:
    """A hash of the content of files."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


# --- what tests ask of outcomes -------------------------------------------------------------------------------------------


def assert_equals_cpu(outcome: Outcome) -> None:
    """There were cases, and all were right."""
    assert not outcome.error
    assert [case.text for case in outcome.cases if not case.ok] == []
    assert outcome.cases


ROWS = [("SET_ROWS", "type_dst", 40), ("GET_ROWS", "type", 8), ("CPY", "type_dst", 8), ("CPY", "type_src", 2)]
"""Job, parameter, and how many cases of each of our types there are at least."""


def assert_every_type_ran(outcome: Outcome, key: str, at_least: int) -> None:
    """So many cases had each of our types as this parameter."""
    ran = [case.parameters[key] for case in outcome.cases]
    assert [name for name in TURBO if ran.count(name) < at_least] == []


def assert_decay_ran(outcome: Outcome) -> None:
    """Types that decay did."""
    assert {case.parameters["type"] for case in outcome.cases} == {t.name for t in tables.SCALAR if t.decays}
