"""``turbo-gguf plan``: what a model and each KV cache type take of memory, before anything is downloaded or started."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import msgspec

from turbo_gguf.cache.spec import COMPETITORS, PLAIN, CacheSpec, parse_types
from turbo_gguf.cache.types import TURBO
from turbo_gguf.cli import options
from turbo_gguf.inputs import headers
from turbo_gguf.inputs.headers import Header
from turbo_gguf.judge.report import markdown
from turbo_gguf.make import build, presets
from turbo_gguf.plan import devices
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import Plan, Planner, Row

DEFAULT_TYPES = (PLAIN, *(types for types in COMPETITORS if not types.has_settings), *(CacheSpec(name, name) for name in TURBO))

NOT_IN_IT = (
    "Not in it: prompts that llama-server keeps (--cache-ram, up to 8 GiB), checkpoints (--ctx-checkpoints), a draft model, "
    "a projector for images, and what drivers and the program take."
)
ESTIMATE = (
    "This is an estimate from the header: KV cache, exact tokens and state are exact for the default upstream. "
    "Compute buffers are guessed. Copies of weights in another layout are left out."
)


@click.command(name="plan")
@click.argument("spec_", metavar="MODEL|HUB-ID")
@options.slots("those of the training")
@options.memory
@options.device
@click.option(
    "--types",
    multiple=True,
    metavar="K/V,...",
    help=f"Cache types, as in ppl-gate.  [default: {','.join(map(str, DEFAULT_TYPES))}]",
)
@options.server
@options.preset_here
@options.upstream
def command(
    *,
    spec_: str,
    ctx: int | None,
    parallel: int,
    kv_unified: bool,
    memory_bytes: int | None,
    device: str | None,
    types: tuple[str, ...],
    server: Path | None,
    preset: str | None,
    upstream: str | None,
) -> None:
    """Say what each KV cache type takes on a model, and the longest context that fits.

    MODEL is a GGUF file or one of `models list`. HUB-ID is org/name or org/name:file.gguf, of which only the header is read. With a build
    and the file here, llama-server is asked what it would allocate, and nothing is loaded. Else all is computed from the header, and the
    output says so. Types are as a user types them, with all that they get by default.
    """
    header = headers.read(spec_)
    named = tuple(parse_types(name) for name in options.split(types)) or DEFAULT_TYPES
    chosen = options.preset_of(preset)
    asked = server or build.found(chosen, "llama-server", upstream=upstream)
    on = devices.named(asked, device) if device is not None else ()
    planner = Planner(header, server=asked, backend=presets.backend_of(chosen), on=on)
    context = Context(ctx or planner.trained, parallel, kv_unified)
    plan = planner.plan(named, context, memory_bytes)
    click.echo(text(plan, planner, header))


def text(plan: Plan, planner: Planner, header: Header) -> str:
    """The whole answer."""
    context = plan.context
    kind = "on one pool" if context.unified else "each"
    slots = "1 slot" if context.parallel == 1 else f"{context.parallel} slots"
    source = "estimate from the header" if plan.estimated else "dry run of llama-server"
    lines = [
        f"{header.name}: trained to {planner.trained:,} tokens; weights {size_text(_weights(plan))}.",
        f"{slots} of {context.ctx:,} tokens {kind}; memory {size_text(plan.budget.bytes)} ({plan.budget.about}); {source}.\n",
        markdown(
            ("type", "bytes per token", "KV cache", "exact tokens", "calibration", "state", "compute", "all", "longest context"),
            [_cells(row) for row in plan.rows],
        ),
        "\n".join(f"{row.types}: {row.refusal}" for row in plan.rows if row.refusal),
        "\n".join(f"{row.types}: {_command(row, planner, header, context)}" for row in plan.rows if row.longest),
        f"\n{ESTIMATE}" if plan.estimated else "",
        f"\nnote: {plan.note}" if plan.note else "",
        NOT_IN_IT,
    ]
    return "\n".join(line for line in lines if line)


def _command(row: Row, planner: Planner, header: Header, context: Context) -> str:
    """What to type: with the context that was asked for, or the longest one that fits. A model that is not here has to be fetched."""
    context = msgspec.structs.replace(context, ctx=min(context.ctx, row.longest))
    if header.path:
        return shlex.join(planner.command(row.types, context))
    slots = ["-np", str(context.parallel)] if context.parallel > 1 else []
    pool = ["-kvu"] if context.unified else []
    devices = ["--device", ",".join(device.name for device in planner.on)] if planner.on else []
    return shlex.join(["turbo-gguf", "serve", header.spec, "--type", str(row.types), "--ctx", str(context.ctx), *slots, *pool, *devices])


def _weights(plan: Plan) -> int:
    return next((row.memory.weights for row in plan.rows if not row.refusal), 0)


def _cells(row: Row) -> tuple[str, ...]:
    if row.refusal:
        return (str(row.types), *["-"] * 8)
    found = row.memory
    parts = (found.kv, found.copies, found.calibration, found.state, found.compute, found.total)
    return (str(row.types), f"{row.per_token:,.0f}", *map(size_text, parts), f"{row.longest:,}" if row.longest else "none fits")


def size_text(n: int) -> str:
    """In the largest unit that leaves a digit before the point."""
    if not n:
        return "0"
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.2f} MiB"
