"""Warnings about snapshots that are known to compute wrongly on a GPU (``[[known_wrong]]`` in ``upstreams.toml``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from turbo_gguf.make.snapshots import KnownWrong, default_name, known_wrong


def warnings(tree: Path, gpus: Iterable[str]) -> list[str]:
    """Say what is known to be wrong in a llama.cpp tree on the GPUs of these architectures (such as gfx1151)."""
    names = [name.partition(":")[0] for name in gpus]  # without features such as :xnack-
    found = []
    for wrong in known_wrong():
        hit = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wrong.gpus)]
        if hit and _applies(wrong, tree):
            found.append(f"known to be wrong on {', '.join(hit)}: {wrong.what} ({wrong.reference})")
    return found


def advice(upstream: str) -> str:
    """What to do instead of using an upstream with a warning."""
    return f"use --upstream {default_name()}" if upstream != default_name() else "run `make gpu-proof` before you trust results"


def _applies(wrong: KnownWrong, tree: Path) -> bool:
    try:
        text = (tree / wrong.file).read_text("utf-8", errors="replace")
    except OSError:
        return False
    return re.search(wrong.text, text, re.MULTILINE) is not None
