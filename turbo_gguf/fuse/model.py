"""From a model and a calibration to a fused model and what is left of its calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbo_gguf.cache import calibration as calibrations
from turbo_gguf.cache.calibration import Calibration, LayerCalibration
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import UsageError
from turbo_gguf.fuse import file
from turbo_gguf.fuse.fold import LayerFold, Made, attending, changed, fold
from turbo_gguf.inputs.gguf_file import Fields, GgufFile, Tensor

VERSION = 1
"""Of the metadata ``turbo.fused.*``."""

FUSED = "turbo.fused.version"

SWITCH = ("LLAMA_ATTN_ROT_DISABLE", "1")
"""Variable and value with which llama.cpp rotates nothing: weights and maps do."""

_NOTHING = LayerCalibration(None, None, None, None, None, None)


@dataclass(frozen=True)
class Fused:
    """What was written."""

    path: Path
    calibration: Path
    folds: tuple[LayerFold, ...]
    is_rotated: bool  # V by weights and K by maps in all layers, so that the graph need not
    n_changed: int  # tensors
    converted: tuple[str, ...]  # tensors that have another type now

    @property
    def left(self) -> dict[str, list[str]]:
        """What is not folded, by reason: parts and layers, such as ``V of layer 3``."""
        found: dict[str, list[str]] = {}
        for one in self.folds:
            for part, reason in one.layer.why_not.items():
                found.setdefault(reason, []).append(f"{part} of layer {one.layer.number}")
        return found

    def count(self, part: str) -> int:
        """Layers into which ``"V"``, ``"means of V"`` or ``"K"`` is folded."""
        has = {
            "V": lambda one: one.value is not None,
            "means of V": lambda one: one.value is not None and one.value.mean is not None,
            "K": lambda one: one.keys is not None,
        }[part]
        return sum(map(has, self.folds))


def calibration_of(path: Path) -> Path:
    """Where the calibration of a fused model lies."""
    return path.with_name(f"{path.stem}.calibration.gguf")


def served_with(path: Path | None, fields: Fields, types: CacheSpec, options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What llama-server needs so that a fused model gets its own calibration, and its graph rotates nothing that is rotated already.

    Args:
        path: of the model, if it is here.
        fields: its metadata.
        types: the cache. Only turbo types are calibrated by themselves.
        options: of llama-server, which may name a calibration.

    Returns:
        Options, and variables.
    """
    is_turbo = all(cache_type(name).turbo for name in (types.k, types.v)) and not (types.layers_k or types.layers_v or types.adaptive)
    is_named = types.calibration is not None or any(option.split("=")[0] == "--cache-calibration" for option in options)
    if path is None or FUSED not in fields or not is_turbo or is_named or not calibration_of(path).is_file():
        return [], {}
    return ["--cache-calibration", str(calibration_of(path))], dict([SWITCH]) if fields.get("turbo.fused.is_rotated") == 1 else {}


def fuse(
    model_path: Path,
    calibration_path: Path | None,
    out: Path,
    *,
    fallback: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Fused:
    """Write a fused model, and its calibration beside it.

    Args:
        model_path: of the (first) file of the model.
        calibration_path: what is folded, besides the rotation of V.
        out: the fused model.
        fallback: type of the projections of V and of the output where their own can't be written.
        say: gets lines of progress.

    Raises:
        UsageError: an input is damaged or does not fit, the output is there, or nothing can be folded.
        EnvironmentMissing: the disk is full.
    """
    beside = calibration_of(out)
    for path in (out, beside):
        if path.exists():
            raise UsageError(f"{path} is there already", "remove it, or name another file with -o")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder", "make it, or name another file with -o")
    model = GgufFile(model_path)
    if FUSED in model.fields:
        raise UsageError(f"{model_path} is fused already", "begin with the model that it was made of")
    given = _given(calibration_path, model)
    folds = tuple(
        fold(layer, given.layers.get(layer.number, _NOTHING) if given else _NOTHING, model.fields) for layer in attending(model, fallback)
    )
    if not any(one.value is not None or one.keys is not None for one in folds):
        reasons = sorted({reason for one in folds for reason in one.layer.why_not.values()})
        raise UsageError(f"{model_path}: nothing can be folded: {'; '.join(reasons) or 'no layer has a KV cache'}")
    made = {tensor.name: tensor for one in folds for tensor in changed(one, fallback)}
    _mark(model.tensors, made)
    tensors = _all_of(model, made)
    is_rotated = all(one.value is not None and one.is_mapped for one in folds)
    file.write(out, _metadata(model, given, folds, is_rotated), tensors, int(model.fields.get("general.alignment", 32)), say)
    arch, name = str(model.fields["general.architecture"]), _name(model)
    left = Calibration(
        arch=arch,
        name=name,
        fingerprint=_fingerprint(model, made),
        tokens=given.tokens if given else 0,
        layers={one.layer.number: one.left() for one in folds},
        sink=given.sink if given else 0,
        sink_distance=given.sink_distance if given else 0.0,
    )
    calibrations.write(beside, left)
    types = {tensor.name: tensor.type_name for tensor in model.tensors}
    converted = tuple(name for name, tensor in made.items() if name in types and types[name] != tensor.type_name)
    return Fused(out, beside, folds, is_rotated, len(made), converted)


def _given(path: Path | None, model: GgufFile) -> Calibration | None:
    """The calibration, if it is the model's.

    Raises:
        UsageError: it is of another one.
    """
    if path is None:
        return None
    given, arch, found = calibrations.read(path), model.fields.get("general.architecture"), _fingerprint(model, {})
    if (given.arch, given.fingerprint) != (arch, found):
        raise UsageError(
            f"calibration {path}: it was made for another model: {given.arch} {given.fingerprint}, this one is {arch} {found}",
            "write one: turbo-gguf calibrate",
        )
    return given


def _metadata(model: GgufFile, given: Calibration | None, folds: Sequence[LayerFold], is_rotated: bool) -> dict[str, bytes]:
    res = file.metadata_of(model)
    res["general.name"] = file.text(_name(model))
    res[FUSED] = file.number(VERSION)
    res["turbo.fused.model"] = file.text(_fingerprint(model, {}))
    res["turbo.fused.calibration"] = file.text(calibrations.digest(given) if given else "none")
    res["turbo.fused.is_rotated"] = file.number(int(is_rotated))
    for key, layers in {
        "v": [one for one in folds if one.value is not None],
        "v_mean": [one for one in folds if one.value is not None and one.value.mean is not None],
        "k": [one for one in folds if one.keys is not None],
    }.items():
        res[f"turbo.fused.{key}"] = file.number(int(len(layers) == len(folds)))
        if layers:
            res[f"turbo.fused.{key}_layers"] = file.numbers([one.layer.number for one in layers])
    return res


def _name(model: GgufFile) -> str:
    """Another one than the model's, so that an automatic calibration of that one is not taken for this one."""
    return f"{model.fields.get('general.name', 'model')} fused"


def _all_of(model: GgufFile, made: dict[str, Made]) -> list[Tensor | Made]:
    """All tensors, in the order of the model; new ones behind them.

    Raises:
        UsageError: a type has no known size.
    """
    for tensor in model.tensors:
        if tensor.n_bytes is None:
            why = f"tensor {tensor.name} is of {tensor.type_name}, which the Python package gguf does not know"
            raise UsageError(f"{tensor.path}: {why}", "pip install --upgrade gguf")
    names = {tensor.name for tensor in model.tensors}
    return [made.get(tensor.name, tensor) for tensor in model.tensors] + [tensor for name, tensor in made.items() if name not in names]


# --- the fingerprint --------------------------------------------------------------------------------------------------------


def _norms(model: GgufFile) -> list[Tensor]:
    """Norms of the layers that llama.cpp loads into an ordinary context."""
    arch = model.fields.get("general.architecture")
    last = int(model.fields.get(f"{arch}.block_count", 0) or 0) - int(model.fields.get(f"{arch}.nextn_predict_layers", 0) or 0)
    return [tensor for tensor in model.tensors if _is_norm(tensor) and not (_block(tensor.name) >= last > 0)]


def _is_norm(tensor: Tensor) -> bool:
    return tensor.name.endswith("norm.weight") and tensor.type_name == "F32"


def _block(name: str) -> int:
    number = name.removeprefix("blk.").partition(".")[0]
    return int(number) if name.startswith("blk.") and number.isdecimal() else -1


def _fingerprint(model: GgufFile, made: dict[str, Made]) -> str:
    return calibrations.fingerprint((norm.name, made[norm.name].data() if norm.name in made else _bytes(norm)) for norm in _norms(model))


def _bytes(tensor: Tensor) -> bytes:
    assert tensor.n_bytes is not None
    return np.fromfile(tensor.path, np.uint8, tensor.n_bytes, offset=tensor.offset).tobytes()


def _mark(tensors: Sequence[Tensor], made: dict[str, Made]) -> None:
    """Turn the last bit of one weight of a norm over: less than rounding does, and another fingerprint.

    So llama.cpp refuses a calibration of the model that was fused, whose scales would be applied a second time.
    """
    norms = sorted(tensor.name for tensor in tensors if _is_norm(tensor) and tensor.name not in made)
    name = "output_norm.weight" if "output_norm.weight" in norms else next(iter(norms), None)
    if name is None:
        return  # its name alone tells
    norm = next(tensor for tensor in tensors if tensor.name == name)
    bits = np.frombuffer(_bytes(norm), "<u4").copy()
    bits[0] ^= 1
    made[name] = Made(name, "F32", norm.ne, bits.tobytes)
