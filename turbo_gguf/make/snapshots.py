"""The list of llama.cpp snapshots, ``ggml-patches/upstreams.toml``: what is supported, where it comes from, what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from turbo_gguf.assets import home, patches_dir
from turbo_gguf.errors import UsageError


class Upstream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a llama.cpp tree comes from."""

    name: str
    commit: str = "unknown"  # of llama.cpp, or its tag such as b11549
    kind: Literal["sdist", "git", "tarball", "folder"] = "sdist"
    package: str = ""  # sdist: name and version in the package registry
    version: str = ""
    sha256: str = ""  # of the archive; "" when it is not pinned
    subfolder: str = ""  # sdist: where llama.cpp lies in it; "": it is looked for
    build: int = 0  # upstream's build number; 0: not known
    location: str = ""  # git: URL; tarball, folder: path

    @property
    def pristine(self) -> Path:
        """Folder of the unpacked tree."""
        return home() / "upstream" / (self.name if self.commit == self.name else f"{self.name}-{self.commit}")

    @property
    def archive(self) -> Path:
        """Where the archive of an sdist is kept, under the name that the registry gives it."""
        return home() / "downloads" / f"{self.package.replace('-', '_')}-{self.version}.tar.gz"

    @property
    def title(self) -> str:
        """Name, with the build number where the name does not have it."""
        return self.name if not self.build or str(self.build) in self.name else f"{self.name} (b{self.build})"


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Python package whose source distributions hold the whole of llama.cpp."""

    name: str
    subfolder: str
    build: str = ""  # regular expression: upstream's build number in a version; "": versions have none

    def build_of(self, version: str) -> int:
        """Upstream's build number of a version, 0 when it has none."""
        match = re.fullmatch(self.build, version) if self.build else None
        return int(match[1]) if match else 0


class KnownWrong(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Snapshots that compute wrongly on some GPUs: those with a text in a file."""

    file: str  # in the tree
    text: str  # regular expression, found in a line of it
    gpus: tuple[str, ...]  # patterns of architectures, such as gfx115*
    what: str
    reference: str


class Snapshots(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file ``upstreams.toml``."""

    default: str
    upstream: list[Upstream]
    package: list[Package] = []
    known_wrong: list[KnownWrong] = []


def default_name() -> str:
    """Name of the upstream that is used when none is given."""
    return snapshots().default


def supported() -> dict[str, Upstream]:
    """The upstreams of ``upstreams.toml`` by name, newest first."""
    return {item.name: item for item in snapshots().upstream}


def packages() -> dict[str, Package]:
    """The packages that snapshots come from, by name."""
    return {item.name: item for item in snapshots().package}


def known_wrong() -> list[KnownWrong]:
    """What is known to be wrong in snapshots."""
    return snapshots().known_wrong


def snapshots() -> Snapshots:
    """Read ``upstreams.toml``; each upstream gets the subfolder of its package.

    Raises:
        UsageError: the file is missing or wrong.
    """
    path = patches_dir() / "upstreams.toml"
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=Snapshots)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path}: {error}") from error
    folders = {package.name: package.subfolder for package in found.package}
    filled = [msgspec.structs.replace(item, subfolder=item.subfolder or folders.get(item.package, "")) for item in found.upstream]
    return msgspec.structs.replace(found, upstream=filled)
