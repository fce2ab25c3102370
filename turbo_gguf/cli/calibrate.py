"""``turbo-gguf calibrate``: a model reads a text, and how to store its K and V with less error is written to a file."""

from __future__ import annotations

import re
from pathlib import Path

import click

from turbo_gguf.cache.calibration import Calibration
from turbo_gguf.cli import options
from turbo_gguf.inputs import models
from turbo_gguf.make.build import ensure_build
from turbo_gguf.measure import calibrate
from turbo_gguf.tools import default_threads

SINK_DISTANCE = 2.0
"""A token whose K lies so many times as far from the mean as that of others is named; llama.cpp warns from there on, too."""

_PROGRESS = re.compile(r"\d+ of \d+ tokens")


@click.command(name="calibrate")
@click.argument("model_spec", metavar="MODEL")
@click.argument("texts", metavar="[TEXT]...", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: MODEL.calibration.gguf, here]")
@click.option(
    "--tokens",
    default=calibrate.TOKENS,
    show_default=True,
    type=click.IntRange(min=calibrate.LEAST_TOKENS),
    help="Read at most so many tokens.",
)
@options.threads
@options.preset
@options.upstream
def command(
    *,
    model_spec: str,
    texts: tuple[Path, ...],
    out: Path | None,
    tokens: int,
    threads: int | None,
    preset: str,
    upstream: str | None,
) -> None:
    """Write a calibration of MODEL (a path or a hub id) for --cache-calibration of llama.cpp's tools.

    K and V are centered. The channels of K are balanced against those of Q, and those of V against the output projection. The model
    computes the same as before, and a cache of few bits loses less. The numbers come from the TEXTs (UTF-8), or from the text that is
    built in, which --cache-calibration auto reads as well. A calibration fits all quantizations of the same model.
    """
    model = models.resolve(model_spec)
    sources = [models.text_file(text) for text in texts]
    path = out or Path(f"{model.path.stem}.calibration.gguf")
    build = ensure_build(preset, upstream=upstream, targets=(calibrate.TARGET,))
    made = calibrate.calibrate(build, model, sources, path, tokens=tokens, threads=threads or default_threads(), on_line=_show_progress)
    click.echo(_summary(made), err=True)
    click.echo(path)


def _show_progress(line: str) -> None:
    if _PROGRESS.fullmatch(line):
        click.echo(line, err=True)


def _summary(made: Calibration) -> str:
    layers = made.layers.values()
    centered = ", ".join(
        f"{side} of {sum(getattr(layer, f'{side.lower()}_mean') is not None for layer in layers)} centered" for side in "KV"
    )
    words = f"{len(layers)} layers from {made.tokens} tokens, {centered}"
    if made.sink_distance > SINK_DISTANCE:
        far = f"its K lies {made.sink_distance:.1f} times as far from the mean as that of others"
        words += f"; token {made.sink} is an attention sink ({far}): keep --cache-sink above {made.sink}"
    return words
