"""The file of a calibration, which llama.cpp writes, and loads with ``--cache-calibration``: ``overlay/src/turbo/calibration.h``."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turbo_gguf.errors import UsageError
from turbo_gguf.files import whole
from turbo_gguf.inputs.gguf_file import GgufFile, Tensor

VERSION = 2
"""Version of the file. Raised when its meaning changes; llama.cpp refuses any other."""


TYPE = "turbo-calibration"
"""``general.type`` of the file."""


Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerCalibration:
    """One layer, vectors ``[n_head_kv, channel]`` and matrices ``[n_head_kv, to, from]``; ``None``: nothing to do."""

    k_mean: Floats | None
    k_scale: Floats | None
    k_map: Floats | None
    q_map: Floats | None
    v_mean: Floats | None
    v_scale: Floats | None


_PARTS = tuple(field.name for field in dataclasses.fields(LayerCalibration))


@dataclass(frozen=True)
class Calibration:
    """What a file holds."""

    arch: str
    name: str  # of the model
    fingerprint: str
    tokens: int  # of the text that it comes from; 0: not known
    layers: Mapping[int, LayerCalibration]
    sink: int = 0  # the one of the first tokens whose K lies farthest from the mean
    sink_distance: float = 0.0  # how far, over how far other tokens lie from it; 0: not known


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


def fingerprint(norms: Iterable[tuple[str, bytes]]) -> str:
    """CRC-32 of the names and bytes of all weights of norms in f32, as llama.cpp computes it: ``overlay/src/turbo/model.h``."""
    crc = 0
    for name, data in sorted(norms, key=lambda norm: norm[0].encode()):
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def write(path: Path, made: Calibration) -> Path:
    """Write a file, whole or not at all."""
    import gguf  # noqa: PLC0415 - takes a moment, and reading does not need it

    with whole(path) as temporary:
        writer = gguf.GGUFWriter(temporary, made.arch)
        writer.add_type(TYPE)
        writer.add_name(f"{made.name} calibration")
        writer.add_uint32("turbo.calibration.version", VERSION)
        writer.add_string("turbo.calibration.model", made.fingerprint)
        writer.add_uint32("turbo.calibration.tokens", made.tokens)
        writer.add_uint32("turbo.calibration.sink", made.sink)
        writer.add_float32("turbo.calibration.sink_distance", made.sink_distance)
        for number, layer in sorted(made.layers.items()):
            for part in _PARTS:
                values = getattr(layer, part)
                if values is not None:
                    flat = np.ascontiguousarray(values, np.float32)
                    writer.add_tensor(f"blk.{number}.{part}", flat[0] if len(flat) == 1 else flat)  # ggml writes no dimension of 1, either
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return path


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
        tensors = {tensor.name: tensor for tensor in found.tensors}
        numbers = sorted({int(name.split(".")[1]) for name in tensors})
        return Calibration(
            arch=fields["general.architecture"],
            name=str(fields.get("general.name", "")).removesuffix(" calibration"),
            fingerprint=fields["turbo.calibration.model"],
            tokens=int(fields.get("turbo.calibration.tokens", 0)),
            layers={number: _layer(tensors, number) for number in numbers},
            sink=int(fields.get("turbo.calibration.sink", 0)),
            sink_distance=float(fields.get("turbo.calibration.sink_distance", 0.0)),
        )
    except KeyError as error:
        raise UsageError(f"calibration {path}: damaged: no {error.args[0]}", "write it again: turbo-gguf calibrate") from error
    except (IndexError, ValueError) as error:
        raise UsageError(f"calibration {path}: damaged: {error}", "write it again: turbo-gguf calibrate") from error


def _layer(tensors: Mapping[str, Tensor], number: int) -> LayerCalibration:
    return LayerCalibration(*(_values(tensors.get(f"blk.{number}.{part}")) for part in _PARTS))


def _values(tensor: Tensor | None) -> Floats | None:
    """For one KV head, too: ggml writes no trailing dimension of 1."""
    if tensor is None:
        return None
    is_map = tensor.name.endswith("_map")
    if tensor.type_name != "F32" or len(tensor.ne) > (3 if is_map else 2) or (is_map and tensor.ne[0] != tensor.ne[1]):
        raise ValueError(f"{tensor.name} is {tensor.type_name} {list(tensor.ne)}")
    return tensor.rows().reshape(-1, tensor.ne[1], tensor.ne[0]) if is_map else tensor.rows()
