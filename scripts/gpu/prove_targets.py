"""The targets of a proof, and what its rows say about each: met, missed, or not measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prove_ops import RIVALS, TURBO, Case, Shapes, Times

MAIN = ("turbo3", "turbo4t")
"""Types whose decoding is held against f16."""
LARGE_CARDS = re.compile(r"\b[HB]\d00\b|\bGH200\b|\bA100\b|\bMI\d00|\bgfx9[045]")
"""GPUs whose memory is so fast that arithmetic decides."""

DECODE_LARGE, DECODE_OTHER = 2.5, 3.0  # speed over f16 at the depth of the main target
TRELLIS = 0.85  # speed of turbo3t over turbo3
PREFILL = 1.05  # time over f16
WRITE_ONE = 2.5  # microseconds of a layer for K and V of one token
WRITE_PROMPT = 0.03  # time of writing K and V over that of the attention of the same tokens
FLAT = 16  # MiB by which memory beside the cache may grow more than with f16: what is allocated comes in pieces of 2

Row = Mapping[str, Any]


class Verdict(NamedTuple):
    """A target and the worst of what was measured for it."""

    target: str
    limit: float
    least: bool  # whether the limit is the least that is allowed, not the most
    measured: float | None
    worst: str  # where
    n: int  # cases that were measured
    of: int  # cases that there are

    @property
    def verdict(self) -> str:
        """In words."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.limit if self.least else self.measured <= self.limit
        return "missed" if not met else "met" if self.n == self.of else "met as far as measured"

    def row(self) -> dict[str, Any]:
        """For the results file; an op that is refused has no number there."""
        refused = float("inf") if not self.least else 0.0
        measured = None if self.measured is None or self.measured == refused else round(self.measured, 4)
        return {"kind": "verdict", **self._asdict(), "measured": measured, "verdict": self.verdict}

    @property
    def line(self) -> str:
        """A line of the table in the summary."""
        sign = "≥" if self.least else "≤"
        measured = "" if self.measured is None else f"{self.measured:.3g}"
        verdict = f"**{self.verdict}**" if self.verdict == "missed" else self.verdict
        return f"| {self.target} | {sign} {self.limit:g} | {measured} | {self.worst} | {self.n} of {self.of} | {verdict} |"


def verdicts(rows: Sequence[Row], shapes: Shapes, gpu: str) -> list[Verdict]:
    """One for each target, in the order in which they are shown."""
    times = Times(rows)
    return [*_decode(times, shapes, gpu), *_prefill(times, shapes), *_writes(times, shapes), *_bench(rows), *_memory(rows)]


def table(found: Sequence[Verdict]) -> list[str]:
    """Markdown."""
    return ["| target | limit | worst | where | measured | |", "|---|---|---|---|---|---|", *(verdict.line for verdict in found)]


def _judge(target: str, limit: float, values: Iterable[tuple[str, float | None]], *, least: bool = True) -> Verdict:
    all_values = list(values)
    measured = [(value, where) for where, value in all_values if value is not None]
    value, where = (min if least else max)(measured, default=(None, ""))
    return Verdict(target, limit, least, value, where, len(measured), len(all_values))


def _speed(times: Times, case: Case, rivals: Sequence[str]) -> tuple[str, float | None]:
    """Speed over the fastest of other types, in the place that it is measured at."""
    us, others = times.of(case), [times.of(case._replace(types=rival)) for rival in rivals]
    known = [other for other in others if other is not None]
    where = f"head {case.head}, GQA {case.gqa}, {case.queries} x {case.keys}"
    return where, min(known) / us if us is not None and len(known) == len(rivals) else None


def _decode(times: Times, shapes: Shapes, gpu: str) -> Iterator[Verdict]:
    def at(types: str, keys: int) -> list[Case]:
        return [Case("fattn", types, head, gqa, 1, keys) for head in shapes.heads for gqa in shapes.gqas]

    deep = DECODE_LARGE if LARGE_CARDS.search(gpu) else DECODE_OTHER
    for keys, limit in ((shapes.deep, deep), (shapes.short, 1.0)):
        for types in MAIN:
            found = (_speed(times, case, ["f16"]) for case in at(types, keys))
            yield _judge(f"decode {types} at {keys} keys, speed over f16", limit, found)
    for types in TURBO:
        found = (_speed(times, case, RIVALS[1:]) for keys in (shapes.deep, shapes.short) for case in at(types, keys))
        yield _judge(f"decode {types}, speed over q8_0 and q4_0", 1.0, found)
    yield _judge(
        f"decode turbo3t at {shapes.deep} keys, speed over turbo3",
        TRELLIS,
        (_speed(times, case, ["turbo3"]) for case in at("turbo3t", shapes.deep)),
    )


def _prefill(times: Times, shapes: Shapes) -> Iterator[Verdict]:
    for types in TURBO:
        speeds = [_speed(times, Case("fattn", types, shapes.heads[0], shapes.gqas[0], shapes.prompt, shapes.prompt_keys[0]), ["f16"])]
        found = [(where, None if speed is None else float("inf") if speed == 0 else 1 / speed) for where, speed in speeds]
        yield _judge(f"attention of a prompt over {types}, time over f16", PREFILL, found, least=False)


def _writes(times: Times, shapes: Shapes) -> Iterator[Verdict]:
    head = shapes.heads[0]
    for types in TURBO:
        one = times.of(Case("set_rows", types, head, 1, 1, shapes.write_keys))
        found = [(f"head {head}", None if one is None else 2 * one)]
        yield _judge(f"writing K and V of one token as {types}, microseconds of a layer", WRITE_ONE, found, least=False)
    for types in TURBO:
        write = times.of(Case("set_rows", types, head, 1, shapes.prompt, shapes.write_keys))
        read = times.of(Case("fattn", "f16", head, shapes.gqas[0], shapes.prompt, shapes.prompt_keys[0]))
        found = [(f"{shapes.prompt} tokens", None if write is None or not read else 2 * write / read)]
        yield _judge(f"writing a prompt as {types}, time over attention with f16", WRITE_PROMPT, found, least=False)


def _by_depth(rows: Sequence[Row], value: Callable[[Row], float | None], test: str) -> dict[tuple[str, int], float]:
    chosen = ((row, value(row)) for row in rows if row["kind"] == "bench" and row["test"] == test)
    return {(row["types"], row["depth"]): number for row, number in chosen if number is not None}


def _bench(rows: Sequence[Row]) -> Iterator[Verdict]:
    speed = _by_depth(rows, lambda row: row["tokens_per_s"], "decode")
    depth = max((depth for _, depth in speed), default=0)
    for types in MAIN:
        mine, base = speed.get((types, depth)), speed.get(("f16", depth))
        found = [(f"depth {depth}" if depth else "", mine / base if mine is not None and base else None)]
        yield _judge(f"llama-bench decodes {types} at depth, speed over f16", 1.0, found)


def _memory(rows: Sequence[Row]) -> Iterator[Verdict]:
    peak = _by_depth(rows, lambda row: row["peak_mib"], "decode")
    depths = sorted({depth for _, depth in peak})
    for types in TURBO:
        found: list[tuple[str, float | None]] = []
        for depth in depths or [0]:
            mine, other = peak.get((types, depth)), peak.get(("q8_0", depth))
            found.append((f"depth {depth}", mine / other if mine is not None and other else None))
        yield _judge(f"peak memory of {types} over that of q8_0", 1.0, found, least=False)
    beside = _by_depth(rows, lambda row: None if row["peak_mib"] is None else row["peak_mib"] - row["cache_mib"], "decode")
    for types in TURBO:
        both = [beside.get((name, depth)) for name in (types, "f16") for depth in (depths[:1] + depths[-1:])]
        known = [number for number in both if number is not None]
        more = (known[1] - known[0]) - (known[3] - known[2]) if len(known) == 4 and len(depths) > 1 else None
        where = f"depth {depths[0]} to {depths[-1]}" if depths else ""
        yield _judge(f"memory beside the cache of {types}, MiB that it grows by depth more than of f16", FLAT, [(where, more)], least=False)
