"""Results on disk: JSON lines that are only ever appended to.

``results.jsonl`` holds our records (:class:`~turbo_gguf.measure.result.Result`, :class:`~turbo_gguf.measure.result.BenchRow`,
:class:`~turbo_gguf.measure.result.ServeRow`);
``llama-bench.jsonl`` beside it holds the rows of llama-bench exactly as it printed them, so that upstream's
``scripts/compare-llama-bench.py --tool llama-bench -i llama-bench.jsonl`` reads them.

A record is one write of one line under a lock, followed by fsync. A process killed in the middle leaves a line without its
end: readers ignore it, and the next writer moves it to ``*.torn`` before it appends. A full disk takes the line back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from turbo_gguf import assets
from turbo_gguf.cache import written
from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.files import MORE_SPACE
from turbo_gguf.measure.case import METRICS_VERSION
from turbo_gguf.measure.result import SCHEMA_VERSION, BenchRow, Result, ServeRow

Record = Result | BenchRow | ServeRow

LOCK_SECONDS = 60.0
"""Longest wait for another writer: an append takes milliseconds."""


class _Version(msgspec.Struct):
    schema_version: int


_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record, dec_hook=written.decode)
_VERSION = msgspec.json.Decoder(_Version)


def default_folder() -> Path:
    """Where results go: ``results`` below :func:`turbo_gguf.assets.home`."""
    return assets.home() / "results"


class Store:
    """The results in a folder, which is made when the first record is written."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open nothing yet; ``folder`` is :func:`default_folder` when None."""
        self.folder = folder or default_folder()
        self.path = self.folder / "results.jsonl"
        self.bench_path = self.folder / "llama-bench.jsonl"

    def append(self, records: Sequence[Record]) -> None:
        """Write records, each file's all or none.

        Raises:
            EnvironmentMissing: the disk is full or the file cannot be written; what was there before is untouched.
        """
        rows = [record.row for record in records if isinstance(record, BenchRow)]
        if rows:  # first: what is missing in results.jsonl is measured again, what is missing here would never come
            self._append(self.bench_path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        self._append(self.path, b"".join(msgspec.json.encode(record, enc_hook=written.encode) + b"\n" for record in records))

    def results(self) -> list[Result]:
        """All finished cases of this metrics version, in the order in which they were stored; the last of a key wins.

        Raises:
            UsageError: the file is damaged, or a newer version of this program wrote it.
        """
        found = {
            record.key: record for record in self._read() if isinstance(record, Result) and record.case.metrics_version == METRICS_VERSION
        }
        return list(found.values())

    def left_out(self) -> int:
        """How many records :meth:`results` leaves out because their metrics are of another version.

        Raises:
            UsageError: as :meth:`results`.
        """
        return sum(isinstance(record, Result) and record.case.metrics_version != METRICS_VERSION for record in self._read())

    def bench_rows(self) -> list[BenchRow]:
        """All rows of llama-bench, in the order in which they were stored.

        Raises:
            UsageError: as :meth:`results`.
        """
        return [record for record in self._read() if isinstance(record, BenchRow)]

    def serve_rows(self) -> list[ServeRow]:
        """All loads on servers, in the order in which they were stored.

        Raises:
            UsageError: as :meth:`results`.
        """
        return [record for record in self._read() if isinstance(record, ServeRow)]

    def _read(self) -> Iterable[Record]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]  # what follows the last line end was torn by a kill, or is being written
        for number, line in enumerate(whole.splitlines(), start=1):
            if line.strip():
                yield _decode(line, self.path, number)

    def _append(self, path: Path, data: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(str(path) + ".lock", timeout=LOCK_SECONDS):
                _append_lines(path, data)
        except Timeout as error:
            raise EnvironmentMissing(
                f"{path}: another process has held the lock for {LOCK_SECONDS:g} s", "wait for it, or end it"
            ) from error
        except OSError as error:
            raise EnvironmentMissing(
                f"{path}: cannot be written: {error.strerror or error}",
                f"{MORE_SPACE}; then run again, finished cases are kept",
            ) from error


def _decode(line: bytes, path: Path, number: int) -> Record:
    try:
        version = _VERSION.decode(line).schema_version
        if version <= SCHEMA_VERSION:
            return _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}:{number}: not a result: {error}", "move the line away; the others are kept") from error
    raise UsageError(f"{path}:{number}: schema version {version}, this program knows up to {SCHEMA_VERSION}", "update turbo-gguf")


def _append_lines(path: Path, data: bytes) -> None:
    """Append whole lines. On any error the file is cut back to what it held before."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = _move_torn_line_aside(fd, path)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(fd, data[written:], end + written)
            os.fsync(fd)
        except BaseException:
            os.ftruncate(fd, end)
            raise
    finally:
        os.close(fd)


def _move_torn_line_aside(fd: int, path: Path) -> int:
    """Return the offset after the last whole line; move what a killed process left behind it to ``*.torn``."""
    size = os.fstat(fd).st_size
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(65536, start)
        start -= step
        tail = os.pread(fd, step, start) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if torn:
        with Path(str(path) + ".torn").open("ab") as aside:
            aside.write(torn + b"\n")
        os.ftruncate(fd, size - len(torn))
    return size - len(torn)
