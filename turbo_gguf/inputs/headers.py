"""The header of a model, wherever it is: nothing is fetched, and a file is not read to its end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.inputs import hub, models
from turbo_gguf.inputs.gguf_file import Fields, GgufFile, Tensor
from turbo_gguf.inputs.named import NAMED


class Header(msgspec.Struct, frozen=True):
    """What a model says of itself."""

    spec: str  # as it was named
    name: str
    fields: Fields
    tensors: tuple[Tensor, ...]
    path: Path | None  # of the (first) file, if it is here


def read(spec: str) -> Header:
    """Read the header of a path, a hub id or a name.

    Raises:
        UsageError: no such file, repository or name, or it is no complete GGUF.
        EnvironmentMissing: the hub can't be reached, or a model with a name was not fetched.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return _header(spec, GgufFile(path), path)
    if spec in NAMED:
        path = NAMED[spec].path
        if not path.is_file():
            raise EnvironmentMissing(f"model {spec} is not here yet", f"turbo-gguf models fetch {spec}")
        return _header(spec, GgufFile(path), path)
    found = _of_hub(spec)
    if found is None:
        raise UsageError(f"model {spec}: no such file", f"give a path, org/name, org/name:file.gguf, or a name: {', '.join(NAMED)}")
    return _header(spec, *hub.header(*found))


def fetched(spec: str) -> Header:
    """The same, of a model that is fetched when it is not here yet.

    Raises:
        UsageError: as :func:`read`.
        EnvironmentMissing: the hub or the registry cannot be reached, or what it sent is not what was announced.
    """
    path = Path(spec).expanduser()
    if not path.is_file() and spec in NAMED:
        path = models.resolve(spec).path  # which compares it with its pin
        return _header(spec, GgufFile(path), path)
    if not path.is_file() and (found := _of_hub(spec)):
        path = hub.download(*found)
        return _header(spec, GgufFile(path), path)
    return read(spec)


def _of_hub(spec: str) -> tuple[str, str | None] | None:
    """Repository and file. A path of two parts that ends in .gguf is no repository."""
    found = hub.parse(spec)
    return None if found is None or (spec.endswith(".gguf") and found[1] is None) else found


def _header(spec: str, found: GgufFile, path: Path | None) -> Header:
    name = str(found.fields.get("general.name", found.parts[0].stem))
    return Header(spec, name, found.fields, tuple(found.tensors), path)
