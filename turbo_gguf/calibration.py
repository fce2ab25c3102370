"""Calibration of a KV cache: from the moments of Q, K and V to a file that llama.cpp loads with ``--cache-calibration``.

The cache stores ``s_k * (K - m)`` and ``s_v * (V - n)`` instead of K and V; Q is divided by ``s_k``, the attention output by ``s_v``, and n
is added to it. That changes nothing that a model computes, and these choices make the error of quantization least, which after rotation
is noise of the same size in every channel:

- m and n are the means of K and V: what is constant costs bits and carries nothing.
- s_k is the square root of rms(Q) / rms(K - m) of a channel. The error of a score is then least (Cauchy-Schwarz).
- s_v is the square root of (norm of the column of the output projection) / rms(V - n) of a channel, likewise for the output.

Both channels of a RoPE pair share a scale: positions turn one into the other. See ``docs/design/0011-calibration.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turbo_gguf.errors import UsageError
from turbo_gguf.observation import Array, LayerShape, Moments, Observation

VERSION = 1
"""Version of the file. Raised when its meaning changes; llama.cpp refuses any other."""

TYPE = "turbo-calibration"
"""``general.type`` of the file."""

LARGEST_SCALE = 64.0
"""Scales are clamped to 1/64 .. 64: a channel that a text hardly uses must not be left without bits in another."""

_FLOOR = 1e-6
"""Least mean square of a channel, relative to that of its head: dead channels have scales, too."""

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


def compute(found: Observation, moments: Mapping[int, Moments], output_sq: Mapping[int, Array]) -> Calibration:
    """Choose means and scales.

    Args:
        found: what the layers are.
        moments: of each layer, from a text or from the weights.
        output_sq: sums of squares of the columns of the output projection, ``[n_head_kv, head_v]``, where known.
    """
    return Calibration(
        arch=found.arch,
        name=found.name,
        fingerprint=found.fingerprint,
        tokens=found.tokens,
        layers={shape.number: _layer(shape, found.rope, moments[shape.number], output_sq.get(shape.number)) for shape in found.layers},
    )


def _layer(shape: LayerShape, rope: str, moments: Moments, output_sq: Array | None) -> LayerCalibration:
    k_mean, k_sq = _centered(moments.k_mean, moments.k_sq, shape.center_k)
    v_mean, v_sq = _centered(moments.v_mean, moments.v_sq, shape.center_v)
    return LayerCalibration(
        k_mean=k_mean,
        k_scale=_scale(_pair_means(moments.q_sq, rope, shape.n_rot), _pair_means(k_sq, rope, shape.n_rot)),
        v_mean=v_mean,
        v_scale=_scale(output_sq, v_sq) if output_sq is not None else None,
    )


def _centered(mean: Array, squares: Array, center: bool) -> tuple[Floats | None, Array]:
    """What is taken away, and the mean squares of what is left. Where nothing may be taken, the constant part counts as well."""
    if not center or not mean.any():
        return None, squares
    return mean.astype(np.float32), squares - np.square(mean)


def _pair_means(squares: Array, rope: str, n_rot: int) -> Array:
    """Give both channels of each RoPE pair their mean; channels that RoPE does not rotate keep theirs."""
    heads = squares.shape[0]
    rotated = squares[:, :n_rot]
    if rope == "normal":
        paired = np.repeat(rotated.reshape(heads, -1, 2).mean(2), 2, axis=1)
    elif rope == "neox":
        paired = np.tile(rotated.reshape(heads, 2, -1).mean(1), 2)
    else:
        paired = rotated
    return np.concatenate([paired, squares[:, n_rot:]], axis=1)


def _scale(reader_sq: Array, stored_sq: Array) -> Floats:
    """Scale of each channel of each head: the fourth root of a ratio of mean squares, with a geometric mean of 1."""

    def floored(squares: Array) -> Array:
        level = squares.mean(1, keepdims=True)
        return np.maximum(squares, np.where(level > 0, level * _FLOOR, 1.0))

    scale = (floored(reader_sq) / floored(stored_sq)) ** 0.25
    scale /= np.exp(np.log(scale).mean(1, keepdims=True))
    return np.clip(scale, 1 / LARGEST_SCALE, LARGEST_SCALE).astype(np.float32)


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


# --- file -----------------------------------------------------------------------------------------------------------------


def write(calibration: Calibration, path: Path) -> Path:
    """Write a file; it is there whole or not at all.

    Raises:
        UsageError: its folder is missing or cannot be written to.
        OSError: the disk is full.
    """
    import gguf  # noqa: PLC0415

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(temporary, calibration.arch)
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
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        temporary.replace(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{path}: {error.strerror}", "name another file with --out") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def read(path: Path) -> Calibration:
    """Read a file.

    Raises:
        UsageError: it is missing, damaged, truncated, of another version, or something else.
    """
    import gguf  # noqa: PLC0415

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    except OSError as error:
        raise UsageError(f"calibration {path}: {error.strerror}") from error
    except Exception as error:  # a cut file raises ValueError, IndexError, ... from numpy
        raise UsageError(f"calibration {path}: damaged or truncated ({error})", "write it again: turbo-gguf calibrate") from error
    if fields.get("general.type") != TYPE:
        raise UsageError(f"calibration {path}: no calibration", "write one: turbo-gguf calibrate")
    if fields.get("turbo.calibration.version") != VERSION:
        found = fields.get("turbo.calibration.version")
        raise UsageError(f"calibration {path}: version {found}, known is {VERSION}", "write it again: turbo-gguf calibrate")
    numbers = sorted({int(name.split(".")[1]) for name in tensors})
    return Calibration(
        arch=fields["general.architecture"],
        name=fields.get("general.name", "").removesuffix(" calibration"),
        fingerprint=fields["turbo.calibration.model"],
        tokens=int(fields.get("turbo.calibration.tokens", 0)),
        layers={number: LayerCalibration(*(tensors.get(f"blk.{number}.{part}") for part in _PARTS)) for number in numbers},
    )
