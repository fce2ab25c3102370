"""Writes a GGUF file: metadata as bytes, whatever they mean, and tensors one after the other."""

from __future__ import annotations

import errno
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.files import is_full, whole
from turbo_gguf.fuse.fold import Made
from turbo_gguf.inputs.gguf_file import GgufFile, Tensor

_UINT32, _STRING, _ARRAY = 4, 8, 9
_ONE_FILE = ("split.no", "split.count", "split.tensors.count")
_PIECE = 1 << 24


def number(value: int) -> bytes:
    """Metadata: a u32."""
    return struct.pack("<II", _UINT32, value)


def text(value: str) -> bytes:
    """Metadata: a string."""
    return struct.pack("<I", _STRING) + _text(value)


def numbers(values: Sequence[int]) -> bytes:
    """Metadata: an array of u32."""
    return struct.pack("<IIQ", _ARRAY, _UINT32, len(values)) + struct.pack(f"<{len(values)}I", *values)


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def metadata_of(model: GgufFile) -> dict[str, bytes]:
    """Metadata of a model as it stands in its file, without what says that it lies in several."""
    with model.parts[0].open("rb") as file:
        found = {}
        for key, (start, end) in model.spans.items():
            file.seek(start)
            found[key] = file.read(end - start)
    return {key: value for key, value in found.items() if key not in _ONE_FILE}


def write(path: Path, metadata: Mapping[str, bytes], tensors: Sequence[Tensor | Made], align: int, say: Callable[[str], None]) -> Path:
    """Write a file, whole or not at all.

    Args:
        path: of the file.
        metadata: type and value by key.
        tensors: those that stay, and those that are computed.
        align: of the tensors, in bytes.
        say: gets a line for each gigabyte.

    Raises:
        EnvironmentMissing: the disk is full.
    """
    header, offsets = _header(metadata, tensors, align)
    size = len(header) + (offsets[-1] + _padded(_size(tensors[-1]), align) if tensors else 0)
    try:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, "no space left")
        with whole(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for tensor, offset in zip(tensors, offsets, strict=True):
                file.write(b"\0" * (len(header) + offset - file.tell()))
                before = file.tell() >> 30
                _copy(tensor, file.write)
                if file.tell() >> 30 > before:
                    say(f"{file.tell() / (1 << 30):.0f} of {size / (1 << 30):.0f} GiB")
            file.write(b"\0" * (size - file.tell()))
    except OSError as error:
        if not is_full(error):
            raise
        raise EnvironmentMissing(
            f"{path}: no space left on its disk (needs {size / 1e6:,.0f} MB)", "free space, or name a file on another disk with -o"
        ) from error
    return path


def _header(metadata: Mapping[str, bytes], tensors: Sequence[Tensor | Made], align: int) -> tuple[bytes, list[int]]:
    """All before the data of the tensors, and their offsets behind it."""
    import gguf  # noqa: PLC0415 - takes a moment

    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_text(key) + value for key, value in metadata.items()]
    offsets, at = [], 0
    for tensor in tensors:
        kind = tensor.type_id if isinstance(tensor, Tensor) else int(gguf.GGMLQuantizationType[tensor.type_name])
        parts.append(_text(tensor.name) + struct.pack(f"<I{len(tensor.ne)}QIQ", len(tensor.ne), *tensor.ne, kind, at))
        offsets.append(at)
        at += _padded(_size(tensor), align)
    header = b"".join(parts)
    return header + b"\0" * (_padded(len(header), align) - len(header)), offsets


def _size(tensor: Tensor | Made) -> int:
    assert tensor.n_bytes is not None
    return tensor.n_bytes


def _padded(size: int, align: int) -> int:
    return (size + align - 1) // align * align


def _copy(tensor: Tensor | Made, write: Callable[[bytes], object]) -> None:
    if isinstance(tensor, Made):
        data = tensor.data()
        assert len(data) == tensor.n_bytes, tensor.name
        write(data)
        return
    rest = _size(tensor)
    with tensor.path.open("rb") as source:
        source.seek(tensor.offset)
        while rest > 0:
            piece = source.read(min(rest, _PIECE))
            if not piece:
                raise OSError(errno.EIO, "it became shorter while it was read", str(tensor.path))
            write(piece)
            rest -= len(piece)
