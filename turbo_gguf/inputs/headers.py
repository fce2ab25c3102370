"""The header of a model, wherever it is: nothing is fetched, and a file is not read to its end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.inputs import hub
from turbo_gguf.inputs.gguf_file import Fields, GgufFile, Tensor
from turbo_gguf.inputs.named import NAMED


class Header(msgspec.Struct, frozen=True):
    """What a model says of itself."""

    spec: str  # as it was named
    name: str
    fields: Fields
    tensors: tuple[Tensor, ...]
    path: Path | None  # of the (first) file, if it is here
    size: int  # bytes of all files


def read(spec: str) -> Header:
    """Read the header of a path, a hub id or a name.

    Raises:
        UsageError: no such file, repository or name, or it is no complete GGUF.
        EnvironmentMissing: the hub can't be reached, or a model with a name was not fetched.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return _header(spec, GgufFile(path), path)
    if named := NAMED.get(spec):
        if not named.path.is_file():
            raise EnvironmentMissing(f"model {spec} is not here yet", f"turbo-gguf models fetch {spec}")
        return _header(spec, GgufFile(named.path), named.path)
    found = hub.parse(spec)
    if found is None or (path.suffix == ".gguf" and found[1] is None):
        raise UsageError(f"model {spec}: no such file", f"give a path, org/name, org/name:file.gguf, or a name: {', '.join(NAMED)}")
    return _header(spec, *hub.header(*found))


def _header(spec: str, found: GgufFile, path: Path | None) -> Header:
    name = str(found.fields.get("general.name", found.parts[0].stem))
    return Header(spec, name, found.fields, tuple(found.tensors), path, found.size)
