"""Read a Containerfile: stages and instructions with their arguments filled in, as far as our own files need it.

Known are FROM, ARG, ENV, RUN (with cache mounts), COPY, WORKDIR, USER, VOLUME, EXPOSE, HEALTHCHECK and ENTRYPOINT. Anything else is an
error, so that a file never means more than what is checked and tried here.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
VERSIONS = HERE / "versions.toml"

_KNOWN = ("FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Wrong(Exception):
    """A Containerfile says something that we do not know, or that cannot be."""


@dataclass(frozen=True)
class Step:
    """A RUN or COPY, with what is in force where it stands."""

    word: str
    text: str  # of RUN: what the shell gets; of COPY: its words
    user: str
    folder: str
    variables: Mapping[str, str]  # of ENV and of ARG
    mounts: tuple[str, ...] = ()  # folders of cache mounts
    source: str = ""  # stage that COPY takes from; "": the repository


@dataclass
class Stage:
    """A stage, and what its image says at the end."""

    name: str
    image: str  # name of an image, or of an earlier stage
    steps: list[Step] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    folder: str = "/"
    volumes: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    health: str = ""  # what the shell gets
    health_options: Mapping[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """Containers that there are."""
    return sorted(path.stem for path in HERE.glob("*.Containerfile"))


def path_of(name: str) -> Path:
    """The Containerfile of a container."""
    return HERE / f"{name}.Containerfile"


def arguments(name: str, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Build arguments of a container: those of versions.toml, and those that are given."""
    table = tomllib.loads(VERSIONS.read_text("utf-8"))
    found = {key: table["images"][value] if key.endswith("_IMAGE") else value for key, value in table["containers"][name].items()}
    found["PYTHON_PACKAGES"] = " ".join(f"{package}=={version}" for package, version in table["python"].items())
    unknown = set(own or ()) - set(found)
    if unknown:
        raise Wrong(f"{name} has no argument {', '.join(sorted(unknown))}; it has {', '.join(found)}")
    return {**found, **(own or {})}


def read(text: str, given: Mapping[str, str]) -> list[Stage]:
    """The stages of a Containerfile.

    Raises:
        Wrong: an instruction that is not known, or a variable that nothing sets.
    """
    stages: list[Stage] = []
    outer: dict[str, str] = {}
    for word, rest in instructions(text):
        if word == "ARG" and not stages:
            _set_argument(rest, given, outer)
        elif word == "FROM":
            image, _, name = _fill(rest, outer).partition(" AS ")
            parent = next((stage for stage in stages if stage.name == image), None)
            inherited = {"env": dict(parent.env), "user": parent.user, "folder": parent.folder} if parent else {}
            stages.append(Stage(name=name, image=image, **inherited))
        elif not stages:
            raise Wrong(f"{word} before the first FROM")
        else:
            _apply(word, rest, stages[-1], given)
    return stages


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Word and rest of each instruction, comments gone and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word not in _KNOWN:
            raise Wrong(f"{word} is not known here")
        yield word, " ".join(rest.split()) if word != "RUN" else rest.strip()


def _apply(word: str, rest: str, stage: Stage, given: Mapping[str, str]) -> None:
    here = {**stage.arguments, **stage.env}
    if word == "ARG":
        _set_argument(rest, given, stage.arguments)
    elif word == "ENV":
        stage.env |= dict(pair.split("=", 1) for pair in shlex.split(_fill(rest, here)))
    elif word == "WORKDIR":
        stage.folder = _fill(rest, here)
    elif word == "USER":
        stage.user = _fill(rest, here)
    elif word == "VOLUME":
        stage.volumes += tuple(json.loads(rest))
    elif word == "EXPOSE":
        stage.ports += tuple(rest.split())
    elif word == "ENTRYPOINT":
        stage.entrypoint = tuple(json.loads(rest))
    elif word == "HEALTHCHECK":
        options, _, stage.health = rest.partition(" CMD ")
        stage.health_options = dict(item.removeprefix("--").split("=", 1) for item in options.split())
    else:
        stage.steps.append(_step(word, rest, stage, here))


def _step(word: str, rest: str, stage: Stage, here: Mapping[str, str]) -> Step:
    mounts: tuple[str, ...] = ()
    source = ""
    while rest.startswith("--"):
        option, _, rest = rest.partition(" ")
        mount = re.fullmatch(r"--mount=type=cache,target=(\S+)", option)
        if word == "RUN" and mount:
            mounts += (mount[1],)
        elif word == "COPY" and option.startswith("--from="):
            source = option.removeprefix("--from=")
        else:
            raise Wrong(f"{word} {option} is not known here")
    text = rest if word == "RUN" else _fill(rest, here)
    return Step(word, text, stage.user, stage.folder, dict(here), mounts, source)


def _set_argument(rest: str, given: Mapping[str, str], into: dict[str, str]) -> None:
    name, equals, default = rest.partition("=")
    if name not in given and not equals:
        raise Wrong(f"nothing sets the argument {name}")
    into[name] = given.get(name, default)


def _fill(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise Wrong(f"nothing sets {name}")
        return variables[name]

    return _VARIABLE.sub(value, text)
