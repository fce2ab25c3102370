"""Options that several commands share, and how their values become records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.inputs.named import NAMED
from turbo_gguf.make.presets import PRESETS

Command = TypeVar("Command", bound=Callable[..., Any])


def model(command: Command) -> Command:
    """``--model``, for :func:`model_of`."""
    text = f"GGUF file, org/name or org/name:file.gguf, or {', '.join(NAMED)}.  [default: the embedded model]"
    return click.option("--model", "model_spec", metavar="PATH|HUB|NAME", help=text)(command)


def preset(command: Command) -> Command:
    """``--preset``."""
    return click.option(
        "--preset", type=click.Choice(list(PRESETS)), default="cpu", show_default=True, help="What llama.cpp is built for."
    )(command)


def upstream(command: Command) -> Command:
    """``--upstream``."""
    text = "Name from `upstream list`, PACKAGE==VERSION, a folder, a tarball, or GIT-URL@COMMIT.  [default: that of `upstream list`]"
    return click.option("--upstream", "--source", metavar="SOURCE", help=text)(command)


def threads(command: Command) -> Command:
    """``--threads``."""
    return click.option("--threads", type=click.IntRange(min=1), help="Threads of llama.cpp.  [default: one per core]")(command)


def jobs(command: Command) -> Command:
    """``--jobs``."""
    return click.option("--jobs", "-j", type=click.IntRange(min=1), help="Parallel compiler processes.  [default: one per core]")(command)


def report_folder(name: str) -> Callable[[Command], Command]:
    """``--out`` of a command that writes a table and a plot, below ``report/`` by default."""
    text = f"Folder for table.md and plot.png.  [default: report/{name}]"
    return click.option("--out", type=click.Path(path_type=Path, file_okay=False), help=text)


def model_of(spec: str | None) -> ModelFile:
    """Return the model that ``--model`` names, the embedded one without it."""
    return models.resolve(spec) if spec else models.embedded()


def split(values: Sequence[str]) -> tuple[str, ...]:
    """Flatten cache types that were repeated, separated by commas, or both.

    Types start with a letter. What follows a comma inside of them does not: ``turbo3 k=0,-1:q8_0,turbo3 decay=15,35,50`` is two.
    """
    return tuple(part.strip() for value in values for part in re.split(r",(?=\s*(?:[A-Za-z,]|$))", value) if part.strip())
