"""``turbo-gguf ppl-gate``: measure KL divergence of KV cache types and judge them against upstream's own."""

from __future__ import annotations

import functools
from pathlib import Path

import click
import msgspec

from turbo_gguf import assets
from turbo_gguf.cli import options
from turbo_gguf.cluster import runner
from turbo_gguf.errors import EXIT_GATE_FAILED
from turbo_gguf.inputs import models
from turbo_gguf.judge import gate, report
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import presets
from turbo_gguf.make.build import ensure_build
from turbo_gguf.measure import drift, environment, kld, retrieval, sweep
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.tools import default_threads

EPILOG = """\b
Exit codes: 0 no gate failed, 1 a gate failed, 2 usage, 3 something is missing, 4 a tool crashed or ran something else
than was asked for. Only 1 is a verdict on quality.
"""


@click.command(name="ppl-gate", epilog=EPILOG)
@options.model
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Evaluation text, UTF-8.  [default: held-out modules of the Python standard library]",
)
@click.option(
    "--types",
    multiple=True,
    metavar="K/V,...",
    help="Cache types such as turbo3t, turbo4t/turbo3t, 'q4_0 cal=auto' or 'turbo3t cal=none sink=0 tail=0'.  [default: as in --config]",
)
@options.cache_preset
@click.option("--ctx", multiple=True, type=click.IntRange(min=16), help="Context, may be repeated.  [default: as in --config]")
@click.option("--chunks", type=int, help="Chunks per context, -1 for the whole text.  [default: as in --config]")
@click.option("--batch", type=click.IntRange(min=2), help="Tokens of a decode call.  [default: as in --config]")
@options.threads
@options.preset
@options.upstream
@options.ray
@click.option(
    "--config", default="default", show_default=True, metavar="NAME|TOML", help="Sweep: `default`, `smoke`, `layers`, `decay` or a file."
)
@click.option("--gates", type=click.Path(path_type=Path, dir_okay=False), help="Thresholds.  [default: eval/gates.toml]")
@click.option(
    "--drift",
    "with_drift",
    is_flag=True,
    help="Also along the text that the model writes greedily with f16, and where its own text parts from that.",
)
@click.option("--retrieval", "with_retrieval", is_flag=True, help="Also how many codes hidden in a text of each context the model finds.")
@options.report_folder("ppl-gate")
def command(
    *,
    model_spec: str | None,
    text: Path | None,
    types: tuple[str, ...],
    cache_preset: Path | None,
    ctx: tuple[int, ...],
    chunks: int | None,
    batch: int | None,
    threads: int | None,
    preset: str,
    upstream: str | None,
    ray: str | None,
    config: str,
    gates: Path | None,
    with_drift: bool,
    with_retrieval: bool,
    out: Path | None,
) -> None:
    """Measure what KV cache types cost in quality, and judge ours against upstream's.

    For each context an f32 cache without flash attention gives base logits. KL divergence, perplexity ratio, changed top tokens and
    real bits per value of each type are measured against them. The base at another batch size (the noise floor), plain f16, upstream's
    q8_0, q5_0 and q4_0, and q4_0 with the sink and tail that ours have by default are always measured, too. Our types are measured as
    they are typed, with all that they get by default; 'cal=none sink=0 tail=0' behind a type takes it away. --drift and --retrieval add
    what a server writes and finds, and judge nothing. --ray measures on the nodes of a cluster that are like this machine; the servers of
    --drift and --retrieval run here. The table goes to standard output, progress to standard error. Results are kept, so the same command
    again continues where an interrupted run stopped.
    """
    limits = gate.load(gates or assets.eval_dir() / "gates.toml")
    env = environment.settings_in_environment()
    model = options.model_of(model_spec)
    named = (*options.split(types), *map(str, options.preset_types(cache_preset, model)))
    plan = sweep.override(sweep.load(_config(config)), types=named, ctx=ctx, chunks=chunks, batch=batch)
    source = models.text_file(text) if text else models.held_out_text()
    backend = presets.backend_of(preset)
    setup = sweep.Setup(build_id="", model_sha256=model.sha256, text_sha256=source.sha256, backend=backend, env=env)
    kld.check_fit(sweep.cases(plan, setup, gate.references(limits)), model)  # before anything is compiled
    targets = (kld.TARGET, *(["llama-server"] if with_drift or with_retrieval else []))
    with runner.joined(ray, upstream=upstream, model=model_spec) as elsewhere:
        build = ensure_build(preset, upstream=upstream, targets=targets)
        setup = msgspec.structs.replace(setup, build_id=build.id)
        cases = sweep.cases(plan, setup, gate.references(limits))
        job = kld.Job(build=build, model=model, text=source, threads=threads or default_threads(), elsewhere=elsewhere)
        store, say = Store(), functools.partial(click.echo, err=True)
        results = kld.measure(cases, job, store)
        if with_retrieval:
            results = retrieval.measure(results, job, store, say)
        along = drift.measure(_types(plan), job, setup, store, say) if with_drift else []
    verdicts = gate.judge(results, limits)
    table = _tables(results, verdicts, along)
    click.echo(table)
    folder = out or assets.home() / "report" / "ppl-gate"
    write_result(folder / "table.md", table + "\n", patches=build.tree.digest)
    from turbo_gguf.judge import plot  # noqa: PLC0415 - matplotlib is slow to import

    click.echo(f"table: {folder / 'table.md'}\nplot: {plot.quality(results, folder / 'plot.png')}", err=True)
    _conclude(verdicts)


def _tables(results: list[Result], verdicts: list[gate.Verdict], along: list[Result]) -> str:
    """What was measured, the checks, and the drift."""
    checks = str(report.checks(verdicts)) if verdicts else "No gate applies to these types."
    return "\n".join([report.quality(results, verdicts), checks, *(["", report.quality(along)] if along else [])])


def _types(plan: sweep.Sweep) -> tuple[str, ...]:
    """Types of all contexts, each once."""
    return tuple(dict.fromkeys(str(types) for run in plan.run for types in plan.types_of(run)))


def _config(name: str) -> Path:
    """Path of a sweep file: a name below ``eval/``, or a path."""
    return Path(name) if "/" in name or name.endswith(".toml") else assets.eval_dir() / f"{name}.toml"


def _conclude(verdicts: list[gate.Verdict]) -> None:
    """Say how it ended, and leave with the exit code."""
    for verdict in verdicts:
        click.echo(f"{verdict.types} at context {verdict.ctx}: {verdict.status}", err=True)
    if any(verdict.status == gate.WITHIN_ERROR for verdict in verdicts):
        click.echo("hint: what is within error is undecided; --chunks -1 measures the whole text", err=True)
    if gate.failed(verdicts):
        click.get_current_context().exit(EXIT_GATE_FAILED)
