"""``turbo-gguf fuse``: a calibration and the rotation of V go into the weights of a model."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_gguf.fuse import model as fused
from turbo_gguf.fuse.model import Fused
from turbo_gguf.inputs import models

FALLBACKS = ("f32", "f16", "bf16", "q8_0")


@click.command(name="fuse")
@click.argument("model_spec", metavar="MODEL")
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False), help="Fold its scales and means, too.  [default: none]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write: OUT.gguf.")
@click.option(
    "--fallback",
    type=click.Choice(FALLBACKS),
    help="Type of attn_v and attn_output where theirs is below 8 bits.  [default: leave them]",
)
def command(*, model_spec: str, calibration: Path | None, out: Path, fallback: str | None) -> None:
    """Fold what a KV cache does to K and V into the weights of MODEL, and write the model to OUT.

    MODEL is a path, a hub id or a name. V is rotated, scaled and centered by its projection, and the output projection undoes it. Pairs of
    channels of K are scaled by powers of two, and those of Q divided. OUT computes what MODEL does, up to the rounding of its weights, in
    any llama.cpp. What is left of the calibration goes to OUT.calibration.gguf, for --cache-calibration. What can't be folded is named.
    """
    model = models.resolve(model_spec)
    made = fused.fuse(
        model.path,
        calibration,
        out,
        fallback=fallback.upper() if fallback else None,
        say=lambda line: click.echo(line, err=True),
    )
    for line in _summary(made):
        click.echo(line, err=True)
    click.echo(made.path)
    click.echo(made.calibration)


def _summary(made: Fused) -> list[str]:
    of = len(made.folds)
    parts = ", ".join(f"{part} of {made.count(part)}" for part in ("V", "means of V", "K"))
    lines = [f"folded, of {of} layers: {parts}; {made.n_changed} tensors are other ones"]
    if made.converted:
        lines.append(f"another type: {len(made.converted)} tensors, the first is {made.converted[0]}")
    for reason, places in made.left.items():
        lines.append(f"left: {places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}")
    switch = f"{'='.join(fused.SWITCH)} " if made.is_rotated else ""
    return [*lines, f"use: {switch}llama-server -m {made.path} --cache-calibration {made.calibration} -ctk turbo4t -ctv turbo4t"]
