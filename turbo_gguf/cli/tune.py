"""``turbo-gguf tune``: search the KV cache of least loss under a budget, and write it to a file that all programs take."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from turbo_gguf import __version__, assets, files
from turbo_gguf.cache import calibration, spec
from turbo_gguf.cache.settings import CalibrationChoice
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cli import options
from turbo_gguf.cluster import runner
from turbo_gguf.inputs import headers, models
from turbo_gguf.inputs.headers import Header
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.judge.report import markdown
from turbo_gguf.make import presets
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.measure import bench, calibrate, environment, kld, unpacked
from turbo_gguf.measure.bench import BenchPlan
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.store import Store
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import Planner
from turbo_gguf.plan.shape import shape_of
from turbo_gguf.tools import default_threads
from turbo_gguf.tune import preset as preset_files
from turbo_gguf.tune import texts
from turbo_gguf.tune.meter import Meter
from turbo_gguf.tune.preset import Made, Preset
from turbo_gguf.tune.tuner import DEFAULTS, Goal, Outcome, Row, Subject, Tuner

PRICE_CTX, PROOF_CTX = 1024, 2048
"""Tokens of a chunk that prices, and that the end result, are measured on; fewer where a model was trained on fewer."""

REAL_CHUNKS = 2

CALIBRATION_TOKENS = 1024
"""More of them gain nothing (docs/lab/0016-real-model-transforms.md)."""

GEN = 32
"""Tokens that are decoded for --target-tps."""

POSITIVE, COUNT = click.FloatRange(min=0, min_open=True), click.IntRange(min=1)


@click.command(name="tune")
@click.argument("model_spec", metavar="MODEL")
@click.argument("text", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--bits", type=POSITIVE, help="Bits per value at most, on average, without copies of exact tokens.")
@click.option("--memory", "memory_bytes", callback=options.bytes_of, metavar="24GiB", help="Memory of llama-server at most.")
@click.option("--max-kld", type=POSITIVE, help="Mean KL divergence at most, in nats, for the least memory.")
@click.option("--ctx", type=click.IntRange(min=GEN), help=f"Context in which memory is counted.  [default: {PROOF_CTX}]")
@click.option("--target-tps", type=POSITIVE, help="Tokens per second of decoding at least, with --ctx full.")
@click.option("--chunks", default=2, show_default=True, type=COUNT, help=f"Chunks of {PRICE_CTX} tokens that a price is of.")
@click.option("--proof-chunks", default=4, show_default=True, type=COUNT, help=f"Chunks of {PROOF_CTX} tokens of unseen text.")
@click.option("--minutes", default=30.0, show_default=True, type=float, help="After so many, no further round of the search begins.")
@click.option("--own-calibration/--no-own-calibration", default=True, help="Try a calibration from TEXT beside the automatic one.")
@click.option("--packed", is_flag=True, help="Measure prices on the file itself, not on unpacked weights.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: MODEL.cache.toml, here]")
@options.threads
@options.preset
@options.upstream
@options.ray
def command(
    *,
    model_spec: str,
    text: Path | None,
    bits: float | None,
    memory_bytes: int | None,
    max_kld: float | None,
    ctx: int | None,
    target_tps: float | None,
    chunks: int,
    proof_chunks: int,
    minutes: float,
    own_calibration: bool,
    packed: bool,
    out: Path | None,
    threads: int | None,
    preset: str,
    upstream: str | None,
    ray: str | None,
) -> None:
    """Search the KV cache of MODEL that loses least under a budget: types by layer, of K and of V, calibration and tail.

    One of --bits, --memory and --max-kld is the goal. Prices are measured on the first part of TEXT, which should be like what the model
    will read. The winner and the best types by hand are measured on its last part, which the search never sees. What is measured is kept,
    so the same command again continues where an interrupted one stopped, and another budget reuses prices. --ray measures losses on the
    nodes of a cluster that are like this machine; memory and speed are those of this one. The file goes to `--cache-preset` of serve,
    ppl-gate, bench and llama.cpp's tools. The command goes to standard output, words to standard error.
    """
    if sum(goal is not None for goal in (bits, memory_bytes, max_kld)) != 1:
        raise click.UsageError("say one of --bits, --memory and --max-kld")
    env = environment.settings_in_environment()
    model = models.resolve(model_spec)
    header = headers.read(str(model.path))
    source = models.text_file(text) if text else models.held_out_text()
    shape = shape_of(header.fields, header.tensors)
    context = Context(ctx or min(PROOF_CTX, shape.n_ctx_train))
    path = out or Path(f"{model.path.stem}.cache.toml")
    targets = (kld.TARGET, calibrate.TARGET, unpacked.TARGET, "llama-bench", *(["llama-server"] if memory_bytes is not None else []))
    backend, parts, store = presets.backend_of(preset), texts.split(source), Store()
    cores = threads or default_threads()
    with runner.joined(ray, upstream=upstream, model=model_spec) as elsewhere:
        build = ensure_build(preset, upstream=upstream, targets=targets)

        def meter(part: TextFile, length: int, count: int, of: ModelFile = model) -> Meter:
            job = Job(build=build, model=of, text=part, threads=cores, packed=model if of != model else None, elsewhere=elsewhere)
            return Meter.of(job, store, ctx=length, chunks=count, backend=backend, env=env)

        subject = Subject(
            shape=shape,
            context=context,
            backend=backend,
            cheap=meter(parts.prices, PRICE_CTX, chunks, of=model if packed else _unpacked(build, model, cores)),
            real=meter(parts.prices, PROOF_CTX, REAL_CHUNKS),
            unseen=meter(parts.unseen, PROOF_CTX, proof_chunks),
            calibrate=(lambda: _calibration(build, model, parts.calibration, cores)) if own_calibration else None,
        )
        kv_bytes = None if memory_bytes is None else _kv_bytes(header, build, backend, context, memory_bytes)
        goal = Goal(bits=bits, bytes=kv_bytes, max_kld=max_kld)
        speed = _speed(build, model, store, depth=context.ctx - GEN, threads=cores, backend=backend) if target_tps else None
        outcome = Tuner(subject, minutes=minutes, say=_say, speed=speed).run(goal, target_tps=target_tps)
    types = _beside(outcome.types, path)
    made = Made.of(header.name, header.fields, model.sha256)
    preset_files.write(path, Preset(types, made, _evidence(outcome, build, source)))
    _say(_summary(outcome))
    _say(f"{path}: take it with --cache-preset")
    click.echo(shlex.join(["llama-server", "-m", str(model.path), *spec.options(types)]))


def _say(text: str) -> None:
    click.echo(text, err=True)


def _unpacked(build: Build, model: ModelFile, threads: int) -> ModelFile:
    """The model that prices are measured on."""
    if unpacked.is_unpacked(model):
        return model
    if why_not := unpacked.why_not(model):
        _say(f"prices are measured on the file itself, whose rounding hides small ones: {why_not}")
        return model
    _say("prices are measured on unpacked weights, where nothing but the cache is rounded")
    return unpacked.unpack(build, model, threads)


def _calibration(build: Build, model: ModelFile, text: TextFile, threads: int) -> CalibrationChoice:
    """Make a calibration from a text, or find it."""
    path = assets.home() / "calibrations" / f"{model.path.stem}-{model.sha256[:8]}-{text.sha256[:8]}-{build.id}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = (
        calibration.read(path)
        if path.is_file()
        else calibrate.calibrate(build, model, [text], path, tokens=CALIBRATION_TOKENS, threads=threads)
    )
    return CalibrationChoice(str(path), calibration.digest(made))


def _kv_bytes(header: Header, build: Build, backend: str, context: Context, limit: int) -> int:
    """What a memory leaves for KV caches and copies of exact tokens."""
    planner = Planner(header, server=build.tool("llama-server"), backend=backend)
    types = msgspec.structs.replace(DEFAULTS, k="q8_0", v="q8_0")
    found = planner.memory(types, context)
    return limit - planner.charged(types, context) + found.kv + found.copies


def _speed(build: Build, model: ModelFile, store: Store, *, depth: int, threads: int, backend: str) -> Callable[[CacheSpec], float]:
    """Measures tokens per second of decoding with a cache."""

    def measure(types: CacheSpec) -> float:
        env = environment.settings_in_environment(environment.OF_SPEED)
        plan = BenchPlan((types,), (max(depth, 0),), n_prompt=0, n_gen=GEN, rounds=1, threads=threads, backend=backend, env=env)
        rows = bench.run(plan, build, model, store, _say)
        return max(row.tokens_per_second.value for row in rows)

    return measure


def _beside(types: CacheSpec, path: Path) -> CacheSpec:
    """The same with a calibration from a file beside the preset, so that both can be moved together."""
    chosen = types.calibration
    if chosen is None or not chosen.is_file:
        return types
    beside = path.absolute().with_name(f"{path.name.removesuffix('.toml')}.calibration.gguf")
    files.write_whole(beside, Path(chosen.path).read_bytes())
    return msgspec.structs.replace(types, calibration=CalibrationChoice(str(beside), chosen.digest))


def _evidence(outcome: Outcome, build: Build, text: TextFile) -> dict[str, Any]:
    """What a preset rests on."""
    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": f"turbo-gguf {__version__}",
        "upstream": build.tree.commit,
        "patches": build.tree.digest[:12],
        "preset": build.preset,
        "text": text.name,
        "text-sha256": text.sha256,
        "unseen-tokens": outcome.tokens,
        "unseen-ctx": outcome.ctx,
        **{f"additive-{side}": round(ratio, 3) for side, ratio in outcome.additive.items()},
        "asked-bits": round(outcome.asked, 4),
        "bits": round(outcome.bits, 4),
    }
    if outcome.gain is not None:
        found |= {"less-than-uniform": round(outcome.gain.value, 4), "less-than-uniform-error": round(outcome.gain.error, 4)}
    return {**found, "row": [_row(row) for row in outcome.rows]}


def _row(row: Row) -> dict[str, Any]:
    types = str(spec.measured(row.types))
    return {"about": row.about, "types": types, "bits": round(row.bits, 4), "kld": row.kld.value, "error": row.kld.error}


def _summary(outcome: Outcome) -> str:
    """The table of evidence, and what it says."""
    rows = [(row.about, _shown(row.types), f"{row.bits:.3f}", f"{row.kld.value:.5f} ± {row.kld.error:.5f}") for row in outcome.rows]
    table = markdown(("cache", "types", "bits per value", "mean KLD on unseen text"), rows)
    if outcome.gain is None or outcome.equal is None:
        return f"{table}\nno types by hand take {outcome.asked:.3f} bits per value or less"
    gain = outcome.gain
    words = f"{100 * gain.value:.0f} ± {100 * gain.error:.0f} % less than {outcome.equal.types} ({outcome.equal.bits:.3f} bits per value)"
    return f"{table}\n{words}, over {outcome.tokens:,} tokens"


def _shown(types: CacheSpec) -> str:
    """Without its maps, which are long."""
    short = msgspec.structs.replace(types, layers_k=None, layers_v=None, calibration=None, sink=None, tail=None)
    return f"{short} by layer" if types.by_layer else str(short)
