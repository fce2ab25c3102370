"""``turbo-gguf build``: fetch, patch and compile llama.cpp."""

from __future__ import annotations

import click

from turbo_gguf.make.build import DEFAULT_TARGETS, ensure_build
from turbo_gguf.make.presets import PRESETS


@click.command(name="build")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="cpu", show_default=True, help="What to build for.")
@click.option(
    "--upstream",
    "--source",
    "spec",
    metavar="SOURCE",
    help="Name from `upstream list`, a folder, a tarball, or GIT-URL@COMMIT.  [default: the newest supported one]",
)
@click.option("--target", "targets", multiple=True, help=f"CMake target, may be repeated.  [default: {', '.join(DEFAULT_TARGETS)}]")
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Parallel compiler processes.  [default: one per core]")
@click.option("--pristine", is_flag=True, help="Build upstream without our patches, to compare with.")
def command(preset_name: str, spec: str | None, targets: tuple[str, ...], jobs: int | None, pristine: bool) -> None:
    """Fetch, patch and compile llama.cpp; print the folder of its programs. What is built already is not built again."""
    done = ensure_build(preset_name, upstream=spec, targets=targets or DEFAULT_TARGETS, jobs=jobs, pristine=pristine)
    click.echo(
        f"build {done.id}: {done.preset}, llama.cpp {done.tree.commit}, patches {done.tree.digest[:12] or 'none'}, {done.compiler}",
        err=True,
    )
    click.echo(done.path / "bin")
