"""``turbo-gguf build``: fetch, patch and compile llama.cpp."""

from __future__ import annotations

import click

from turbo_gguf.cli import options
from turbo_gguf.make.build import DEFAULT_TARGETS, ensure_build


@click.command(name="build")
@options.preset
@options.upstream
@click.option("--target", "targets", multiple=True, help=f"CMake target, may be repeated.  [default: {', '.join(DEFAULT_TARGETS)}]")
@options.jobs
@click.option("--pristine", is_flag=True, help="Build upstream without our patches, to compare with.")
def command(preset: str, upstream: str | None, targets: tuple[str, ...], jobs: int | None, pristine: bool) -> None:
    """Fetch, patch and compile llama.cpp; print the folder of its programs. What is built already is not built again."""
    done = ensure_build(preset, upstream=upstream, targets=targets or DEFAULT_TARGETS, jobs=jobs, pristine=pristine)
    click.echo(
        f"build {done.id}: {done.preset}, llama.cpp {done.tree.commit}, patches {done.tree.digest[:12] or 'none'}, {done.compiler}",
        err=True,
    )
    click.echo(done.path / "bin")
