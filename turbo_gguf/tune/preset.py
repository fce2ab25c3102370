"""``MODEL.cache.toml``: a KV cache that was searched for one model, and what it rests on.

Its table ``[cache]`` has llama.cpp's options by their names, and ``[model]`` what they are for. ``--cache-preset FILE`` of llama.cpp's
tools reads both (``overlay/common/turbo-preset.h``). So one file says the same to all programs. Everything else is evidence, for people.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf import files
from turbo_gguf.cache.settings import SETTINGS, CalibrationChoice
from turbo_gguf.cache.spec import CacheSpec, checked
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.gguf_file import Fields

FORMAT = 1
"""Raised when the meaning of the file changes; readers refuse any other."""

TYPES = {"k": "cache-type-k", "v": "cache-type-v"}

_HEAD = "# A KV cache for one model, by turbo-gguf tune. llama.cpp's tools and turbo-gguf take it with --cache-preset."
_HINT = "write it again: turbo-gguf tune"


class Made(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model that a preset is for. Any quantization of it will do."""

    name: str
    sha256: str  # of the file that it was searched on
    architecture: str
    layers: int
    embedding: int

    @classmethod
    def of(cls, name: str, fields: Fields, sha256: str = "") -> Made:
        """From the header of a model."""
        arch = str(fields.get("general.architecture", ""))

        def number(key: str) -> int:
            found = fields.get(f"{arch}.{key}", 0)
            return int(max(found, default=0) if isinstance(found, list) else found)

        return cls(name, sha256, arch, number("block_count"), number("embedding_length"))

    def __str__(self) -> str:
        """What decides whether two models take the same presets."""
        return f"{self.architecture} with {self.layers} layers of width {self.embedding}"


class Preset(msgspec.Struct, frozen=True):
    """A file."""

    types: CacheSpec
    model: Made
    evidence: dict[str, Any] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    model: Made
    cache: dict[str, str]
    evidence: dict[str, Any]  # the last table: a file without it was cut
    calibration: dict[str, str] = {}


def write(path: Path, preset: Preset) -> Path:
    """Write a file, whole or not at all. A calibration that lies beside it is named without its folder, so that both can be moved."""
    cache = {TYPES["k"]: preset.types.k, TYPES["v"]: preset.types.v}
    digest = ""
    for row in SETTINGS:
        value = getattr(preset.types, row.field)
        if value is None:
            continue
        text = row.to_option(value)
        if isinstance(value, CalibrationChoice) and value.is_file:
            digest = value.digest
            beside = Path(text).absolute().parent == path.absolute().parent
            text = Path(text).name if beside else str(Path(text).absolute())
        cache[row.option.removeprefix("--")] = text
    tables: dict[str, Mapping[str, Any]] = {"model": msgspec.to_builtins(preset.model), "cache": cache}
    if digest:
        tables["calibration"] = {"digest": digest}
    tables["evidence"] = preset.evidence
    lines = [_HEAD, f"format = {FORMAT}"]
    for name, table in tables.items():
        lines += _table(name, table)
    return files.write_text(path, "\n".join(lines) + "\n")


def _table(name: str, table: Mapping[str, Any]) -> list[str]:
    """A table of strings, numbers, and arrays of tables."""
    lines = ["", f"[{name}]"]
    nested = []
    for key, value in table.items():
        if isinstance(value, list):
            nested += [("\n".join(["", f"[[{name}.{key}]]", *(f"{k} = {_value(v)}" for k, v in row.items())])) for row in value]
        else:
            lines.append(f"{key} = {_value(value)}")
    return [*lines, *nested]


def _value(value: object) -> str:
    """A string, as JSON writes it, or a number."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def read(path: Path) -> Preset:
    """Read a file.

    Raises:
        UsageError: it is missing, damaged or of another format; a type or a setting is wrong; its calibration is missing or another one.
    """
    try:
        found = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File)
    except OSError as error:
        raise UsageError(f"cache preset {path}: {error.strerror}", "turbo-gguf tune MODEL --bits 3.5 writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"cache preset {path}: {error}", _HINT) from error
    if found.format != FORMAT:
        raise UsageError(f"cache preset {path}: format {found.format}, known is {FORMAT}", _HINT)
    try:
        types = checked(_types(found, path))
    except UsageError as error:
        raise UsageError(f"cache preset {path}: {error.message}", error.hint or _HINT) from error
    return Preset(types, found.model, found.evidence)


def _types(found: _File, path: Path) -> CacheSpec:
    cache = dict(found.cache)
    names = {side: cache.pop(key, "") for side, key in TYPES.items()}
    if missing := [TYPES[side] for side, name in names.items() if not name]:
        raise UsageError(f"no {' and no '.join(missing)}")
    settings: dict[str, Any] = {}
    for row in SETTINGS:
        if (text := cache.pop(row.option.removeprefix("--"), None)) is not None:
            settings[row.field] = row.parse(text)
    if cache:
        raise UsageError(f"unknown setting {next(iter(cache))!r}")
    chosen = settings.get("calibration")
    if chosen is not None and chosen.is_file:
        settings["calibration"] = CalibrationChoice(str(path.absolute().parent / chosen.path), found.calibration.get("digest", ""))
    return CacheSpec(k=names["k"], v=names["v"], **settings)


def for_model(path: Path, model: Made) -> Preset:
    """Read a file, and make sure that it is for a model.

    Raises:
        UsageError: as :func:`read`, or it is for another one.
    """
    preset = read(path)
    if str(preset.model) != str(model):
        raise UsageError(
            f"cache preset {path}: it is for {preset.model.name} ({preset.model}), and {model.name} is {model}",
            "search one for this model: turbo-gguf tune MODEL --bits 3.5",
        )
    return preset
