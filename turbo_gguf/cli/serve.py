"""``turbo-gguf serve``: from the name of a model to a llama-server with a cache that fits this machine."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from turbo_gguf import assets
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.cli import options
from turbo_gguf.cli.plan import size_text
from turbo_gguf.errors import UsageError
from turbo_gguf.fuse import model as fused
from turbo_gguf.inputs import headers
from turbo_gguf.inputs.named import NAMED
from turbo_gguf.make import build, presets, toolkits
from turbo_gguf.plan import architectures, devices, launch, planner
from turbo_gguf.plan.memory import PAD, Context
from turbo_gguf.plan.planner import Choice, Planner
from turbo_gguf.tune import preset as preset_files
from turbo_gguf.tune.preset import Made

OWN = {
    **dict.fromkeys(("-m", "--model", "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url"), "name the model in front"),
    **dict.fromkeys(("-c", "--ctx-size"), "say --ctx"),
    **dict.fromkeys(("-np", "--parallel"), "say --parallel"),
    **dict.fromkeys(("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified", "--kv-unified-per-slot"), "say --kv-unified"),
    **dict.fromkeys(("-dev", "--device"), "say --device"),
    **dict.fromkeys(("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"), "say --type"),
    "--cache-preset": "say it in front of --",
}
"""Options of llama-server that a plan decides, and what to say in their place."""


class _Serve(click.Command):
    """A command whose users type options of llama-server, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say where those belong."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"{error.format_message()} Options of llama-server stand behind --: -- {error.option_name} ...", ctx
            ) from error


@click.command(name="serve", cls=_Serve)
@click.argument("spec", metavar="MODEL|HUB-ID")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA-SERVER OPTIONS]")
@options.slots("those that fit, at most those of the training")
@click.option("--type", "type_", metavar="K/V", help="Cache type, as in ppl-gate.  [default: the best that fits]")
@options.cache_preset
@options.memory
@options.device
@click.option("--dry-run", is_flag=True, help="Print the command, and start, build and download nothing.")
@options.server
@options.preset_here
@options.upstream
def command(
    *,
    spec: str,
    extra: tuple[str, ...],
    ctx: int | None,
    parallel: int,
    kv_unified: bool,
    type_: str | None,
    cache_preset: Path | None,
    memory_bytes: int | None,
    device: str | None,
    dry_run: bool,
    server: Path | None,
    preset: str | None,
    upstream: str | None,
) -> None:
    """Fetch a model, choose a KV cache that fits, and start the patched llama-server with it.

    MODEL is a GGUF file or one of `models list`, HUB-ID org/name or org/name:file.gguf. The cache is the first of turbo4t, turbo3t and
    turbo2t that fits, or of the scalar types where head sizes ask for them. Models that can have none of ours get f16, q8_0 or q4_0. The
    first start calibrates the cache, which later ones find. The command goes to standard output, and what llama-server says to standard
    error. Ctrl-C ends both.
    """
    _refuse_own(extra)
    types = _named(type_, cache_preset)  # what is wrong with them is said before anything is fetched or built
    where = launch.address(extra)
    chosen = options.preset_of(preset)
    program = server or build.found(chosen, "llama-server", upstream=upstream)
    if dry_run:
        header = headers.read(spec)
    else:
        launch.require_free(where)
        if program or not toolkits.gpu_layers(presets.backend_of(chosen)):
            _require_room(spec, program, Context(ctx or PAD, parallel, kv_unified), memory_bytes, device)
        header = headers.fetched(spec)
    if cache_preset:
        preset_files.for_model(cache_preset, Made.of(header.name, header.fields))
    if not dry_run:
        program = server or build.ensure_build(chosen, upstream=upstream, targets=("llama-server",)).tool("llama-server")
    on = devices.named(program, device) if device is not None else ()
    plans = Planner(header, server=program, backend=presets.backend_of(chosen), on=on, extra=extra)
    context = Context(ctx or plans.trained, parallel, kv_unified, full_windows="--swa-full" in extra)
    choice = plans.choose(types or planner.candidates(plans.shape), context, memory_bytes, fixed=ctx is not None)
    click.echo(f"{choice.types}: {_reason(choice, plans)}", err=True)
    if choice.context.ctx > plans.trained and not kv_unified:
        click.echo(f"note: the model was trained for {plans.trained:,} tokens, and llama-server gives a slot no more", err=True)
    argv = plans.command(choice.types, choice.context)
    added, env = fused.served_with(header.path, header.fields, choice.types, extra)
    argv += added
    click.echo(shlex.join([*(f"{name}={value}" for name, value in env.items()), str(program or argv[0]), *argv[1:]]))
    if not dry_run and program:
        log = assets.home() / "logs" / f"serve-{where.port}"
        launch.run([str(program), *argv[1:]], where, log=log, say=lambda line: click.echo(line, err=True), env=env)


def _named(type_: str | None, cache_preset: Path | None) -> tuple[CacheSpec, ...]:
    """The cache of ``--type`` or ``--cache-preset``, none without them.

    Raises:
        UsageError: both, no such type, or a file that is damaged.
    """
    if type_ and cache_preset:
        raise UsageError("--type and --cache-preset both name the cache", "leave one of them out")
    if cache_preset:
        return (preset_files.read(cache_preset).types,)
    return (parse_types(type_),) if type_ else ()


def _require_room(spec: str, program: Path | None, context: Context, memory_bytes: int | None, device: str | None) -> None:
    """Refuse a model of a hub that is too large before it is downloaded, as far as its header tells.

    Raises:
        EnvironmentMissing: the smallest cache does not fit beside its weights.
    """
    if spec in NAMED or Path(spec).expanduser().is_file():
        return
    header = headers.read(spec)
    if header.path is None and header.fields.get("general.architecture") in architectures.KNOWN:
        on = devices.named(program, device) if device is not None else ()
        plans = Planner(header, server=program, backend="CPU", on=on)
        plans.choose(planner.candidates(plans.shape)[-1:], context, memory_bytes, fixed=True)


def _refuse_own(extra: tuple[str, ...]) -> None:
    """Options that would make the plan another one.

    Raises:
        UsageError: names what to say instead.
    """
    for word in extra:
        if hint := OWN.get(word.partition("=")[0]):
            raise UsageError(f"{word} is decided by the plan", hint)


def _reason(choice: Choice, plans: Planner) -> str:
    """One line: why this type, and how much of what it takes."""
    source = "by an estimate" if plans.estimated else "by llama-server's dry run"
    tried = f"; {', '.join(map(str, choice.too_large))} would not fit" if choice.too_large else ""
    used = f"takes {size_text(choice.charged)} of {size_text(choice.budget.bytes)} ({choice.budget.about}), {source}"
    return f"{choice.context.ctx:,} tokens{' of each slot' if choice.context.parallel > 1 else ''}; {used}{tried}"
