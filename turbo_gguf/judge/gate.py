"""From results and thresholds to a verdict per cache type.

A threshold is relative to a competitor measured in the same run (same build, model, text, context, chunks and batch). Errors are
propagated as if the two measurements were independent. They are not (both score the same tokens), so the error of a ratio is
overstated and a verdict is on the cautious side.

Each check ends in one of three ways, with z = ``sigmas`` standard errors:

- ``pass``: value + z·error <= limit,
- ``fail``: value - z·error > limit,
- ``within error``: the run cannot tell; more chunks can. It does not fail the gate, and it is never reported as a pass.

A type may have limits relative to several competitors. It fails when one of its checks fails; it passes when all do. A metric
without a limit is shown, and judges nothing. What makes the *run* unsound is an error and no verdict: a lossy type at or below the
noise floor, or with the very numbers of f16, was not used at all, and upstream's types must come out in the order of their bits.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from turbo_gguf.cache.spec import PLAIN, CacheSpec, parse_types
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import SilentFallback, ToolFailed, UsageError
from turbo_gguf.measure.metrics import GATED, KldStats, Metric, of
from turbo_gguf.measure.result import Result

PASS, FAIL, WITHIN_ERROR, NO_LIMIT = "pass", "fail", "within error", "no limit"

SAME = ("ctx", "chunks", "base_batch", "backend", "build_id", "model_sha256", "text_sha256", "env", "metrics_version")
"""Fields of a case that two results must share to be compared."""

KLD_STEP = 0.5e-6
"""Half of the last digit of the KL divergence in the log: the smallest error that a printed value can have."""

CERTAINLY_LOSSY_BITS = 6.0
"""Types below this many bits per value are far above any noise floor when they are really used; 8 bits may not be."""

COLLAPSED = 0.2
"""Mean KL divergence in nats above which a model says something else: q5_0 and q4_0 both do on a model with biases of K, in any order."""


class Limits(msgspec.Struct, frozen=True):
    """Limits for one type: factors of what ``reference`` shows. :data:`Gate` adds a field per gated metric."""

    reference: str

    def limit(self, name: str) -> float | None:
        """Limit of a metric by its name in a gates file."""
        found = getattr(self, name)
        return None if found is None else float(found)

    @property
    def is_empty(self) -> bool:
        """Whether there is no limit at all."""
        return not any(self.limit(gated.name) for gated in GATED.values())


if TYPE_CHECKING:
    Gate = Limits
else:  # a field per gated metric, so that a wrong name in a gates file is an error
    Gate = msgspec.defstruct(
        "Gate",
        [(gated.name, float | None, None) for gated in GATED.values()],
        bases=(Limits,),
        module=__name__,
        frozen=True,
        forbid_unknown_fields=True,
    )


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A gates file."""

    type: dict[str, Gate | tuple[Gate, ...]]  # a table, or a list of tables that differ in their reference
    sigmas: float = 2.0
    order: tuple[str, ...] = ()

    def of(self, types: CacheSpec) -> tuple[Limits, ...]:
        """Limits for a type, one for each reference."""
        return _tables(self.type.get(str(types), ()))


def _tables(found: Gate | tuple[Gate, ...]) -> tuple[Limits, ...]:
    return found if isinstance(found, tuple) else (found,)


class Check(msgspec.Struct, frozen=True):
    """One number against its limit."""

    name: str
    value: float
    error: float
    limit: float | None  # None: shown only
    status: str
    reference: str = ""  # types that it is relative to; "": none


class Verdict(msgspec.Struct, frozen=True):
    """What the gate says about one type at one context."""

    types: CacheSpec
    ctx: int
    status: str
    checks: tuple[Check, ...]


def load(path: Path) -> Gates:
    """Read and check a gates file. Types come back in their shortest notation, however the file writes them.

    Raises:
        UsageError: the file is missing, is no TOML, or its content is wrong (the field is named).
    """
    try:
        gates = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Gates)
    except OSError as error:
        raise UsageError(f"gates file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"gates file {path}: {error}", "see eval/README.md for the fields") from error
    named: dict[str, tuple[Limits, ...]] = {}
    for name, found in gates.type.items():
        types = str(parse_types(name))
        if types in named:
            raise UsageError(f"gates file {path}: {types} has two tables")
        tables = tuple(msgspec.structs.replace(gate, reference=str(parse_types(gate.reference))) for gate in _tables(found))
        if not tables or any(gate.is_empty for gate in tables):
            raise UsageError(f"gates file {path}: [type.{name}] has no limit: it would pass anything")
        if len({gate.reference for gate in tables}) < len(tables):
            raise UsageError(f"gates file {path}: {types} has two tables with the same reference")
        named[types] = tables
    return msgspec.structs.replace(gates, type=named)


def references(gates: Gates) -> dict[str, tuple[str, ...]]:
    """Type -> the types that its gate compares it with."""
    return {name: tuple(gate.reference for gate in _tables(found)) for name, found in gates.type.items()}


def judge(results: Sequence[Result], gates: Gates) -> list[Verdict]:
    """Verdicts for the results that have a gate, in the order of the results.

    Args:
        results: of one run: same build, model and text; several contexts.
        gates: limits per type.

    Raises:
        SilentFallback: a lossy type is not above the noise floor, or is no other than f16.
        ToolFailed: upstream's own types are out of order.
        UsageError: a result has nothing to be compared with.
    """
    verdicts = []
    for result in results:
        peers = [r for r in results if _comparable(r, result)]
        _check_noise_floor(result, peers)
        limits = gates.of(result.case.types)
        if not limits or result.case.is_noise_floor:
            continue
        _check_order(peers, gates)
        verdicts.append(_verdict(result, [(gate, _reference(result, peers, gate)) for gate in limits], gates.sigmas))
    return verdicts


def _reference(result: Result, peers: Sequence[Result], gate: Limits) -> Result:
    """The result that limits are relative to."""
    found = next((r for r in peers if str(r.case.types) == gate.reference and not r.case.is_noise_floor), None)
    if found is None:
        raise UsageError(f"{result.case.types} at ctx {result.case.ctx}: its reference {gate.reference} was not measured in this run")
    return found


def failed(verdicts: Iterable[Verdict]) -> bool:
    """Whether the gate as a whole fails."""
    return any(verdict.status == FAIL for verdict in verdicts)


def ratio(a: Metric, b: Metric) -> Metric:
    """a / b with its error, for independent a and b. Errors are at least the last printed digit."""
    if b.value <= 0:
        return Metric(math.inf, math.inf)
    value = a.value / b.value
    error_a, error_b = (max(m.error, KLD_STEP) for m in (a, b))
    return Metric(value, math.hypot(error_a / b.value, value * error_b / b.value))


def decide(name: str, measured: Metric, limit: float | None, sigmas: float) -> Check:
    """Compare a value with its upper limit; see the module's text for the three outcomes."""
    margin = sigmas * measured.error
    if limit is None:
        status = NO_LIMIT
    elif not math.isfinite(measured.value) or not math.isfinite(measured.error):
        status = WITHIN_ERROR
    elif measured.value + margin <= limit:
        status = PASS
    else:
        status = FAIL if measured.value - margin > limit else WITHIN_ERROR
    return Check(name, measured.value, measured.error, limit, status)


def _comparable(a: Result, b: Result) -> bool:
    return all(getattr(a.case, name) == getattr(b.case, name) for name in SAME)


def _ratio(ours: KldStats, theirs: KldStats, field: str) -> Metric:
    """A metric of ours to that of the reference, as its row says."""
    gated = GATED[field]
    return ratio(gated.amount(of(ours, field)), of(theirs, gated.over) if gated.over else gated.amount(of(theirs, field)))


def _verdict(result: Result, limits: Sequence[tuple[Limits, Result]], sigmas: float) -> Verdict:
    checks = [
        msgspec.structs.replace(
            decide(gated.title, _ratio(result.stats, reference.stats, field), gate.limit(gated.name), sigmas),
            reference=str(reference.case.types),
        )
        for gate, reference in limits
        for field, gated in GATED.items()
    ]
    bits_ok = result.bits.agrees
    checks.append(Check("bits per value", result.bits.nominal, 0.0, result.bits.nominal, PASS if bits_ok else FAIL))
    statuses = {check.status for check in checks}
    status = FAIL if FAIL in statuses else WITHIN_ERROR if WITHIN_ERROR in statuses else PASS
    return Verdict(result.case.types, result.case.ctx, status, tuple(checks))


def _check_noise_floor(result: Result, peers: Sequence[Result]) -> None:
    """A lossy type that is no worse than the base at another batch size, or no other than f16, did not run.

    f16 itself may be as far from the base as a good type: rounding the activations of a model with quantized weights moves with every
    other sum (docs/design/0015-base-line.md). So a type may be as good as f16, within its error. It can't have the very same numbers.
    """
    types = result.case.types
    bits = result.bits.nominal if types.by_layer else min(cache_type(types.k).bits, cache_type(types.v).bits)
    if bits >= CERTAINLY_LOSSY_BITS or _all_exact(result):
        return
    for floor in peers:
        if floor.case.types == PLAIN and floor.case.batch == result.case.batch and floor.stats == result.stats:
            raise SilentFallback(
                f"{types} at ctx {result.case.ctx}: every number is that of f16, mean KLD {result.stats.mean.value:.6f} among them: "
                f"a cache of {bits:g} bits was not used"
            )
        if floor.case.is_noise_floor and result.stats.mean.value <= floor.stats.mean.value:
            raise SilentFallback(
                f"{types} at ctx {result.case.ctx}: mean KLD {result.stats.mean.value:.6f} is not above the noise floor "
                f"{floor.stats.mean.value:.6f}: a cache of {bits:g} bits cannot be that good, it was not used"
            )


def _all_exact(result: Result) -> bool:
    """Whether the exact tokens that were in force, asked for or by default, are all tokens of the context: nothing is lost then."""
    return all((cache.spec.sink or 0) + (cache.spec.tail or 0) >= result.case.ctx for cache in result.facts.caches)


def _check_order(peers: Sequence[Result], gates: Gates) -> None:
    """Negative control: a measurement that cannot tell upstream's types apart judges nothing. Two that have collapsed, nothing can."""
    found = {str(r.case.types): r.stats.mean for r in peers if not r.case.is_noise_floor}
    names = [name for name in gates.order if name in found]
    for better, worse in pairwise(names):
        a, b = found[better], found[worse]
        if b.value < COLLAPSED and a.value - b.value > gates.sigmas * math.hypot(a.error, b.error):
            raise ToolFailed(
                f"unsound run: mean KLD of {better} ({a.value:.6f}) is above that of {worse} ({b.value:.6f}) at ctx {peers[0].case.ctx}",
                "the build or the machine computes wrongly; nothing was judged",
            )
