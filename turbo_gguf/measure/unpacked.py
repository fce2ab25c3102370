"""A model with its weights unpacked to f16: the same function without the rounding of packed weights.

llama.cpp rounds what is multiplied with packed weights to 8 bits, which turns the slightest change of a cache into noise. On SmolLM2 in
Q4_1 that is .0033 nats, and one layer in a type of 2 bits costs less than that. With unpacked weights the same f16 cache shows .000003
(``docs/design/0015-base-line.md``). So prices are measured there, and only the end result on the file itself.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from turbo_gguf import assets, files, tools
from turbo_gguf.inputs import models
from turbo_gguf.inputs.gguf_file import GgufFile
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.build import Build

TARGET = "llama-quantize"
"""CMake target and name of the program."""

MOST_BYTES = 20_000_000_000
"""Of an unpacked model. Larger ones are measured as they are: they would not be read in the time that a search takes."""

_WIDE = ("F32", "F16", "BF16")


def is_unpacked(model: ModelFile) -> bool:
    """Whether no weight is packed."""
    return all(line.split()[0] in _WIDE for line in model.weights)


def size_of(model: ModelFile) -> int:
    """Bytes of its weights in f16."""
    return sum(2 * math.prod(tensor.ne) for tensor in GgufFile(model.path).tensors)


def why_not(model: ModelFile) -> str:
    """Why a model is not unpacked; "": it can be, or is there already."""
    if _file(model).is_file():
        return ""
    size = size_of(model)
    if size > MOST_BYTES:
        return f"unpacked it has {size / 1e9:.0f} GB"
    folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder()).free
    return f"unpacked it has {size / 1e9:.1f} GB, the disk {free / 1e9:.1f} GB free" if free < 1.1 * size + 1e9 else ""


def folder() -> Path:
    """Where unpacked models are kept."""
    return assets.home() / "models" / "unpacked"


def _file(model: ModelFile) -> Path:
    """The unpacked model, whether it is there or not."""
    return folder() / f"{model.path.stem}-{model.sha256[:12]}.gguf"


def unpack(build: Build, model: ModelFile, threads: int) -> ModelFile:
    """Make it, or find it.

    Raises:
        ToolFailed: the tool crashed.
        EnvironmentMissing: the disk is full.
    """
    path = _file(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(f"unpack-{model.sha256[:12]}"):
        if not path.is_file():
            with files.whole(path) as temporary:
                argv: list[str | Path] = [build.tool(TARGET), "--allow-requantize", model.path, temporary, "F16", str(threads)]
                tools.run(argv, log=assets.home() / "logs" / "tune" / f"unpack-{model.sha256[:12]}.log")
    return models.read(path)
