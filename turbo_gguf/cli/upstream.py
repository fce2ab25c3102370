"""``turbo-gguf upstream``: the llama.cpp snapshots that we work on."""

from __future__ import annotations

import click

from turbo_gguf.make.upstream import default_name, fetch, is_fetched, resolve, supported


@click.group(name="upstream")
def command() -> None:
    """List and fetch the llama.cpp snapshots that we work on."""


@command.command(name="list")
def list_() -> None:
    """Print name, commit and state of every supported upstream."""
    default = default_name()
    for name, upstream in supported().items():
        state = "fetched" if is_fetched(upstream) else "-"
        click.echo(f"{name}  {upstream.commit}  {state}{'  (default)' if name == default else ''}")


@command.command(name="fetch")
@click.argument("source", required=False)
def fetch_(source: str | None) -> None:
    """Fetch, verify and unpack SOURCE, and print the folder of the pristine tree.

    SOURCE is a name from `upstream list` (the default one when it is left out), a folder, FILE.tar.gz, FILE.tar.gz#sha256=HEX, or
    GIT-URL@COMMIT. An archive without a pinned sha256 is unpacked and its sha256 printed.
    """
    upstream = resolve(source)
    tree = fetch(upstream)
    click.echo(tree.path)
