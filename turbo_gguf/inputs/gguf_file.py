"""Read a GGUF file, or all files of a model in several; what is wrong becomes one error that names the file.

Headers are read here, not with the package ``gguf``: that one knows the tensor types of its own release, and calls a file with a newer type
damaged, which llama.cpp runs. ``gguf`` is only asked how large the blocks of a type are, and for the values of a tensor.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from turbo_gguf.errors import UsageError

Fields = dict[str, Any]
Spans = dict[str, tuple[int, int]]

_NEWER = {42: ("Q2_0", 64, 18)}
"""Types that the newest ``gguf`` does not know: name, values and bytes of a block."""

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_ONE_FOLDER = "put all files of the model into one folder, under the names that they had, and name the first one"


class _Damaged(Exception):
    """The header is not that of a GGUF file; the message says why."""


def part_names(name: str) -> list[str]:
    """Names of all files of a model, when ``name`` is one of several: ``x-00002-of-00003.gguf``; else ``name`` alone."""
    found = _PART.fullmatch(name)
    if found is None or int(found["count"]) < 2:
        return [name]
    return [f"{found['stem']}-{i + 1:05d}-of-{int(found['count']):05d}.gguf" for i in range(int(found["count"]))]


def parts(path: Path) -> list[Path]:
    """The same for a path. Names are those that were given: beside a link lie the links to the other parts."""
    return [path.with_name(name) for name in part_names(path.name)]


class Data(Protocol):
    """The bytes of a file, wherever it is. Only those that are asked for are needed."""

    def __len__(self) -> int:
        """Of the whole file."""

    def __getitem__(self, part: slice, /) -> bytes:
        """A part of it."""


@contextmanager
def _mapped(path: Path) -> Iterator[Data]:
    """A file of this machine."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise _Damaged("no data")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. ``ne`` is ggml's order: the first dimension is that of a row."""

    name: str
    type_id: int
    ne: tuple[int, ...]
    path: Path
    offset: int  # in the file, in bytes

    @property
    def type_name(self) -> str:
        """Name of the type, ``type 99`` where it is not known."""
        known = _type(self.type_id)
        return known[0] if known else f"type {self.type_id}"

    @property
    def n_bytes(self) -> int | None:
        """Size in the file; ``None`` when the type is not known."""
        known = _type(self.type_id)
        return math.prod(self.ne) // known[1] * known[2] if known else None

    def values(self) -> npt.NDArray[np.float32]:
        """The values, rows first, dequantized.

        Raises:
            UsageError: ``gguf`` cannot read this type.
        """
        import gguf  # noqa: PLC0415 - takes a moment, and not every command needs it
        from gguf import quants  # noqa: PLC0415

        shape = tuple(reversed(self.ne))
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.n_bytes or 0,)) if self.n_bytes else np.zeros(0, np.uint8)
        try:
            kind = gguf.GGMLQuantizationType(self.type_id)
            if kind.name in ("F64", "I8", "I16", "I32", "I64"):
                plain: npt.NDArray[Any] = data.view({"F64": "<f8"}.get(kind.name, f"<i{int(kind.name[1:] or 0) // 8}"))
                return plain.astype(np.float32).reshape(shape)
            if kind.name in ("F32", "F16"):
                return data.view("<f4" if kind.name == "F32" else "<f2").astype(np.float32).reshape(shape)
            return np.asarray(quants.dequantize(data.reshape(*shape[:-1], -1), kind), np.float32).reshape(shape)
        except (ValueError, NotImplementedError) as error:
            raise UsageError(
                f"{self.path}: tensor {self.name} is of {self.type_name} (id {self.type_id}), which the Python package gguf cannot read",
                "pip install --upgrade gguf, or take another quantization of the model",
            ) from error

    def rows(self) -> npt.NDArray[np.float32]:
        """The values as ``[rows, row]``. A file has no trailing dimensions of 1, so one row alone comes back with one dimension."""
        return self.values().reshape(-1, self.ne[0] if self.ne else 1)


class GgufFile:
    """Metadata and tensors of a file, and of the other files of its model.

    Attributes:
        fields: metadata of the (first) file.
        spans: where their types and values lie in it, as first and last offset: bytes to copy, whatever they mean.
        tensors: of all files.
        parts: the files, the first one first.
        size: of all files, in bytes.

    Raises:
        UsageError: a file is missing, is no GGUF, is damaged or truncated, or is not the first one of its model.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str = "",
        hint: str = "download it again",
        opened: Callable[[Path], AbstractContextManager[Data]] = _mapped,
    ) -> None:
        """Read the headers.

        Args:
            path: of the (first) file.
            what: what the file is, for messages.
            hint: what to do about a damaged one.
            opened: gives the data of a path, where it is no file of this machine.
        """
        self._what, self._hint, self._opened = what, hint, opened
        self.fields, self.spans, self.tensors, self.size = self._read(path)
        self.parts: tuple[Path, ...] = (path,)
        if int(self.fields.get("split.count", 0)) > 1:
            self._read_others(path, int(self.fields["split.count"]))

    def _read_others(self, path: Path, count: int) -> None:
        """Read the second and later files, with the checks that llama.cpp makes."""
        number = int(self.fields.get("split.no", 0)) + 1
        names = parts(path)
        if number != 1:
            first = names[0] if len(names) == count else "…-00001-of-…"
            raise UsageError(f"{path}: part {number} of a model in {count} files", f"name the first one, {first}: the others are found")
        if len(names) != count or names[0] != path:
            raise UsageError(
                f"{path}: the first of {count} files of a model, but its name does not end in -00001-of-{count:05d}.gguf", _ONE_FOLDER
            )
        for i, other in enumerate(names[1:], 2):
            try:
                fields, _, tensors, size = self._read(other)
            except UsageError as error:
                raise UsageError(f"{path}: part {i} of {count}: {error.message}", error.hint or _ONE_FOLDER) from error
            if int(fields.get("split.no", -1)) != i - 1:
                raise UsageError(f"{path}: {other} is not part {i} of {count}: split.no is {fields.get('split.no')}", _ONE_FOLDER)
            self.tensors += tensors
            self.size += size
        self.parts = tuple(names)
        announced = self.fields.get("split.tensors.count")
        if announced != len({tensor.name for tensor in self.tensors}) or announced != len(self.tensors):
            raise UsageError(
                f"{path}: {len(self.tensors)} tensors in {count} files, announced are {announced}: they are not of one model", self._hint
            )

    def _read(self, path: Path) -> tuple[Fields, Spans, list[Tensor], int]:
        """Read one file, and look whether it is whole."""
        name, size = f"{self._what} {path}".strip(), 0
        try:
            with self._opened(path) as data:
                size = len(data)
                header = _Header(data)
                fields, tensors = header.read(path)
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}", "" if path.exists() else _ONE_FOLDER if len(parts(path)) > 1 else "") from error
        except (_Damaged, UnicodeDecodeError) as error:
            raise UsageError(f"{name}: GGUF file damaged or truncated at {size} bytes ({error})", self._hint) from error
        needs = max((t.offset + (1 if t.n_bytes is None else t.n_bytes) for t in tensors), default=0)
        if needs > size:
            raise UsageError(f"{name}: GGUF file truncated: {size} bytes, its tensors need {needs}", self._hint)
        return fields, header.spans, tensors, size


def _type(number: int) -> tuple[str, int, int] | None:
    """Name, values and bytes of a block of a ggml type."""
    import gguf  # noqa: PLC0415 - takes a moment, and not every command needs it

    try:
        known = gguf.GGMLQuantizationType(number)
        return known.name, *gguf.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        return _NEWER.get(number)


class _Header:
    """Reads what stands before the data of the tensors. Anything that leads beyond the end is an error."""

    _NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u1", "", "", "<u8", "<i8", "<f8")
    """numpy's names of GGUF's value types; "" are strings and arrays."""
    _BOOL, _STRING, _ARRAY = 7, 8, 9

    def __init__(self, data: Data) -> None:
        self._data, self._at = data, 0
        self.spans: Spans = {}

    def read(self, path: Path) -> tuple[Fields, list[Tensor]]:
        """Read metadata and list of tensors."""
        if self._take(4) != b"GGUF":
            raise _Damaged("it does not start with GGUF")
        version = self._number("I")
        if version and not version & 0xFFFF:
            raise _Damaged("it has the byte order of another kind of machine")
        if version not in _VERSIONS:
            raise _Damaged(f"version {version}, known are {', '.join(map(str, _VERSIONS))}")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        fields: Fields = {}
        for _ in range(n_fields):
            key = self._text("strict")
            if key in fields:
                raise _Damaged(f"{key} is there twice")
            start = self._at
            fields[key] = self._value(self._number("I"))
            self.spans[key] = start, self._at
        found = [self._tensor() for _ in range(n_tensors)]
        align = fields.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise _Damaged(f"alignment {align}")
        start = (self._at + align - 1) // align * align
        return fields, list(self._placed(found, path, start))

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, n_dims = self._text("strict"), self._number("I")
        if n_dims > _MOST_DIMENSIONS:
            raise _Damaged(f"{name} has {n_dims} dimensions")
        ne = tuple(self._number("Q") for _ in range(n_dims))
        return name, self._number("I"), ne, self._number("Q")

    @staticmethod
    def _placed(found: list[tuple[str, int, tuple[int, ...], int]], path: Path, start: int) -> Iterator[Tensor]:
        names = set()
        for name, type_id, ne, offset in found:
            if name in names:
                raise _Damaged(f"tensor {name} is there twice")
            names.add(name)
            yield Tensor(name, type_id, ne, path, start + offset)

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise _Damaged("its header is cut off")
        self._at += size
        return self._data[self._at - size : self._at]

    def _number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0])

    def _text(self, errors: str) -> str:
        return self._take(self._number("Q")).decode("utf-8", errors)

    def _value(self, kind: int) -> Any:
        if kind == self._STRING:
            return self._text("replace")  # tokens need not be UTF-8
        if kind == self._ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in (self._STRING, self._ARRAY):
                return [self._value(inner) for _ in range(count)]
            return self._numbers(inner, count)
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if not (0 <= kind < len(self._NUMBERS) and self._NUMBERS[kind]):
            raise _Damaged(f"unknown type {kind} of metadata")
        form = np.dtype(self._NUMBERS[kind])
        values = np.frombuffer(self._take(count * form.itemsize), form)
        return list(map(bool, values)) if kind == self._BOOL else values.tolist()
