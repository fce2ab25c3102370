"""What each cache type takes, the longest context that fits, and which type to serve with.

A build that is here is asked for a model that is here (:mod:`turbo_gguf.plan.dry_run`); else all comes from the header, and is an estimate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from turbo_gguf import assets
from turbo_gguf.cache import spec
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cache.types import RIVALS, SCALAR, TRELLIS
from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.inputs.headers import Header
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.plan import devices, dry_run, memory
from turbo_gguf.plan.devices import Device
from turbo_gguf.plan.dry_run import DryRun
from turbo_gguf.plan.memory import PAD, Context, Memory
from turbo_gguf.plan.shape import Shape, shape_of

MARGIN = 1 << 30
"""What is left of the memory of this machine: upstream's --fit leaves as much."""

MOST_PROBES = 6
"""Dry runs for the longest context of a type."""

_MIB = 1 << 20


class Budget(msgspec.Struct, frozen=True):
    """Memory that there is."""

    bytes: int
    about: str


class Row(msgspec.Struct, frozen=True):
    """A cache type on a model."""

    types: CacheSpec
    refusal: str = ""  # why the model can't have it; then nothing else is told
    per_token: float = 0
    memory: Memory = Memory(0)
    charged: int = 0  # of the budget: all memory, or that of the devices where there are some
    longest: int = 0  # tokens of a slot; 0: none fits


class Plan(msgspec.Struct, frozen=True):
    """What was found."""

    rows: tuple[Row, ...]
    context: Context
    budget: Budget
    estimated: bool
    note: str = ""


class Choice(msgspec.Struct, frozen=True):
    """What to serve with."""

    types: CacheSpec
    context: Context
    charged: int  # of the budget
    budget: Budget
    too_large: tuple[CacheSpec, ...] = ()  # better ones that do not fit


class Planner:
    """Plans contexts of one model.

    Attributes:
        estimated: whether numbers come from the header alone.
        on: devices that were named.
        shape: of the model; ``None`` where its architecture is not known here, and the build tells all.
    """

    def __init__(self, header: Header, *, server: Path | None, backend: str, on: Sequence[Device] = (), extra: Sequence[str] = ()) -> None:
        """Take a model.

        Args:
            header: of the model.
            server: llama-server of a build, ``None`` where there is none.
            backend: that the build runs on.
            on: devices of the build to take; none: those that llama.cpp takes by itself.
            extra: options of llama-server that the user adds.

        Raises:
            UsageError: the architecture is not known, and no build can be asked; or the model has no KV cache.
        """
        self._header, self._backend, self._extra = header, backend, tuple(extra)
        self.on = tuple(on)
        self._program = server
        self._server = server if header.path else None
        self.estimated = self._server is None
        self.shape: Shape | None
        try:
            self.shape = shape_of(header.fields, header.tensors)
        except UsageError:
            if self.estimated:
                raise
            self.shape = None
        if self.shape and not self.shape.has_cache:
            raise UsageError(f"{header.name} ({self.shape.arch}) has no KV cache: there is no type to choose")
        self.difference = ""
        self._asked: dict[tuple[CacheSpec, Context], DryRun] = {}

    @property
    def trained(self) -> int:
        """Tokens that the model was trained for."""
        arch = self._header.fields.get("general.architecture", "")
        return max(int(self._header.fields.get(f"{arch}.context_length", 0)), PAD)

    def args(self, types: CacheSpec, context: Context) -> list[str]:
        """Options of llama-server for a context, without the model."""
        pool = ["-kvu"] if context.unified else ["-no-kvu"] if context.parallel > 1 else []
        return [
            *("-c", str(context.total), "-np", str(context.parallel), *pool),
            *spec.options(types),
            *gpu_layers(self._backend),
            *(("-dev", ",".join(device.name for device in self.on)) if self.on else ()),
            *self._extra,
        ]

    def command(self, types: CacheSpec, context: Context) -> list[str]:
        """What to type."""
        return ["llama-server", "-m", str(self._header.path or "MODEL.gguf"), *self.args(types, context)]

    def ask(self, types: CacheSpec, context: Context) -> DryRun:
        """The dry run of a context.

        Raises:
            UsageError: the model can't have it.
            ToolFailed: the server crashed.
        """
        assert self._server is not None
        if (types, context) not in self._asked:
            args = ["-m", str(self._header.path), *self.args(types, context)]
            self._asked[types, context] = dry_run.ask(self._server, args, name=assets.home() / "logs" / "plan-dry-run")
        return self._asked[types, context]

    def memory(self, types: CacheSpec, context: Context) -> Memory:
        """What a context takes.

        Raises:
            UsageError: the model can't have it.
        """
        if self.shape and (reason := memory.why_not(self.shape, types)):
            raise UsageError(reason)
        if self._server is None:
            assert self.shape is not None
            return memory.estimate(self.shape, types, context)
        run = self.ask(types, context)
        if self.shape is None:
            return Memory(run.kv, run.copies, 0, run.state, run.model + run.repacked, run.compute)
        return self._exact(self.shape, types, context, run)

    def _exact(self, shape: Shape, types: CacheSpec, context: Context, run: DryRun) -> Memory:
        """A dry run with the digits that its log rounds away, where the header agrees with it."""
        header = memory.estimate(shape, types, context)
        kv = header.kv if dry_run.same_kv(memory.kv_bytes(shape, types, context), run) else run.kv
        if kv != header.kv:
            self.difference = f"llama-server plans {_mib(kv)} of KV cache for {types}, the header's formula {_mib(header.kv)}"
        copies = header.copies if abs(header.copies - run.copies) < len(run.mib) * _MIB // 100 else run.copies
        weights = shape.weights if 0 <= shape.weights - run.model < len(run.devices) * _MIB else run.model
        state = header.state if abs(header.state - run.state) < 3 * _MIB // 100 else run.state
        return Memory(kv, copies, header.calibration, state, weights + run.repacked, run.compute)

    def charged(self, types: CacheSpec, context: Context) -> int:
        """What counts against the budget: of devices with a memory of their own what lies there, else everything."""
        found = self.memory(types, context)
        devices = [device for device in self.ask(types, context).devices if device.free is not None] if self._server else []
        return sum(device.used for device in devices) * _MIB if devices else found.total

    def budget(self, asked: int | None, types: Sequence[CacheSpec], context: Context) -> Budget:
        """The memory that was asked for, or that is free here.

        Raises:
            EnvironmentMissing: the system does not say.
        """
        if asked is not None:
            return Budget(asked, "as asked for")
        if found := self.on or (devices.listed(self._program) if self._program and self.estimated else ()):
            return _free_on({device.name: device.free for device in found}, sum(device.total for device in found))
        if self._server:
            run = next(self._runs(types, context), None)
            free = {device.name: device.free * _MIB for device in run.devices if device.free is not None} if run else {}
            if free:
                return _free_on(free)
        return Budget(max(_available() - MARGIN, 0), "free here, less 1 GiB")

    def _runs(self, types: Sequence[CacheSpec], context: Context) -> Iterator[DryRun]:
        for one in types:
            try:
                self.memory(one, context)
            except UsageError:
                continue
            yield self.ask(one, context)

    def row(self, types: CacheSpec, context: Context, budget: Budget) -> Row:
        """All about a type, a refusal too."""
        try:
            found = self.memory(types, context)
        except UsageError as error:
            return Row(types, error.message)
        per_token = memory.per_token(self.shape, types) if self.shape else found.kv / (context.cells * context.streams)
        return Row(types, "", per_token, found, self.charged(types, context), self.longest(types, context, budget))

    def longest(self, types: CacheSpec, context: Context, budget: Budget) -> int:
        """Tokens of a slot that fit, at most those that the model was trained for."""

        def charged(ctx: int) -> int:
            return self.charged(types, msgspec.structs.replace(context, ctx=ctx))

        return longest(charged, budget.bytes, max(self.trained // PAD * PAD, PAD), probes=1000 if self.estimated else MOST_PROBES)

    def plan(self, types: Sequence[CacheSpec], context: Context, memory_bytes: int | None) -> Plan:
        """All types."""
        budget = self.budget(memory_bytes, types, context)
        rows = tuple(self.row(one, context, budget) for one in types)
        return Plan(rows, context, budget, self.estimated, self.difference)

    def choose(self, types: Sequence[CacheSpec], context: Context, memory_bytes: int | None, *, fixed: bool) -> Choice:
        """The first type that fits.

        Args:
            types: the best one first.
            context: that is wanted.
            memory_bytes: that there are; ``None``: what is free.
            fixed: its tokens were asked for. Else the first type is taken, with as many as fit.

        Raises:
            UsageError: the model can have none of the types.
            EnvironmentMissing: nothing fits.
        """
        allowed, reason = self._allowed(types, context)
        if not allowed:
            raise UsageError(f"{self._header.name} can have none of {', '.join(map(str, types))}: {reason}")
        budget = self.budget(memory_bytes, allowed, context)
        too_large: list[CacheSpec] = []
        for one in allowed:
            if not fixed and (tokens := self.longest(one, context, budget)):
                context = msgspec.structs.replace(context, ctx=min(tokens, context.ctx))
            if (charged := self.charged(one, context)) <= budget.bytes:
                return Choice(one, context, charged, budget, tuple(too_large))
            too_large.append(one)
        least = self.longest(allowed[-1], context, budget)
        message = f"{context.ctx:,} tokens in {allowed[-1]} take {_mib(charged)}, and there are {_mib(budget.bytes)} ({budget.about})"
        smaller = "take a smaller model, or a smaller quantization of it"
        if gpu_layers(self._backend):
            smaller += ", or leave layers to the CPU: -- -ngl N"
        raise EnvironmentMissing(message, f"--ctx {least} fits" if least else smaller)

    def _allowed(self, types: Sequence[CacheSpec], context: Context) -> tuple[list[CacheSpec], str]:
        """Types that the model can have, and why it can't have the others."""
        allowed, reason = [], ""
        for one in types:
            try:
                self.memory(one, context)
                allowed.append(one)
            except UsageError as error:
                reason = error.message
        return allowed, reason


def _free_on(free: Mapping[str, int], total: int = 0) -> Budget:
    """What devices have left, by their names and bytes."""
    of_all = f" of {_mib(total)}" if total else ""
    about = f"free{of_all} on {', '.join(free)}, less 1 GiB{' each' if len(free) > 1 else ''}"
    return Budget(max(sum(free.values()) - len(free) * MARGIN, 0), about)


def _mib(n: int) -> str:
    return f"{n / _MIB:.2f} MiB"


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError) as error:
        raise EnvironmentMissing("the system does not say how much memory is free", "give --memory, such as --memory 24GiB") from error


def longest(charged: Callable[[int], int], limit: int, most: int, *, probes: int) -> int:
    """The largest multiple of :data:`PAD` up to ``most`` for which ``charged`` is within the limit; 0: none.

    Memory grows nearly in a straight line, so a few probes tell. When they are used up, the last one that fits is it.
    """
    if charged(most) <= limit:
        return most
    low, high = PAD, most
    if low == high or (at_low := charged(low)) > limit:
        return 0
    at_high = charged(high)
    for _ in range(probes):
        if high - low <= PAD:
            break
        guess = low + int((limit - at_low) / max(at_high - at_low, 1) * (high - low))
        guess = min(max(guess // PAD * PAD, low + PAD), high - PAD)
        if (at_guess := charged(guess)) <= limit:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
    return low


def candidates(shape: Shape | None) -> tuple[CacheSpec, ...]:
    """Types to serve with, the best one first: ours that the head sizes allow, else upstream's; all where only a build can tell."""
    families = [tuple(CacheSpec(name, name) for name in names) for names in (TRELLIS, SCALAR, RIVALS)]
    if shape is None:
        return tuple(one for family in families for one in family)
    return next(family for family in families if not memory.why_not(shape, family[0]))
