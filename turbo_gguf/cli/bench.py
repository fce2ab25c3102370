"""``turbo-gguf bench``: prefill and decode speed of KV cache types against context depth."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_gguf import assets
from turbo_gguf.cache.spec import PLAIN, parse_types
from turbo_gguf.cache.types import RIVALS, TURBO
from turbo_gguf.cli import options
from turbo_gguf.judge import report
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import presets
from turbo_gguf.make.build import ensure_build
from turbo_gguf.measure import bench, environment
from turbo_gguf.measure.store import Store
from turbo_gguf.tools import default_threads

DEFAULT_TYPES = (*RIVALS, *TURBO)


@click.command(name="bench")
@options.model
@click.option("--types", multiple=True, metavar="K/V,...", help=f"Cache types, as in ppl-gate.  [default: {','.join(DEFAULT_TYPES)}]")
@options.cache_preset
@click.option(
    "--depth", "-d", multiple=True, type=click.IntRange(min=0), help="Tokens in the cache, may be repeated.  [default: 0 512 1536]"
)
@click.option("--prompt", "-p", default=128, show_default=True, type=click.IntRange(min=0), help="Tokens of the prefill test; 0: none.")
@click.option("--gen", "-n", default=32, show_default=True, type=click.IntRange(min=0), help="Tokens of the decode test; 0: none.")
@click.option("--rounds", "-r", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds over all types; medians are shown.")
@options.threads
@options.preset
@options.upstream
@options.report_folder("bench")
def command(
    *,
    model_spec: str | None,
    types: tuple[str, ...],
    cache_preset: Path | None,
    depth: tuple[int, ...],
    prompt: int,
    gen: int,
    rounds: int,
    threads: int | None,
    preset: str,
    upstream: str | None,
    out: Path | None,
) -> None:
    """Measure prefill and decode speed against depth, in rounds over all types.

    Types are as a user types them, with all that they get by default; 'cal=none sink=0 tail=0' behind a type takes it away. f16 is
    always among them, and every speed is shown with its ratio to f16 at the same depth. The rows of llama-bench are kept as
    they are in results/llama-bench.jsonl, for upstream's scripts/compare-llama-bench.py. Rounds that are there are not repeated.
    """
    if not prompt and not gen:
        raise click.UsageError("--prompt 0 and --gen 0 leave nothing to measure")
    model = options.model_of(model_spec)
    searched = options.preset_types(cache_preset, model)
    named = [*map(parse_types, options.split(types) or (() if searched else DEFAULT_TYPES)), *searched]
    plan = bench.BenchPlan(
        types=tuple(dict.fromkeys([PLAIN, *named])),
        depths=tuple(sorted(set(depth))) or (0, 512, 1536),
        n_prompt=prompt,
        n_gen=gen,
        rounds=rounds,
        threads=threads or default_threads(),
        backend=presets.backend_of(preset),
        env=environment.settings_in_environment(environment.OF_SPEED),
    )
    bench.check_fit(plan, model)  # before anything is compiled
    build = ensure_build(preset, upstream=upstream, targets=("llama-bench",))
    rows = bench.run(plan, build, model, Store(), lambda text: click.echo(text, err=True))
    table = report.speed(rows, PLAIN)
    click.echo(table)
    folder = out or assets.home() / "report" / "bench"
    write_result(folder / "table.md", table + "\n", patches=build.tree.digest)
    from turbo_gguf.judge import plot  # noqa: PLC0415 - matplotlib is slow to import

    click.echo(f"table: {folder / 'table.md'}\nplot: {plot.speed(rows, folder / 'plot.png')}", err=True)
