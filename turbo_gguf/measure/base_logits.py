"""Base logits: the run with an f32 cache that all other cache types are compared with, kept on disk.

Its attention has neither flash attention nor anything in f16, so its sums are right whatever the batch (docs/design/0015-base-line.md).

``llama-perplexity --kl-divergence-base FILE`` writes, for each scored token, the log-probabilities of the whole vocabulary as
16-bit numbers. A file is only used when its run ended with a complete log and its size is exactly what the format says. It is
written under another name first, so that a killed run leaves nothing that looks finished. Files are shared by all cases of the
same build, model, text, context, chunks and batch, and the least recently used are removed beyond :data:`KEEP_BYTES`. Two locks keep
that safe between processes: one on its name while a file is looked for, made or removed, and a shared one on itself while it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from filelock import FileLock

from turbo_gguf import assets
from turbo_gguf.errors import EnvironmentMissing, LogNotUnderstood
from turbo_gguf.files import MORE_SPACE
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.result import BaseRun

KEEP_BYTES = 4 * 1024**3
"""Base logits kept on disk after a run; files in use are always kept."""

_MAGIC = b"_logits_"
_MORE_SPACE = f"{MORE_SPACE}, or use fewer --chunks"


def key_of(case: Case) -> str:
    """Name of the base file of a case: all cases that share it can be compared with it."""
    parts = (case.build_id, case.model_sha256, case.text_sha256, case.ctx, case.chunks, case.base_batch, case.backend, case.env)
    return hashlib.sha256(msgspec.json.encode((*parts, case.metrics_version))).hexdigest()[:20]


def folder() -> Path:
    """Where base logits are kept."""
    return assets.home() / "base"


def size_of(ctx: int, n_vocab: int, chunks: int) -> int:
    """Bytes of a file of base logits, as ``perplexity.cpp`` writes it.

    Magic, n_ctx, n_vocab and n_chunk (20 bytes); the tokens, 4 bytes each; and per chunk ctx - 1 - ctx/2 scored tokens of a
    scale and a minimum (float) and n_vocab 16-bit numbers, their count rounded up to an even one.
    """
    per_token = 2 * (2 * ((n_vocab + 1) // 2) + 4)
    return 20 + 4 * ctx * chunks + chunks * (ctx - 1 - ctx // 2) * per_token


def require_disk(case: Case, model: ModelFile, text: TextFile) -> int:
    """Check that the file will fit, and return its greatest possible size in bytes.

    Raises:
        EnvironmentMissing: not enough space; says how much is needed.
    """
    most = max(1, text.size // case.ctx)  # a token has one byte at least
    need = size_of(case.ctx, model.n_vocab, min(case.chunks, most) if case.chunks > 0 else most)
    folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder()).free
    if free < need * 1.02:
        raise EnvironmentMissing(
            f"base logits of {case.ctx} x {case.chunks} need {need / 1e6:.0f} MB, {folder()} has {free / 1e6:.0f} MB free",
            _MORE_SPACE,
        )
    return need


@contextlib.contextmanager
def ensured(case: Case, write: Callable[[Path], BaseRun]) -> Iterator[tuple[Path, BaseRun]]:
    """The file of base logits of a case, written when it is not there yet, and kept as long as the block runs.

    Args:
        case: any case that is to be compared with it.
        write: runs the tool so that it writes the given path, and returns its record.

    Raises:
        EnvironmentMissing: the disk ran full (the tool does not notice).
        LogNotUnderstood: the tool ended well, but the file is not complete.
    """
    path = folder() / f"{key_of(case)}.logits"
    record = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        run = _find(path, record)
        if run is None:
            _remove_leftovers(path)
            part = path.with_suffix(f".{os.getpid()}.part")
            try:
                run = write(part)
                found = part.stat().st_size if part.exists() else 0
                if found != run.size or not _complete(part, found):
                    raise _incomplete(part, found, run.size)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            record.write_bytes(msgspec.json.encode(run))
        os.utime(path)
        used = path.open("rb")
        fcntl.flock(used, fcntl.LOCK_SH)
    with used:
        prune()
        yield path, run


def _incomplete(part: Path, found: int, expected: int) -> EnvironmentMissing | LogNotUnderstood:
    """Tell a disk that ran full from a file that nobody understands. llama-perplexity checks no write."""
    message = f"base logits {part}: {found} bytes written, {expected} expected"
    if shutil.disk_usage(part.parent).free < expected - found:
        return EnvironmentMissing(f"{message}: the disk is full", _MORE_SPACE)
    return LogNotUnderstood(message)


def prune(limit: int = KEEP_BYTES) -> None:
    """Remove the least recently used files until the rest takes ``limit`` bytes at most. Those in use stay."""
    total = 0
    with FileLock(folder() / "prune.lock"):
        for path in sorted(folder().glob("*.logits"), key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > limit:
                _remove_unused(path)


def _remove_unused(path: Path) -> None:
    with contextlib.suppress(OSError), _named(path, timeout=0), path.open("r+b") as file:  # what is locked raises one, too
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)


def _named(path: Path, timeout: float = -1) -> FileLock:
    """The lock on the name of a file."""
    return FileLock(f"{path}.lock", timeout=timeout)


def _find(path: Path, record: Path) -> BaseRun | None:
    try:
        run = msgspec.json.decode(record.read_bytes(), type=BaseRun)
        size = path.stat().st_size
    except (OSError, msgspec.DecodeError):
        return None
    return run if size == run.size and _complete(path, size) else None


def _complete(path: Path, size: int) -> bool:
    """Whether a file of this size is what its own header promises."""
    with path.open("rb") as file:
        head = file.read(20)
    if len(head) < 20 or head[:8] != _MAGIC:
        return False
    ctx, n_vocab, chunks = (int.from_bytes(head[i : i + 4], "little") for i in (8, 12, 16))
    return size == size_of(ctx, n_vocab, chunks)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs of the same base left behind (the lock is held: no other run writes it)."""
    for part in path.parent.glob(f"{path.stem}.*.part"):
        part.unlink(missing_ok=True)
