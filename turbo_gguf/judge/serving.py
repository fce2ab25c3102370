"""Numbers and tables of serving under load: from records of the store alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.judge.report import Table, types_text
from turbo_gguf.measure.result import Answer, ServeRow


class Load(msgspec.Struct, frozen=True):
    """What so many clients got from the server of a type, over all rounds. Times are in seconds; ``nan`` where nothing was answered."""

    types: CacheSpec
    clients: int
    slots: int
    slot_mib: float
    speed: float  # generated tokens per second, of all clients together
    speed_all: float  # the same with the tokens of prompts
    speed_one: float  # median over the requests of their tokens per second, from sending to the end
    first_p50: float  # from sending to the first token
    first_p99: float
    gap_p50: float  # between tokens
    gap_p99: float
    requests: int
    failures: tuple[str, ...]  # why, of each request that failed
    peak_mib: float | None


def quantile(values: Sequence[float], p: float) -> float:
    """The smallest of the values that a share ``p`` of them does not exceed; of fewer than 100 values p99 is the largest."""
    return sorted(values)[max(0, math.ceil(p * len(values)) - 1)] if values else math.nan


def loads(rows: Sequence[ServeRow]) -> list[Load]:
    """One record for each number of clients and each type, in the order of the rows."""
    groups: dict[tuple[int, CacheSpec], list[ServeRow]] = {}
    for row in rows:
        groups.setdefault((row.clients, row.types), []).append(row)
    return [_load(group) for group in groups.values()]


def _load(rows: Sequence[ServeRow]) -> Load:
    first, seconds = rows[0], sum(row.seconds for row in rows)
    answers = [answer for row in rows for answer in row.answers]
    good = [answer for answer in answers if not answer.error]
    waits = [answer.first for answer in good if answer.first is not None]
    gaps = [gap for answer in good for gap in answer.gaps]
    return Load(
        types=first.types,
        clients=first.clients,
        slots=first.slots,
        slot_mib=first.slot_mib,
        speed=sum(answer.tokens for answer in good) / seconds,
        speed_all=sum(answer.tokens + answer.prompt for answer in good) / seconds,
        speed_one=quantile([_speed(answer) for answer in good], 0.5),
        first_p50=quantile(waits, 0.5),
        first_p99=quantile(waits, 0.99),
        gap_p50=quantile(gaps, 0.5),
        gap_p99=quantile(gaps, 0.99),
        requests=len(answers),
        failures=tuple(answer.error for answer in answers if answer.error),
        peak_mib=max((row.peak_mib for row in rows if row.peak_mib is not None), default=None),
    )


def _speed(answer: Answer) -> float:
    return answer.tokens / answer.seconds if answer.seconds > 0 else math.inf


def base_of(found: Sequence[Load], load: Load) -> Load | None:
    """What the same clients got with f16."""
    return next((other for other in found if other.types == PLAIN and other.clients == load.clients), None)


Amount = Callable[[Load], float]

PANELS: tuple[tuple[str, bool, Amount], ...] = (
    ("generated tokens per second", False, lambda load: load.speed),
    ("seconds to the first token, p99", True, lambda load: load.first_p99),
    ("seconds between tokens, p99", True, lambda load: load.gap_p99),
)
"""Panels of a plot: what, whether on a log scale, the number."""


def table(rows: Sequence[ServeRow]) -> str:
    """What fits into the budget, then a table for each number of clients."""
    found = loads(rows)
    parts = [f"{measured_on(rows)}.\n", f"{fits(found)}\n", *(f"### {title}\n\n{shown}\n" for title, shown in load_tables(found).items())]
    if shown := failures(found):
        parts.append(f"### Failures\n\n{shown}\n")
    return "\n".join(parts)


def measured_on(rows: Sequence[ServeRow]) -> str:
    """What all loads of a sweep share."""
    first = rows[0]
    return (
        f"{first.model}; slots of {first.ctx} tokens in {first.budget_mib:.1f} MiB of KV memory, copies of exact tokens included; "
        f"prompts of {_lengths(rows)} tokens, {_generated(rows)} generated; {first.backend}, {_many(first.threads, 'thread')}, "
        f"llama.cpp {first.upstream_commit[:12]}, patches {first.patch_digest[:12] or 'none'}"
    )


def load_tables(found: Sequence[Load]) -> dict[str, Table]:
    """A table for each number of clients, by its title."""
    tables = {}
    for clients in dict.fromkeys(load.clients for load in found):
        group = [load for load in found if load.clients == clients]
        title = f"{_many(clients, 'client')}, {_many(max(load.requests for load in group), 'request')} (ratio to {PLAIN})"
        tables[title] = _table(group)
    return tables


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _lengths(rows: Sequence[ServeRow]) -> str:
    return ", ".join(f"{length:,}" for length in sorted({answer.prompt for row in rows for answer in row.answers}))


def _generated(rows: Sequence[ServeRow]) -> str:
    """What was asked for: a few more come where a character ends later."""
    return str(min((answer.tokens for row in rows for answer in row.answers if not answer.error), default=0))


def fits(found: Sequence[Load]) -> Table:
    """How many slots of each type the budget holds."""
    types = {load.types: load for load in found}
    rows = ((types_text(load.types), f"{load.slot_mib:.2f}", str(load.slots)) for load in types.values())
    return Table(("cache K/V", "MiB of a slot", "slots that fit"), tuple(rows))


HEADER = ("cache K/V", "tokens/s", "with prompts", "of one", "first token p50", "p99", "between tokens p50", "p99", "failed", "peak MiB")


def _table(group: Sequence[Load]) -> Table:
    body = []
    for load in group:
        base = base_of(group, load)
        body.append(
            (
                types_text(load.types),
                _number(load.speed, 1) + _ratio(load, base, "speed"),
                _number(load.speed_all, 0),
                _number(load.speed_one, 1) + _ratio(load, base, "speed_one"),
                _seconds(load.first_p50),
                _seconds(load.first_p99) + _ratio(load, base, "first_p99"),
                _seconds(load.gap_p50),
                _seconds(load.gap_p99) + _ratio(load, base, "gap_p99"),
                str(len(load.failures)),
                "" if load.peak_mib is None else f"{load.peak_mib:.0f}",
            )
        )
    return Table(HEADER, tuple(body))


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _seconds(value: float) -> str:
    """``35 ms``, ``1.2 s``."""
    if math.isnan(value):
        return ""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _ratio(load: Load, base: Load | None, field: str) -> str:
    """A number relative to that of the base, in parentheses."""
    value, other = (math.nan if one is None else float(getattr(one, field)) for one in (load, base))
    return f" ({value / other:.2f})" if math.isfinite(value) and math.isfinite(other) and other > 0 else ""


def failures(found: Sequence[Load]) -> Table | None:
    """How often each reason was given; ``None`` where nothing failed."""
    rows = tuple(
        (types_text(load.types), str(load.clients), str(load.failures.count(why)), why)
        for load in found
        for why in dict.fromkeys(load.failures)
    )
    return Table(("cache K/V", "clients", "requests", "reason"), rows) if rows else None
