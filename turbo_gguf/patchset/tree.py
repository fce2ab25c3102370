"""A llama.cpp source tree, pristine or patched."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Tree(msgspec.Struct, frozen=True):
    """A patched upstream source tree."""

    path: Path
    upstream: str  # name in upstreams.toml, or the source that was given
    commit: str  # llama.cpp commit, "unknown" for a plain folder
    digest: str  # sha256 of series + hooks + overlay; "" for a pristine tree
