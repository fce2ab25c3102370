"""``turbo-gguf calibrate``: measure what Q, K and V of a model look like, and write how to store them with less error."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_gguf.cache import calibration
from turbo_gguf.calibrate import observation, scales, weight_moments
from turbo_gguf.cli import options
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.build import ensure_build
from turbo_gguf.tools import default_threads

LONGEST_CHUNK = 4096
"""Tokens of a chunk of the text, unless the user says otherwise. Without flash attention the scores of a chunk take memory."""


@click.command(name="calibrate")
@click.argument("model_spec", metavar="MODEL")
@click.argument("texts", metavar="[TEXT]...", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: MODEL.calibration.gguf, here]")
@click.option(
    "--ctx",
    type=click.IntRange(min=16),
    help="Tokens of a chunk of the text: about the contexts that the cache is for.  [default: those of the training, at most 4096]",
)
@click.option("--chunks", default=-1, show_default=True, type=click.IntRange(min=-1), help="At most so many chunks; -1: the whole text.")
@options.threads
@options.preset
@options.upstream
def command(
    *,
    model_spec: str,
    texts: tuple[Path, ...],
    out: Path | None,
    ctx: int | None,
    chunks: int,
    threads: int | None,
    preset: str,
    upstream: str | None,
) -> None:
    """Write a calibration of MODEL (a path or a hub id) for --cache-calibration of llama.cpp's tools.

    K and V are centered. The channels of K are balanced against those of Q, and those of V against the output projection. The model
    computes the same as before, and a cache of few bits loses less. The numbers come from the TEXTs (UTF-8, a few thousand tokens), or
    from the weights alone when there is no text. A calibration fits all quantizations of the same model. Use it with --cache-sink 4.
    """
    if chunks == 0:
        raise click.UsageError("--chunks 0 leaves nothing to measure")
    model = models.resolve(model_spec)
    sources = [models.text_file(text) for text in texts]
    build = ensure_build(preset, upstream=upstream, targets=(observation.TARGET,))
    found = observation.observe(build, model, sources, ctx=ctx or _context(model), chunks=chunks, threads=threads or default_threads())
    weights = weight_moments.Weights(model.path)
    moments = found.moments if found.tokens else weight_moments.estimate(found, weights)
    made = scales.compute(found, moments, weight_moments.output_sq(found, weights))
    path = calibration.write(made, out or Path(f"{model.path.stem}.calibration.gguf"))
    source = f"{found.tokens} tokens" if found.tokens else "the weights"
    centered = ", ".join(
        f"{side} of {sum(getattr(layer, f'{side.lower()}_mean') is not None for layer in made.layers.values())} centered" for side in "KV"
    )
    click.echo(f"{len(made.layers)} layers from {source}, {centered}", err=True)
    click.echo(path)


def _context(model: ModelFile) -> int:
    """Long chunks: RoPE turns the mean of K with the position, so the mean over short ones does not fit the later positions."""
    return min(model.n_ctx_train or LONGEST_CHUNK, LONGEST_CHUNK)
