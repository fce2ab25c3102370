"""Options that several commands share, and how their values become records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.inputs import headers, models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.inputs.named import NAMED
from turbo_gguf.make import toolkits
from turbo_gguf.make.presets import PRESETS
from turbo_gguf.tune import preset as preset_files
from turbo_gguf.tune.preset import Made

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def model(command: Command) -> Command:
    """``--model``, for :func:`model_of`."""
    text = f"GGUF file, org/name or org/name:file.gguf, or {', '.join(NAMED)}.  [default: the embedded model]"
    return click.option("--model", "model_spec", metavar="PATH|HUB|NAME", help=text)(command)


def preset(command: Command) -> Command:
    """``--preset``."""
    return click.option(
        "--preset", type=click.Choice(list(PRESETS)), default="cpu", show_default=True, help="What llama.cpp is built for."
    )(command)


def preset_here(command: Command) -> Command:
    """``--preset``, for :func:`preset_of`: that of this machine where none is named."""
    text = "What llama.cpp is built for.  [default: the GPU that is here, else cpu]"
    return click.option("--preset", type=click.Choice(list(PRESETS)), help=text)(command)


def preset_of(name: str | None) -> str:
    """The preset that was named, or that of the first GPU here, or ``cpu``."""
    return name or next((toolkit.name for toolkit in toolkits.with_gpu() if toolkit.by_default), "cpu")


def server(command: Command) -> Command:
    """``--server``."""
    kind = click.Path(path_type=Path, exists=True, dir_okay=False)
    return click.option("--server", type=kind, metavar="FILE", help="llama-server of another build.")(command)


def slots(default: str) -> Callable[[Command], Command]:
    """``--ctx``, ``--parallel`` and ``--kv-unified``; ``default`` is that of the first."""

    def add(command: Command) -> Command:
        text = f"Tokens of a slot; with --kv-unified of all slots.  [default: {default}]"
        command = click.option("--kv-unified", "-kvu", is_flag=True, help="One pool of cells for all slots.")(command)
        command = click.option("--parallel", "-np", default=1, show_default=True, type=click.IntRange(1, 256), help="Slots.")(command)
        return click.option("--ctx", type=click.IntRange(min=1), help=text)(command)

    return add


def memory(command: Command) -> Command:
    """``--memory``, in bytes."""
    text = "Memory that there is.  [default: what is free here, on the GPUs of the build if it has any, less 1 GiB]"
    return click.option("--memory", "memory_bytes", callback=bytes_of, metavar="24GiB", help=text)(command)


def device(command: Command) -> Command:
    """``--device``, for :func:`turbo_gguf.plan.devices.named`."""
    text = "GPUs to use, by number or name in `llama-server --list-devices`.  [default: all]"
    return click.option("--device", metavar="N|NAME,...", help=text)(command)


def bytes_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes of ``24GiB`` or ``512M``."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?)i?B?", value, re.IGNORECASE)
    if not found:
        raise click.BadParameter(f"{value!r} is no amount of memory such as 24GiB or 512MiB", ctx, param)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def cache_preset(command: Command) -> Command:
    """``--cache-preset``, for :func:`preset_types`."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("--cache-preset", type=kind, metavar="FILE", help="Cache that `tune` found for this model.")(command)


def preset_types(path: Path | None, model: ModelFile) -> tuple[CacheSpec, ...]:
    """The cache of ``--cache-preset``, none without it.

    Raises:
        UsageError: the file is damaged, or for another model.
    """
    if path is None:
        return ()
    header = headers.read(str(model.path))
    return (preset_files.for_model(path, Made.of(header.name, header.fields)).types,)


def upstream(command: Command) -> Command:
    """``--upstream``."""
    text = "Name from `upstream list`, PACKAGE==VERSION, a folder, a tarball, or GIT-URL@COMMIT.  [default: that of `upstream list`]"
    return click.option("--upstream", "--source", metavar="SOURCE", help=text)(command)


def threads(command: Command) -> Command:
    """``--threads``."""
    return click.option("--threads", type=click.IntRange(min=1), help="Threads of llama.cpp.  [default: one per core]")(command)


def ray(command: Command) -> Command:
    """``--ray``, for :func:`turbo_gguf.cluster.runner.joined`."""
    text = (
        "Ray cluster that measures: HOST:PORT of its head, `auto` for the one that this machine is in, or `local` for one of this machine."
    )
    return click.option("--ray", metavar="ADDRESS|local", help=f"{text}  [default: none, one case after the other]")(command)


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
