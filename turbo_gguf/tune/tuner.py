"""A whole search: calibration, types, tail, speed, and what came of it on text that none of them saw."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import msgspec

from turbo_gguf.cache import spec
from turbo_gguf.cache.settings import AUTO, NONE, OFF, CalibrationChoice
from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.cache.types import SCALAR, TRELLIS, cache_type
from turbo_gguf.errors import UsageError
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result
from turbo_gguf.plan import architectures, memory
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.shape import Shape
from turbo_gguf.tune import rivals
from turbo_gguf.tune.meter import Meter
from turbo_gguf.tune.places import Allocation, Place, bits, places, total, values
from turbo_gguf.tune.search import Search

WIDE = {"CPU": ("q5_0", "q8_0")}
"""Types beside ours, for a place that needs more bits than they have, by backend."""

WIDE_ELSEWHERE = ("q8_0",)
"""A GPU has no decode kernels for q5_0 beside ours."""

DEFAULTS = msgspec.structs.replace(spec.with_defaults(CacheSpec(TRELLIS[0], TRELLIS[0])), k=PLAIN.k, v=PLAIN.v)
"""Settings of all runs: what turbo types have by default, written out, since f16 has no defaults."""

TAILS = (32, 128)
"""Others that are tried at the winner."""

CALIBRATION_CHUNKS = 4
"""So many times as many chunks as for a price are read to compare calibrations, which differ little."""

_SHOWN = 3
"""Rivals that are measured on unseen text."""

_MOST_TRIES = 5
"""Allocations that are measured for a limit of loss."""

Say = Callable[[str], None]


class Goal(msgspec.Struct, frozen=True):
    """What is asked for: one of the three."""

    bits: float | None = None  # per value at most, without copies
    bytes: int | None = None  # of KV caches and copies at most, in the context
    max_kld: float | None = None  # nats at most, for the least memory


class Subject(msgspec.Struct, frozen=True):
    """What is searched: a model in a context, and how it is measured."""

    shape: Shape
    context: Context
    backend: str
    cheap: Meter  # for prices: unpacked weights, few tokens
    real: Meter  # for a limit of loss: the file itself, on the same text
    unseen: Meter  # for the end result: the file itself, on text of its own
    calibrate: Callable[[], CalibrationChoice] | None  # makes one from a text of its own; None: the automatic one is taken


class Row(msgspec.Struct, frozen=True):
    """A line of evidence, on unseen text."""

    about: str
    types: CacheSpec
    bits: float
    kld: Metric


WINNER, RIVAL, SAME_CALIBRATION, FLOOR = "tuned", "uniform", "uniform, with this calibration", "f16"
"""What rows of evidence are about."""


class Outcome(msgspec.Struct, frozen=True):
    """What a search came to."""

    types: CacheSpec
    bits: float
    rows: tuple[Row, ...]  # the winner first, f16 last
    additive: dict[str, float]  # of each side, how far losses add up
    asked: float  # bits per value
    tokens: int  # scored, of unseen text
    ctx: int  # of a chunk of it

    @property
    def winner(self) -> Row:
        """What was searched for."""
        return self.rows[0]

    @property
    def rivals(self) -> tuple[Row, ...]:
        """Types by hand."""
        return tuple(row for row in self.rows if row.about == RIVAL)

    @property
    def equal(self) -> Row | None:
        """The best one that takes no more bits."""
        return min((row for row in self.rivals if row.bits <= self.asked + 1e-9), key=lambda row: row.kld.value, default=None)

    @property
    def gain(self) -> Metric | None:
        """By which part the winner loses less than :attr:`equal`, with its standard error."""
        return None if self.equal is None else gain(self.winner.kld, self.equal.kld)


def gain(found: Metric, over: Metric) -> Metric:
    """By which part a loss is less than another one. Both are of the same tokens, so the error is too large rather than too small."""
    ratio = found.value / over.value
    return Metric(1 - ratio, ratio * math.hypot(found.error / found.value, over.error / over.value))


def candidates(shape: Shape, families: Sequence[Sequence[str]], wide: Sequence[str]) -> tuple[str, ...]:
    """Types of the first family that the head sizes allow, and wide ones.

    Raises:
        UsageError: no family does.
    """
    why = "no cache type was named"
    for family in families:
        fits = []
        for name in (*family, *wide):
            if not (why_not := memory.why_not(shape, CacheSpec(name, name))):
                fits.append(name)
            why = why_not or why
        if set(family) & set(fits):
            return tuple(fits)
    raise UsageError(f"this model can have none of our types: {why}")


class Tuner:
    """Searches one subject."""

    def __init__(self, subject: Subject, *, minutes: float, say: Say, speed: Callable[[CacheSpec], float] | None = None) -> None:
        """Take what is searched.

        Args:
            subject: the model and its meters.
            minutes: after which no further round begins.
            say: gets words about progress.
            speed: measures tokens per second of decoding.
        """
        self._subject, self._say, self._speed = subject, say, speed
        self._until = time.monotonic() + 60 * minutes
        self.where: tuple[Place, ...] = places(subject.shape, subject.context)
        if not self.where:
            raise UsageError("this model has no layer that can have a cache type of its own")

    def run(self, goal: Goal, *, target_tps: float | None = None) -> Outcome:
        """Search, and measure what came out on unseen text.

        Raises:
            UsageError: no allocation is so small, or loses so little, or none is so fast.
        """
        families = [TRELLIS, SCALAR]
        speeds: list[str] = []
        while True:
            types = candidates(self._subject.shape, families, WIDE.get(self._subject.backend, WIDE_ELSEWHERE))
            settings = self._settings()
            self._require_possible(types, settings, goal)
            self._subject.unseen.results([PLAIN])  # a text that is too short ends the search here; in the end it is in the store
            search = self._search(types, self._calibrated(types, settings))
            found = self._for_loss(search, goal.max_kld) if goal.max_kld is not None else self._for_bytes(search, goal)
            if target_tps is None or self._speed is None:
                break
            speed = self._speed(found)
            speeds.append(f"{found.k}: {speed:.1f}")
            self._say(f"{speed:.1f} tokens per second, {target_tps:g} are asked for")
            if speed >= target_tps:
                break
            families = families[families.index(_family(types)) + 1 :]
            if not families:
                raise UsageError(
                    f"no allocation decodes {target_tps:g} tokens per second: measured are {'; '.join(speeds)}",
                    "lower --target-tps, or a shorter --ctx",
                )
        return self._proved(search, found, goal)

    # --- settings ---------------------------------------------------------------------------------------------------------

    def _settings(self) -> CacheSpec:
        """Of all runs: what turbo types have by default, written out."""
        if self._subject.shape.arch in architectures.OWN_ATTENTION:  # which has neither calibration nor exact tokens
            return CacheSpec(PLAIN.k, PLAIN.v, calibration=NONE, sink=0, tail=0)
        return DEFAULTS

    def _calibrated(self, types: Sequence[str], settings: CacheSpec) -> CacheSpec:
        """Settings with the better calibration: the automatic one, or one from a part of the text."""
        if self._subject.calibrate is None or settings.calibration != AUTO:
            return settings
        made = self._subject.calibrate()
        middle = sorted(types, key=lambda name: cache_type(name).bits)[1]  # of three of a family
        both = [msgspec.structs.replace(settings, k=middle, v=middle, calibration=one) for one in (AUTO, made)]
        self._say(f"calibration: automatic, or from a part of the text, with {middle}")
        automatic, own = (stats.mean for stats in self._subject.cheap.times(CALIBRATION_CHUNKS)(both))
        better = own.value + math.hypot(own.error, automatic.error) < automatic.value
        self._say(f"automatic {_text(automatic)}, from the text {_text(own)}: {'that is taken' if better else 'automatic is taken'}")
        return msgspec.structs.replace(settings, calibration=made if better else AUTO)

    def _bits_of(self, size: float) -> float:
        return 8 * size / values(self.where)

    def _search(self, types: Sequence[str], settings: CacheSpec) -> Search:
        return Search(self.where, types, settings, self._subject.cheap, say=self._say, until=self._until)

    # --- types ------------------------------------------------------------------------------------------------------------

    def _limit(self, goal: Goal, settings: CacheSpec) -> float:
        """Bytes that types may take. Copies of other exact tokens than those by default are paid from it."""
        if goal.bits is not None:
            return goal.bits / 8 * values(self.where) - self._extra(settings) + 1e-6
        assert goal.bytes is not None
        return goal.bytes - self._copies(settings)

    def _extra(self, settings: CacheSpec) -> int:
        """Bytes of copies beyond those that turbo types have by default."""
        return self._copies(settings) - self._copies(msgspec.structs.replace(settings, sink=DEFAULTS.sink, tail=DEFAULTS.tail))

    def _copies(self, settings: CacheSpec) -> int:
        return memory.copies_bytes(self._subject.shape, settings, self._subject.context)

    def _require_possible(self, types: Sequence[str], settings: CacheSpec, goal: Goal) -> None:
        """Refuse what can't be had, before prices are measured for it.

        Raises:
            UsageError: the smallest allocation is too large, or f16 itself loses too much.
        """
        if goal.max_kld is not None:
            self._floor(settings, goal.max_kld)
            return
        limit, smallest = self._limit(goal, settings), min(types, key=lambda name: cache_type(name).bits)
        everywhere = tuple(smallest for _ in self.where)
        if total(self.where, everywhere) > limit:
            raise UsageError(
                f"no allocation takes {max(self._bits_of(limit), 0.0):.3f} bits per value or less: "
                f"{smallest} everywhere takes {bits(self.where, everywhere):g}",
                "give more --bits or --memory, or a shorter --ctx",
            )

    def _floor(self, settings: CacheSpec, limit: float) -> float:
        """What f16 loses on the file itself.

        Raises:
            UsageError: as much as the limit, or more.
        """
        floor = self._subject.real([msgspec.structs.replace(settings, k=PLAIN.k, v=PLAIN.v)])[0].mean.value
        if floor >= limit:
            raise UsageError(f"f16 itself loses {floor:.4f} on this model, {limit:g} are asked for", "give more --max-kld")
        return floor

    def _for_bytes(self, search: Search, goal: Goal) -> CacheSpec:
        """The least loss within bytes, then with other tails where they are better."""
        limit = self._limit(goal, search.settings)
        best = search.best(lambda: search.within(limit))
        assert best is not None  # the smallest allocation is within it
        found, loss = search.spec(best.allocation), best.stats.mean
        for tail in TAILS if search.settings.tail else ():
            settings = msgspec.structs.replace(search.settings, tail=tail)
            limit = self._limit(goal, settings)
            other = search.within(limit)
            if other is None:
                continue
            asked = msgspec.structs.replace(search.spec(other), tail=tail)
            other_loss = self._subject.cheap([asked])[0].mean
            better = other_loss.value + math.hypot(other_loss.error, loss.error) < loss.value
            taken = ", which is taken" if better else ""
            self._say(f"tail {tail}, and {self._bits_of(limit):.3f} bits per value: {_text(other_loss)}{taken}")
            if better:
                found, loss = asked, other_loss
        return found

    def _for_loss(self, search: Search, limit: float) -> CacheSpec:
        """The fewest bytes that lose so much at most on the file itself, where packed weights add noise."""
        floor = self._floor(search.settings, limit)
        room = limit - floor
        best = search.best(lambda: search.at_most(limit - floor))
        asked = None if best is None else best.allocation
        passing: Allocation | None = None
        for _ in range(_MOST_TRIES):
            if asked is None:
                break
            measured = self._subject.real([search.spec(asked)])[0].mean
            size = bits(self.where, asked)
            self._say(f"{size:.3f} bits per value: {_text(measured)} on the file itself, {limit:g} are asked for")
            if measured.value <= limit and (passing is None or size < bits(self.where, passing)):
                passing = asked
            scale = (limit - floor) / max(measured.value - floor, 1e-9)
            if 0.95 <= scale <= 1.05 and passing is not None:
                break
            room *= scale
            asked = search.at_most(room)
        if passing is None:
            widest = cache_type(search.types[-1])
            raise UsageError(f"no allocation loses {limit:g} or less: not even {widest.name} everywhere", "give more --max-kld")
        return search.spec(passing)

    # --- evidence ---------------------------------------------------------------------------------------------------------

    def _proved(self, search: Search, found: CacheSpec, goal: Goal) -> Outcome:
        """Measure the winner and types by hand on unseen text. Which ones is decided where prices were measured, as a user would."""
        asked = goal.bits if goal.bits is not None else self.bits(found)
        as_typed = "" if search.settings.tail else OFF
        pairs = [spec.with_settings(pair, as_typed) for pair in rivals.near(self.where, asked, self._can_have)]
        self._say(f"rivals: {len(pairs)} pairs of types near {asked:.3f} bits per value")
        losses = [stats.mean.value for stats in self._subject.cheap(pairs)]
        shown = self._shown(pairs, losses, asked)
        extra = []
        if found.calibration != AUTO and shown:
            extra = [msgspec.structs.replace(shown[0], calibration=found.calibration)]
        named = [(WINNER, found), *((RIVAL, pair) for pair in shown), *((SAME_CALIBRATION, one) for one in extra), (FLOOR, PLAIN)]
        self._say("unseen text: the winner, the best rivals, and f16")
        results = self._subject.unseen.results([types for _, types in named])
        rows = tuple(Row(about, types, self.bits(types), result.stats.mean) for (about, types), result in zip(named, results, strict=True))
        first: Result = results[0]
        return Outcome(found, self.bits(found), rows, search.prices.additive, asked, first.stats.tokens, first.case.ctx)

    def _shown(self, pairs: Sequence[CacheSpec], losses: Sequence[float], asked: float) -> list[CacheSpec]:
        """The best two that take no more bits, and the best one of those that take more."""
        ranked = [pair for _, pair in sorted(zip(losses, pairs, strict=True), key=lambda ranked: ranked[0])]
        equal = [pair for pair in ranked if rivals.bits_of(self.where, pair) <= asked + 1e-9]
        more = [pair for pair in ranked if pair not in equal]
        return [*equal[: _SHOWN - 1], *more[: _SHOWN - len(equal[: _SHOWN - 1])][:1]]

    def bits(self, types: CacheSpec) -> float:
        """Bits per value of a cache, without the copies that turbo types have by default. What a longer tail takes counts."""
        k, v = spec.layer_types(types, len(self._subject.shape.numbers))
        own = bits(self.where, tuple((k if place.side == "k" else v)[place.layer] for place in self.where))
        return own + (self._bits_of(self._extra(types)) if types.tail is not None else 0.0)

    def _can_have(self, types: CacheSpec) -> bool:
        return not memory.why_not(self._subject.shape, types)


def _family(types: Sequence[str]) -> tuple[str, ...]:
    return TRELLIS if set(types) & set(TRELLIS) else SCALAR


def _text(loss: Metric) -> str:
    return f"{loss.value:.6f} ± {loss.error:.6f}"
