"""The text of a search, in three parts that never mix: to measure prices on, to calibrate from, and for the end result."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from turbo_gguf import assets, files
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import TextFile

_PRICES_END, _CALIBRATION_END = 0.3, 0.6
"""Where parts end, as a share of the text."""


class Texts(NamedTuple):
    """Three parts of a text."""

    prices: TextFile
    calibration: TextFile
    unseen: TextFile


def split(text: TextFile) -> Texts:
    """Cut a text at ends of lines, and write its parts below ``home()``.

    Raises:
        UsageError: a part is empty.
    """
    data = text.path.read_bytes().decode("utf-8")
    first, second = (_line_end(data, int(len(data) * share)) for share in (_PRICES_END, _CALIBRATION_END))
    parts = {"prices": data[:first], "calibration": data[first:second], "unseen": data[second:]}
    return Texts(*(_written(text, name, part) for name, part in parts.items()))


def _line_end(data: str, near: int) -> int:
    """Behind the last line that ends before ``near``; ``near`` itself in a text without lines."""
    return data.rfind("\n", 0, near) + 1 or near


def _written(text: TextFile, name: str, part: str) -> TextFile:
    path: Path = assets.home() / "text" / f"{text.path.stem}-{text.sha256[:12]}-{name}.txt"
    files.write_text(path, part)
    return models.text_file(path)
