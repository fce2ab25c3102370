"""``turbo-gguf models``: fetch model files and say what is in them."""

from __future__ import annotations

import click

from turbo_gguf.cache.types import CACHE_TYPES
from turbo_gguf.cli import options
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.inputs.named import NAMED


@click.group(name="models")
def command() -> None:
    """Fetch model files, and say what is in them."""


@command.command()
@click.argument("spec", metavar="HUB|NAME")
def fetch(spec: str) -> None:
    """Download a model, check it, and print the path of its (first) file.

    HUB is org/name or org/name:file.gguf, NAME one of `models list`. All files of a model in several are fetched. An interrupted
    download from the hub resumes. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.
    """
    click.echo(models.resolve(spec).path)


@command.command(name="list")
def list_() -> None:
    """Print the models that --model takes by name, and which of them are here."""
    for model in NAMED.values():
        here = model.path if model.path.is_file() else "not fetched"
        click.echo(f"{model.name}  {model.about}  {model.size / 1e6:.0f} MB  {model.licence}  {model.package} {model.version}  {here}")


@command.command()
@click.argument("spec", metavar="[PATH|HUB|NAME]", required=False)
def show(spec: str | None) -> None:
    """Print the metadata of a model that decides what can be measured; the embedded model without an argument."""
    click.echo(describe(options.model_of(spec)))


@command.command(name="eval-text")
def eval_text() -> None:
    """Write the held-out evaluation text of the embedded model, and print its path."""
    text = models.held_out_text()
    click.echo(f"sha256 {text.sha256}, {text.size} bytes", err=True)
    click.echo(text.path)


def describe(model: ModelFile) -> str:
    """One line per property."""
    kv = sorted(set(model.n_head_kv))
    fit = [t.name for t in CACHE_TYPES.values() if model.head_k % t.block == 0 and model.head_v % t.block == 0]
    values = sum(model.n_head_kv) * (model.head_k + model.head_v)
    return "\n".join(
        (
            *(f"{'path' if i == 0 else '':<13}{path}" for i, path in enumerate(model.parts or (model.path,))),
            f"sha256       {model.sha256}",
            f"size         {model.size} bytes",
            f"name         {model.name}",
            f"weights      {', '.join(model.weights)}",
            f"architecture {model.arch}",
            f"layers       {model.n_layer}",
            f"KV heads     {', '.join(map(str, kv))}",
            f"head size    K {model.head_k}, V {model.head_v}",
            f"context      {model.n_ctx_train}",
            f"vocabulary   {model.n_vocab}",
            f"KV cache     {values * 2 * 1024 / 2**20:.1f} MiB per 1024 tokens in f16",
            f"cache types  {', '.join(fit)}",
        )
    )
