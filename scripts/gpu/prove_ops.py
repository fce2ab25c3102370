"""The single ops that a proof times with test-turbo-perf: their cases, the most telling first, and the rows that it prints.

A row of a results file is a dictionary; an op's has the fields of :class:`Case`, ``us`` (median microseconds), ``bytes`` and ``status``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

KV_HEADS = 8
RIVALS = ("f16", "q8_0", "q4_0")
TURBO = ("turbo3", "turbo4t", "turbo3t", "turbo4")
"""Of each family the types that have targets; turbo2 and turbo2t go the ways of turbo3 and turbo3t."""
TYPES = (*RIVALS, *TURBO)


class Case(NamedTuple):
    """One op on one shape; K and V have the same type."""

    op: str  # fattn or set_rows
    types: str
    head: int
    gqa: int
    queries: int  # or rows to write
    keys: int
    exact: int = 0  # of the keys, the last ones, in f16
    variant: str = ""  # of the environment: how launches are made, which kernels are taken

    @property
    def line(self) -> str:
        """The case as the program reads it."""
        exact = f" 1 {self.exact}" if self.exact else ""
        return f"{self.op} {self.types} {self.types} {self.head} {KV_HEADS} {self.gqa} {self.queries} {self.keys}{exact}"


class Shapes(NamedTuple):
    """Sizes of a proof: those of the targets, or small ones to try it on a CPU."""

    heads: tuple[int, ...]
    gqas: tuple[int, ...]
    other_gqas: tuple[int, ...]  # which no target is about
    other_head: int
    deep: int  # keys of the main target
    short: int
    deepest: int
    batches: tuple[int, ...]  # queries at once, as in verification of drafts
    batch_keys: int
    prompt: int  # queries of a prefill
    prompt_keys: tuple[int, ...]
    write_keys: int


FULL = Shapes((128, 256), (4, 8, 16), (1, 2), 64, 65536, 4096, 262144, (2, 4, 8, 16), 16384, 512, (32768, 131072), 8192)
SMALL = Shapes((64,), (1, 2), (4,), 128, 512, 256, 1024, (2, 4), 256, 16, (512, 768), 256)
EXACT = 96
"""Exact tokens as turbo types have them by default: sink 4, tail 64, and 16 for a batch, in multiples of 32."""


def cases(shapes: Shapes) -> Iterator[Case]:
    """All cases; those that are compared stand next to each other."""
    main = shapes.heads[0]
    for keys in (shapes.deep, shapes.short):
        for head in shapes.heads:
            for gqa in shapes.gqas:
                yield from (Case("fattn", types, head, gqa, 1, keys) for types in TYPES)
    for keys in shapes.prompt_keys:
        yield from (Case("fattn", types, main, shapes.gqas[0], shapes.prompt, keys) for types in TYPES)
    for rows in (1, shapes.prompt):
        yield from (Case("set_rows", types, main, 1, rows, shapes.write_keys) for types in TYPES)
    for keys in (shapes.deep, shapes.short):
        yield from (Case("fattn", types, main, shapes.gqas[1], 1, keys, EXACT) for types in TURBO)
    for gqa in shapes.gqas[:2]:
        for queries in shapes.batches:
            yield from (Case("fattn", types, main, gqa, queries, shapes.batch_keys) for types in ("f16", *TURBO))
    for gqa in shapes.other_gqas:
        yield from (Case("fattn", types, main, gqa, 1, shapes.deep) for types in ("f16", *TURBO))
    yield from (Case("fattn", types, shapes.other_head, shapes.gqas[1], 1, shapes.deep) for types in ("f16", "turbo3", "turbo3t"))
    yield from (Case("fattn", types, main, shapes.gqas[1], 1, shapes.deepest) for types in TYPES)


LAUNCHES: dict[str, dict[str, str]] = {
    "no PDL": {"GGML_CUDA_PDL": "0"},
    "no graphs": {"GGML_CUDA_DISABLE_GRAPHS": "1"},
    "neither": {"GGML_CUDA_PDL": "0", "GGML_CUDA_DISABLE_GRAPHS": "1"},
}
"""What of launching is switched off, and how."""
NO_MATRICES = "no matrix instructions"
VARIANTS = {**LAUNCHES, NO_MATRICES: {"GGML_TURBO_CUDA_DECODE": "dp4a"}}
"""Those, and decode by the kernels that use no matrix instructions."""


def variant_cases(shapes: Shapes, variant: str) -> Iterator[Case]:
    """Decode in one of the variants; where it is about launches, short ops, in which they count."""
    main, gqa = shapes.heads[0], shapes.gqas[1]
    if variant == NO_MATRICES:
        for other in shapes.gqas:
            yield from (Case("fattn", types, main, other, 1, shapes.deep, variant=variant) for types in ("turbo3", "turbo3t"))
        return
    for keys in (shapes.short, shapes.deep):
        yield from (Case("fattn", types, main, gqa, 1, keys, variant=variant) for types in ("f16", "turbo3", "turbo3t"))
    yield Case("fattn", "turbo3", main, gqa, 1, shapes.short, EXACT, variant)
    yield from (Case("set_rows", types, main, 1, 1, shapes.write_keys, variant=variant) for types in ("f16", "turbo3", "turbo3t"))


def row(case: Case, line: str) -> dict[str, Any]:
    """The row of a line that the program printed for a case."""
    said = json.loads(line)
    return {"kind": "op", **case._asdict(), **{key: said[key] for key in ("us", "us_min", "us_max", "bytes", "status")}}


def case_of(found: Mapping[str, Any]) -> Case:
    """The case that a row is about."""
    return Case(*(found[name] for name in Case._fields))


class Times:
    """Microseconds by case, of rows that were measured."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = {case_of(found): found for found in rows if found["kind"] == "op"}

    def of(self, case: Case) -> float | None:
        """Median, infinite where the op is refused, ``None`` where it was not measured or crashed."""
        found = self._rows.get(case)
        if found is None or found["status"] == "crashed":
            return None
        return float(found["us"]) if found["status"] == "ok" else float("inf")

    def table(self, op: str, *, decode: bool, variant: str = "") -> list[str]:
        """Markdown: a line per shape, a column per type, with the speed against f16 in brackets."""
        chosen = [case for case in self._rows if case.op == op and (case.queries == 1) == decode and case.variant == variant]
        if not chosen:
            return []
        present = [types for types in TYPES if any(case.types == types for case in chosen)]
        lines = [
            f"| head | GQA | {'queries' if op == 'fattn' else 'rows'} | keys | {' | '.join(present)} |",
            "|---" * (len(present) + 4) + "|",
        ]
        for shape in dict.fromkeys(case._replace(types="") for case in chosen):
            base = self.of(shape._replace(types="f16", exact=0)) or self.of(shape._replace(types="f16", exact=0, variant=""))
            cells = [self._cell(shape._replace(types=types), base) for types in present]
            keys = f"{shape.keys}, {shape.exact} exact" if shape.exact else f"{shape.keys}"
            lines.append(f"| {shape.head} | {shape.gqa} | {shape.queries} | {keys} | {' | '.join(cells)} |")
        return lines

    def _cell(self, case: Case, base: float | None) -> str:
        us = self.of(case)
        if us is None or us == float("inf"):
            return str(self._rows[case]["status"]) if case in self._rows else ""
        return f"{us:.1f}" + (f" ({base / us:.2f})" if base else "")
