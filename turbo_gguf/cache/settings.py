"""The settings of a KV cache beside its types: one row each, from which everything else about them derives.

The notation (``--types``), the options of llama.cpp's tools, the variables that would set them behind our back, the encoding of stored
results, the line that the log prints of a cache, and the table of the documentation all come from :data:`SETTINGS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.cache.layer_map import LayerMap
from turbo_gguf.cache.written import Written
from turbo_gguf.errors import UsageError


class CalibrationChoice(Written):
    """Which calibration: ``auto`` (llama.cpp makes or finds that of the model), ``none``, or a file.

    What is measured with a file depends on the digest of what is in it alone. A file that is called like one of the words is ``./auto``.
    """

    __slots__ = ("digest", "path")

    WORDS = ("auto", "none")

    def __init__(self, path: str, digest: str = "") -> None:
        self.path, self.digest = path, digest

    @classmethod
    def parse(cls, text: str) -> CalibrationChoice:
        """Read ``auto``, ``none``, ``FILE`` or ``FILE#DIGEST``; a path may have a # of its own.

        Raises:
            UsageError: one of the words with a digest.
        """
        match = re.fullmatch(r"(.*?)(?:#([0-9a-f]{8}))?", text, re.DOTALL)
        path, digest = (match[1], match[2] or "") if match else (text, "")
        if digest and path in cls.WORDS:
            raise UsageError(f"{path} has no digest", f"a file of this name is ./{path}")
        return cls(path, digest)

    @classmethod
    def parse_logged(cls, text: str) -> CalibrationChoice:
        """Read what a log says of the calibration in force: its digest.

        Raises:
            UsageError: it is none.
        """
        if not re.fullmatch("[0-9a-f]{8}", text):
            raise UsageError("no digest")
        return cls("", text)

    @property
    def is_file(self) -> bool:
        """Whether it is neither of the words."""
        return bool(self.digest) or self.path not in self.WORDS

    def __str__(self) -> str:
        """The word, or ``FILE#DIGEST``."""
        return f"{self.path}#{self.digest}" if self.digest else self.path


AUTO, NONE = map(CalibrationChoice, CalibrationChoice.WORDS)


class Setting(msgspec.Struct, frozen=True):
    """One setting."""

    word: str  # in the notation
    field: str  # of CacheSpec
    parse: Callable[[str], Any]
    option: str  # of llama.cpp's tools
    variables: tuple[str, ...]  # environment variables that set it, names of earlier releases too
    value: str  # what stands for a value in help texts
    about: str
    to_option: Callable[[Any], str] = str
    parse_logged: Callable[[str], Any] | None = None  # where a log writes it otherwise
    default: str = ""  # what a turbo type gets where it is not set; "": nothing
    off: str = ""  # the value for nothing, where there is a default


def number(text: str) -> int:
    """Read a number of tokens.

    Raises:
        UsageError: it is none.
    """
    if not (text.isascii() and text.isdecimal()):
        raise UsageError("no number")
    return int(text)


def mode(text: str) -> int | None:
    """Read the number of a mode; 0 is the same as not set.

    Raises:
        UsageError: it is none.
    """
    return number(text) or None


SETTINGS = (
    Setting("k", "layers_k", LayerMap.parse, "--cache-type-k-layers", ("TURBO_CACHE_TYPE_K_LAYERS",), "MAP", "types of K by layer"),
    Setting("v", "layers_v", LayerMap.parse, "--cache-type-v-layers", ("TURBO_CACHE_TYPE_V_LAYERS",), "MAP", "types of V by layer"),
    Setting(
        "adaptive",
        "adaptive",
        mode,
        "--cache-layer-adaptive",
        ("TURBO_CACHE_LAYER_ADAPTIVE", "TURBO_LAYER_ADAPTIVE"),
        "MODE",
        "a layer-adaptive mode, instead of maps",
    ),
    Setting(
        "decay",
        "decay",
        DecayShares.parse,
        "--cache-decay",
        ("TURBO_CACHE_DECAY", "TURBO_DECAY"),
        "SHARES",
        "temporal decay: a preset, or HOT,WARM,COLD in percent",
    ),
    Setting(
        "cal",
        "calibration",
        CalibrationChoice.parse,
        "--cache-calibration",
        ("TURBO_CACHE_CALIBRATION", "TURBO_CALIBRATION"),
        "auto|none|FILE",
        "a calibration of the model",
        to_option=lambda calibration: str(calibration.path),
        parse_logged=CalibrationChoice.parse_logged,
        default=str(AUTO),
        off=str(NONE),
    ),
    Setting(
        "sink",
        "sink",
        number,
        "--cache-sink",
        ("TURBO_CACHE_SINK",),
        "TOKENS",
        "first tokens of a sequence that are kept in f16",
        default="4",
        off="0",
    ),
    Setting(
        "tail",
        "tail",
        number,
        "--cache-tail",
        ("TURBO_CACHE_TAIL",),
        "TOKENS",
        "last tokens of a sequence that are kept in f16",
        default="64",
        off="0",
    ),
)
"""In the order of the notation."""

OFF = " ".join(f"{setting.word}={setting.off}" for setting in SETTINGS if setting.off)
"""What makes a turbo type the plain one, without what it gets by default."""

BY_WORD = {setting.word: setting for setting in SETTINGS}

HINT = (
    f"settings are {', '.join(f'{setting.word}={setting.value}' for setting in SETTINGS)}, each once, spaces between: turbo3 decay=balanced"
)


def table() -> list[tuple[str, ...]]:
    """Rows for the documentation: in the notation, option, variable, what it is."""
    return [(f"{s.word}={s.value}", s.option, s.variables[0], s.about) for s in SETTINGS]
