"""What Q, K and V of a model look like: seen in a text by ``llama-turbo-observe``, from which a calibration is computed.

The tool is part of the patch set (``overlay/tools/turbo-observe``); its head comment is the contract of the file that is read here.
Without a text it only says what the layers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turbo_gguf import assets, tools
from turbo_gguf.errors import LogNotUnderstood, UsageError
from turbo_gguf.inputs.gguf_file import GgufFile
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import gpu_layers, of_preset

TARGET = "llama-turbo-observe"
"""CMake target and name of the program."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerShape:
    """A layer that has a KV cache."""

    number: int  # in the model
    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    n_rot: int  # channels of K that RoPE rotates, the first ones
    center_k: bool  # whether a vector may be taken from all keys
    center_v: bool  # and from all values


@dataclass(frozen=True)
class Moments:
    """Means over the tokens of a text, ``[n_head_kv, channel]``; those of Q over all query heads of a KV head, too.

    Those of V are weighted by the squares of the weights that attention gives a token: as the noise of its V adds up.
    """

    q_sq: Array
    k_sq: Array
    k_mean: Array
    v_sq: Array
    v_mean: Array


@dataclass(frozen=True)
class Observation:
    """What the tool found out about a model."""

    arch: str
    name: str
    fingerprint: str  # of the weights of its norms, see overlay/src/turbo/calibration.h
    rope: str  # "none", "normal" (pairs 2i, 2i + 1) or "neox" (pairs i, i + n_rot/2)
    tokens: int  # 0: without a text
    layers: tuple[LayerShape, ...]
    moments: Mapping[int, Moments]  # by number of the layer; empty without a text


def observe(
    build: Build,
    model: ModelFile,
    texts: Sequence[TextFile] = (),
    *,
    ctx: int = 512,
    chunks: int = -1,
    threads: int = 1,
) -> Observation:
    """Run a model over texts, in chunks of ``ctx`` tokens, or only look at it when there is no text.

    Args:
        build: has the tool, and decides the device.
        model: its file.
        texts: observed one after the other.
        ctx: tokens of a chunk.
        chunks: at most so many, -1 for all.
        threads: of llama.cpp.

    Raises:
        UsageError: the model cannot be calibrated.
        EnvironmentMissing: the disk is full.
        ToolFailed: the tool crashed or wrote no complete file.
    """
    log = assets.home() / "logs" / "calibrate" / f"observe-{model.sha256[:12]}.log"
    out = log.with_suffix(".gguf")
    out.unlink(missing_ok=True)
    argv: list[str | Path] = [build.tool(TARGET), "-m", model.path, "-o", out, "-c", str(ctx), "--chunks", str(chunks)]
    argv += ["-t", str(threads), *gpu_layers(of_preset(build.preset).backend)]
    for text in texts:
        argv += ["-f", text.path]
    done = tools.run(argv, log=log, check=False, fail_hint="the log says more")
    if done.rc == 2:
        raise UsageError(f"{model.path}: {_complaint(done.stderr)}", "docs/design/0011-calibration.md says what can be calibrated")
    if done.rc != 0:
        raise tools.failure(done, "the log says more")
    try:
        return read(out)
    except UsageError as error:
        raise LogNotUnderstood(f"{TARGET} wrote no complete file: {error.message}; log: {done.stderr}") from error
    finally:
        out.unlink(missing_ok=True)


def _complaint(stderr: Path) -> str:
    lines = [line for line in tools.tail(stderr).splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else f"see {stderr}"


def read(path: Path) -> Observation:
    """Read the file of the tool.

    Raises:
        UsageError: it is missing, truncated or something else.
    """
    found = GgufFile(path, what="observation", hint="")
    fields, tensors = found.fields, {tensor.name: tensor.rows().astype(np.float64) for tensor in found.tensors}
    if fields.get("general.type") != "turbo-observation":
        raise UsageError(f"{path}: not an observation")
    return _observation(fields, tensors)


def _observation(fields: Mapping[str, Any], tensors: Mapping[str, Array]) -> Observation:
    def column(name: str) -> list[int]:
        return [int(value) for value in fields[f"turbo.observation.{name}"]]

    names = ("layers", "n_head", "n_head_kv", "head_k", "head_v", "n_rot", "center_k", "center_v")
    shapes = tuple(
        LayerShape(number, n_head, n_head_kv, head_k, head_v, n_rot, center_k=bool(center_k), center_v=bool(center_v))
        for number, n_head, n_head_kv, head_k, head_v, n_rot, center_k, center_v in zip(*map(column, names), strict=True)
    )
    tokens = int(fields["turbo.observation.tokens"])
    return Observation(
        arch=fields["general.architecture"],
        name=fields.get("general.name", ""),
        fingerprint=fields["turbo.calibration.model"],
        rope=fields["turbo.observation.rope"],
        tokens=tokens,
        layers=shapes,
        moments={
            shape.number: Moments(*(tensors[f"blk.{shape.number}.{name}"] for name in ("q_sq", "k_sq", "k_mean", "v_sq", "v_mean")))
            for shape in shapes
            if tokens
        },
    )
