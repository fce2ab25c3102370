"""The values that flow through the driver: frozen, typed, and versioned where they reach a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

SCHEMA_VERSION = 1
"""Version of every record written to the store. Readers refuse newer ones."""

METRICS_VERSION = 1
"""Raised whenever the meaning of a stored metric changes: results of different versions are never compared."""


class Tree(msgspec.Struct, frozen=True):
    """A patched upstream source tree."""

    path: Path
    upstream: str  # name in upstreams.toml, or the source that was given
    commit: str  # llama.cpp commit, "unknown" for a plain folder
    digest: str  # sha256 of series + hooks + overlay; "" for a pristine tree


class Build(msgspec.Struct, frozen=True):
    """A finished build of a tree."""

    id: str  # short hash of commit, digest, preset, compiler and CMake options
    path: Path  # CMake build folder
    preset: str
    tree: Tree
    compiler: str

    def tool(self, name: str) -> Path:
        """Path of a built program such as ``llama-perplexity``."""
        return self.path / "bin" / name


class Run(msgspec.Struct, frozen=True):
    """One finished process. Standard output and error go to files of their own."""

    argv: tuple[str, ...]
    rc: int  # negative: killed by that signal
    seconds: float
    stdout: Path
    stderr: Path
