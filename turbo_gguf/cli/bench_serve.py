"""``turbo-gguf bench-serve``: what a llama-server of each KV cache type serves under load, in a fixed budget of KV memory."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from turbo_gguf import assets
from turbo_gguf.cache import written
from turbo_gguf.cache.spec import PLAIN, parse_types
from turbo_gguf.cache.types import RIVALS, TRELLIS
from turbo_gguf.cli import options
from turbo_gguf.files import write_whole
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.judge import serving
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import presets
from turbo_gguf.make.build import ensure_build
from turbo_gguf.measure import environment, serve
from turbo_gguf.measure.result import ServeRow
from turbo_gguf.measure.store import Store
from turbo_gguf.tools import default_threads

DEFAULT_TYPES = (*RIVALS, *TRELLIS)
CLIENTS = (1, 2, 4, 8, 16, 32)
PROMPTS = (512, 1024, 2048, 4096)


@click.command(name="bench-serve")
@options.model
@click.option("--types", multiple=True, metavar="K/V,...", help=f"Cache types, as in ppl-gate.  [default: {','.join(DEFAULT_TYPES)}]")
@click.option(
    "--clients",
    "-c",
    multiple=True,
    type=click.IntRange(min=1),
    help=f"Requests at the same time, may be repeated.  [default: {' '.join(map(str, CLIENTS))}]",
)
@click.option(
    "--prompt",
    "-p",
    multiple=True,
    type=click.IntRange(min=1),
    help=f"Tokens of a prompt; repeated ones take turns.  [default: those of {' '.join(map(str, PROMPTS))} that the model was trained for]",
)
@click.option("--gen", "-n", default=64, show_default=True, type=click.IntRange(min=2), help="Tokens to generate for a prompt.")
@click.option(
    "--requests", default=8, show_default=True, type=click.IntRange(min=1), help="Requests of a load, if there are not more clients."
)
@click.option("--rounds", "-r", default=1, show_default=True, type=click.IntRange(min=1), help="Rounds over all loads; taken together.")
@click.option("--ctx", type=click.IntRange(min=serve.PAD), help="Tokens of a slot.  [default: what the longest prompt and its answer need]")
@click.option(
    "--budget", type=click.FloatRange(min=0, min_open=True), metavar="MIB", help="KV memory of a server.  [default: what --f16-slots take]"
)
@click.option(
    "--f16-slots", default=4, show_default=True, type=click.IntRange(min=1), help="Slots of f16 that the budget holds, without --budget."
)
@click.option(
    "--batch", default=2048, show_default=True, type=click.IntRange(min=1), help="Tokens of a decode call; a prompt of more takes several."
)
@click.option("--timeout", default=3600.0, show_default=True, type=click.FloatRange(min=1), help="Seconds until a request has failed.")
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text that prompts are cut from.  [default: held-out modules of the Python standard library]",
)
@options.threads
@options.preset
@options.upstream
@options.report_folder("bench-serve")
def command(
    *,
    model_spec: str | None,
    types: tuple[str, ...],
    clients: tuple[int, ...],
    prompt: tuple[int, ...],
    gen: int,
    requests: int,
    rounds: int,
    ctx: int | None,
    budget: float | None,
    f16_slots: int,
    batch: int,
    timeout: float,
    text: Path | None,
    threads: int | None,
    preset: str,
    upstream: str | None,
    out: Path | None,
) -> None:
    """Measure serving under load: llama-server with each cache type in the same KV memory.

    Each type gets as many slots as the memory holds, copies of exact tokens included. Clients stream completions of prompts of exact
    lengths, and each sends its next request when it has its answer. Shown are tokens per second, the time to the first token and between
    tokens, failed requests, and the peak of the process's memory, with ratios to f16, which is always among the types. Types are as a user
    types them, with all that they get by default. Loads that are there are not repeated. Beside table and plot, loads.jsonl has every
    request.
    """
    model = options.model_of(model_spec)
    prompts = prompt or _trained(model, gen)
    named = [parse_types(name) for name in options.split(types) or DEFAULT_TYPES]
    plan = serve.ServePlan(
        types=tuple(dict.fromkeys([PLAIN, *named])),
        clients=tuple(sorted(set(clients))) or CLIENTS,
        prompts=prompts,
        n_gen=gen,
        requests=requests,
        ctx=ctx or serve.slot_ctx(prompts, gen),
        budget_mib=budget,
        plain_slots=f16_slots,
        batch=batch,
        rounds=rounds,
        timeout=timeout,
        threads=threads or default_threads(),
        backend=presets.backend_of(preset),
        env=environment.settings_in_environment(environment.OF_SPEED),
    )
    serve.check_fit(plan, model)  # before anything is compiled
    source = models.text_file(text) if text else models.held_out_text()
    build = ensure_build(preset, upstream=upstream, targets=("llama-server",))
    rows = serve.run(plan, build, model, source, store=Store(), say=lambda words: click.echo(words, err=True))
    table = serving.table(rows)
    click.echo(table)
    folder = out or assets.home() / "report" / "bench-serve"
    write_result(folder / "table.md", table + "\n", patches=build.tree.digest)
    write_whole(folder / "loads.jsonl", b"".join(msgspec.json.encode(_portable(row), enc_hook=written.encode) + b"\n" for row in rows))
    from turbo_gguf.judge import plot  # noqa: PLC0415 - matplotlib is slow to import

    click.echo(f"table: {folder / 'table.md'}\nplot: {plot.serving(rows, folder / 'plot.png')}", err=True)


def _portable(row: ServeRow) -> ServeRow:
    """A load without the paths of this machine, for a file that may be handed on."""
    argv = tuple(Path(word).name if word.startswith("/") else word for word in row.argv)
    return msgspec.structs.replace(row, argv=argv, facts=msgspec.structs.replace(row.facts, warnings=()))


def _trained(model: ModelFile, gen: int) -> tuple[int, ...]:
    """Prompts by default that the model was trained for, the shortest in any case."""
    return tuple(length for length in PROMPTS if length == PROMPTS[0] or not 0 < model.n_ctx_train < length + gen)
