"""Open a GGUF file; what is wrong with it becomes one error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbo_gguf.errors import UsageError


class GgufFile:
    """Metadata and tensors of a file, in the form of the ``gguf`` package.

    Raises:
        UsageError: the file is missing, is no GGUF, or is damaged or truncated.
    """

    def __init__(self, path: Path, *, what: str = "", hint: str = "download it again", skips: str = ".tokens") -> None:
        """Read a file's header; tensors are mapped into memory.

        Args:
            path: of the file.
            what: what the file is, for messages.
            hint: what to do about a damaged one.
            skips: metadata with this in its name is left out; "": nothing is.
        """
        import gguf  # noqa: PLC0415 - takes a moment, and not every command needs it

        name = f"{what} {path}".strip()
        try:
            reader = gguf.GGUFReader(path)
            self.tensors: list[Any] = reader.tensors
            self.fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items() if not (skips and skips in key)}
            self.end = max((int(t.data_offset) + int(t.n_bytes) for t in self.tensors), default=0)  # of the last tensor, in bytes
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from error
        except Exception as error:  # a cut file raises ValueError, IndexError, KeyError, UnicodeDecodeError, ... from numpy
            size = path.stat().st_size
            raise UsageError(f"{name}: GGUF file damaged or truncated at {size} bytes ({error})", hint) from error
