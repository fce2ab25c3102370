"""Files on disk: hashes, writing whole or not at all, locks between processes, and what to say when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from turbo_gguf.assets import home
from turbo_gguf.errors import EnvironmentMissing

MORE_SPACE = "free space, or set TURBO_GGUF_HOME to a folder on another disk"
"""What to do about a full disk."""

OTHER_HOME = "set TURBO_GGUF_HOME to a folder that you can write to"
"""What to do about one that refuses."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: OSError) -> bool:
    """Whether the disk, or this user's part of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(doing: str, needs: int = 0) -> Iterator[None]:
    """Turn a full disk into an error that says what to do.

    Args:
        doing: what the block does, for the message.
        needs: bytes that it needs, when that is known.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        size = f" (needs {needs // 1_000_000} MB)" if needs else ""
        raise EnvironmentMissing(f"{doing}: no space left on the disk of {home()}{size}", MORE_SPACE) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to: what is there at the end replaces it, an error leaves it as it was.

    The name has this process's id, so that two writers never share it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # such as no folder: the first error counts
            temporary.unlink()


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """The same for text, in UTF-8."""
    return write_whole(path, text.encode("utf-8"))


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a lock between processes, as long as the block runs; wait for it without limit."""
    path = home() / "locks" / f"{name}.lock"
    with disk_errors("taking a lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path)
        try:
            held.acquire(timeout=0.2)
        except filelock.Timeout:
            print(f"waiting for another turbo-gguf to finish ({path})", file=sys.stderr)
            held.acquire()
    try:
        yield
    finally:
        held.release()
