"""From a sweep file (TOML) to the cases of a run, in order.

::

    batch = 512                          # tokens of a llama_decode call
    noise_batch = 256                    # the base again at this batch size: the noise floor

    [[run]]
    ctx = 512
    chunks = 24
    types = ["turbo4", "turbo4/turbo3"]  # one name for K and V, or K/V

Types are as a user types them, with their defaults. A sweep of plain types says so once, for all that do not say otherwise::

    settings = "cal=none sink=0 tail=0"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from turbo_gguf.cache.spec import BASE, COMPETITORS, PLAIN, CacheSpec, is_turbo, parse_types, with_settings
from turbo_gguf.errors import UsageError
from turbo_gguf.measure.case import Case


class SweepRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[run]]`` table: types measured on the same chunks."""

    ctx: int
    chunks: int
    types: tuple[str, ...]


class Sweep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep file."""

    run: tuple[SweepRun, ...]
    batch: int = 512
    noise_batch: int = 256
    settings: str = ""  # of every type with a turbo type in it that does not name them

    def types_of(self, run: SweepRun) -> tuple[CacheSpec, ...]:
        """Types of a run, with what the sweep sets.

        Raises:
            UsageError: a type or a setting is wrong.
        """
        return tuple(parse_types(str(with_settings(parse_types(text), self.settings))) for text in run.types)


class Setup(msgspec.Struct, frozen=True):
    """What all cases of a run share."""

    build_id: str
    model_sha256: str
    text_sha256: str
    backend: str
    env: tuple[str, ...] = ()


def load(path: Path) -> Sweep:
    """Read and check a sweep file.

    Raises:
        UsageError: the file is missing, is no TOML, or its content is wrong (the field is named).
    """
    try:
        sweep = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Sweep)
    except OSError as error:
        raise UsageError(f"sweep file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"sweep file {path}: {error}", "see eval/README.md for the fields") from error
    return check(sweep, str(path))


def check(sweep: Sweep, where: str) -> Sweep:
    """Return ``sweep`` when every number and type in it can be run.

    Raises:
        UsageError: names the field.
    """
    if not sweep.run:
        raise UsageError(f"{where}: no [[run]] table")
    if sweep.batch == sweep.noise_batch:
        raise UsageError(f"{where}: noise_batch must differ from batch ({sweep.batch}), or the noise floor measures nothing")
    if min(sweep.batch, sweep.noise_batch) < 1:
        raise UsageError(f"{where}: batch and noise_batch must be positive")
    for run in sweep.run:
        if run.ctx < 16 or run.ctx % 2:
            raise UsageError(f"{where}: ctx = {run.ctx} must be even and at least 16")
        if run.chunks == 0 or run.chunks < -1:
            raise UsageError(f"{where}: chunks = {run.chunks} must be positive, or -1 for the whole text")
        if run.chunks > 0 and run.chunks * (run.ctx - 1 - run.ctx // 2) < 100:
            raise UsageError(f"{where}: {run.chunks} chunks of {run.ctx} score fewer than 100 tokens: no statistics")
        sweep.types_of(run)
    return sweep


def override(
    sweep: Sweep,
    *,
    types: Sequence[str] = (),
    ctx: Sequence[int] = (),
    chunks: int | None = None,
    batch: int | None = None,
) -> Sweep:
    """Return the sweep with what the command line gave in place of what the file says.

    Without a table for a context of ``ctx``, the first table is used for it, scored over about the same number of tokens. Settings of the
    file are for its own types: those of the command line are taken as they are typed.
    """
    runs = {run.ctx: run for run in sweep.run}
    first = sweep.run[0]
    picked = [
        runs[size] if size in runs else msgspec.structs.replace(first, ctx=size, chunks=max(1, first.chunks * first.ctx // size))
        for size in (ctx or runs)
    ]
    if types:
        picked = [msgspec.structs.replace(run, types=tuple(types)) for run in picked]
    if chunks is not None:
        picked = [msgspec.structs.replace(run, chunks=chunks) for run in picked]
    batches: Mapping[str, int] = {} if batch is None else {"batch": batch, "noise_batch": max(1, batch // 2)}
    settings = "" if types else sweep.settings
    return check(msgspec.structs.replace(sweep, run=tuple(picked), settings=settings, **batches), "command line")


def cases(sweep: Sweep, setup: Setup, references: Mapping[str, Sequence[str]] | None = None) -> list[Case]:
    """List the cases of a sweep, grouped by context so that each group needs one file of base logits.

    Each group starts with the noise floor, plain f16 and what verdicts are relative to, whatever the file says: upstream's
    competitors, when one of our types is in it, and ``references`` (type -> the types that its gate compares it with).
    """
    found: dict[Case, None] = {}
    for run in sweep.run:
        full = min(sweep.batch, run.ctx)  # a batch is never longer than a chunk
        noise = min(sweep.noise_batch, run.ctx)
        noise = noise if noise != full else full // 2

        def case(types: CacheSpec, batch: int, run: SweepRun = run, full: int = full) -> Case:
            return Case(
                types=types,
                ctx=run.ctx,
                chunks=run.chunks,
                batch=batch,
                base_batch=full,
                backend=setup.backend,
                build_id=setup.build_id,
                model_sha256=setup.model_sha256,
                text_sha256=setup.text_sha256,
                env=setup.env,
            )

        found[case(BASE, noise)] = None
        asked = sweep.types_of(run)
        needed = COMPETITORS if any(is_turbo(types) for types in asked) else ()
        compared = [parse_types(name) for t in asked for name in (references or {}).get(str(t), ())]
        for types in (PLAIN, *needed, *compared, *asked):
            found[case(types, full)] = None
    return list(found)
