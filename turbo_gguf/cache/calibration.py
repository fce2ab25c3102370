"""The file of a calibration, which llama.cpp loads with ``--cache-calibration``."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from turbo_gguf import files
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.gguf_file import GgufFile, Tensor

VERSION = 1
"""Version of the file. Raised when its meaning changes; llama.cpp refuses any other."""


TYPE = "turbo-calibration"
"""``general.type`` of the file."""


Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerCalibration:
    """One layer, ``[n_head_kv, channel]``; ``None``: nothing to do."""

    k_mean: Floats | None
    k_scale: Floats | None
    v_mean: Floats | None
    v_scale: Floats | None


_PARTS = tuple(field.name for field in dataclasses.fields(LayerCalibration))


@dataclass(frozen=True)
class Calibration:
    """What a file holds."""

    arch: str
    name: str  # of the model
    fingerprint: str
    tokens: int  # of the text that it comes from; 0: from the weights
    layers: Mapping[int, LayerCalibration]


def digest(calibration: Calibration) -> str:
    """CRC-32 of all values, as llama.cpp computes and logs it: 8 hexadecimal digits."""
    crc = 0
    for number, layer in sorted(calibration.layers.items()):
        crc = zlib.crc32(struct.pack("<I", number), crc)
        for part in _PARTS:
            values = getattr(layer, part)
            flat = np.zeros(0, "<f4") if values is None else np.ascontiguousarray(values, "<f4")
            crc = zlib.crc32(struct.pack("<Q", flat.size) + flat.tobytes(), crc)
    return f"{crc:08x}"


def write(calibration: Calibration, path: Path) -> Path:
    """Write a file; it is there whole or not at all.

    Raises:
        UsageError: its folder is missing or cannot be written to.
        OSError: the disk is full.
    """

    try:
        with files.whole(path) as temporary:
            writer = gguf.GGUFWriter(temporary, calibration.arch)
            try:
                _fill(writer, calibration)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{path}: {error.strerror}", "name another file with --out") from error
    return path


def _fill(writer: Any, calibration: Calibration) -> None:
    """Put metadata and tensors into a file that is to be written."""
    writer.add_type(TYPE)
    writer.add_name(f"{calibration.name} calibration".strip())
    writer.add_uint32("turbo.calibration.version", VERSION)
    writer.add_string("turbo.calibration.model", calibration.fingerprint)
    writer.add_uint32("turbo.calibration.tokens", calibration.tokens)
    for number, layer in sorted(calibration.layers.items()):
        for name in _PARTS:
            values = getattr(layer, name)
            if values is not None:
                writer.add_tensor(f"blk.{number}.{name}", np.ascontiguousarray(values, np.float32))


def read(path: Path) -> Calibration:
    """Read a file.

    Raises:
        UsageError: it is missing, damaged, truncated, of another version, or something else.
    """

    found = GgufFile(path, what="calibration", hint="write it again: turbo-gguf calibrate")
    fields = found.fields
    if fields.get("general.type") != TYPE:
        raise UsageError(f"calibration {path}: no calibration", "write one: turbo-gguf calibrate")
    if fields.get("turbo.calibration.version") != VERSION:
        version = fields.get("turbo.calibration.version")
        raise UsageError(f"calibration {path}: version {version}, known is {VERSION}", "write it again: turbo-gguf calibrate")
    try:
        tensors = {tensor.name: _rows(tensor) for tensor in found.tensors}
        numbers = sorted({int(name.split(".")[1]) for name in tensors})
        return Calibration(
            arch=fields["general.architecture"],
            name=str(fields.get("general.name", "")).removesuffix(" calibration"),
            fingerprint=fields["turbo.calibration.model"],
            tokens=int(fields.get("turbo.calibration.tokens", 0)),
            layers={number: LayerCalibration(*(tensors.get(f"blk.{number}.{part}") for part in _PARTS)) for number in numbers},
        )
    except KeyError as error:
        raise UsageError(f"calibration {path}: damaged: no {error.args[0]}", "write it again: turbo-gguf calibrate") from error
    except (IndexError, ValueError) as error:
        raise UsageError(f"calibration {path}: damaged: {error}", "write it again: turbo-gguf calibrate") from error


def _rows(tensor: Tensor) -> Floats:
    """``[n_head_kv, channel]``, for one KV head, too: ggml writes no trailing dimension of 1."""
    if tensor.type_name != "F32" or len(tensor.ne) > 2:
        raise ValueError(f"{tensor.name} is {tensor.type_name} {list(tensor.ne)}")
    return tensor.rows()
