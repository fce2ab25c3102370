"""Linear maps around a quantized cache, and the codes of a built ggml."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy_llama import Array


class Codec:
    """Rows through the encoder of a built ggml and back."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self.cpu.ggml_cpu_init()

    def __call__(self, name: str, rows: Array) -> Array:
        """Rows of blocks of 64."""
        if name == "exact":
            return rows
        c_name = re.sub(r"^(turbo\d)t$", r"\1_t", name)
        c_name = re.sub(r"^(turbo\d)$", r"\1_0", c_name)
        rows = np.ascontiguousarray(rows, np.float32)
        packed, out = np.empty(rows.size * 2, np.uint8), np.empty_like(rows)
        n = ctypes.c_int64(rows.size)
        self.cpu[f"quantize_row_{c_name}"](rows.ctypes.data_as(ctypes.c_void_p), packed.ctypes.data_as(ctypes.c_void_p), n)
        self.base[f"dequantize_row_{c_name}"](packed.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), n)
        return out


def coded(codec: Codec, name: str, rows: Array) -> Array:
    """Rows in one type, or their halves in two. Blocks of halves take them from neighbouring tokens."""
    halves = np.split(rows, name.count("+") + 1, axis=-1)
    return np.concatenate([codec(part, half).reshape(half.shape) for part, half in zip(name.split("+"), halves, strict=True)], axis=-1)


@dataclass
class Maps:
    """What is stored: matrix @ (row - mean), of [layers, KV heads, ...]; what is read is multiplied by gain, [layers, KV heads]."""

    k_mean: Array
    k: Array
    k_gain: Array
    v_mean: Array
    v: Array
    v_gain: Array
    k_types: Array | tuple[str, ...] = ()  # of each head, if not the type that is measured; "a+b": half of the channels each
    v_types: Array | tuple[str, ...] = ()

    def cache(self, codec: Codec, default: str) -> Callable[[int, Array, Array], tuple[Array, Array]]:
        back_k, back_v = np.linalg.inv(self.k), np.linalg.inv(self.v)

        def through(x: Array, mean: Array, matrices: tuple[Array, Array], gain: Array, types: Array | list[str]) -> Array:
            there, back = (m.transpose(0, 2, 1).astype(np.float32) for m in matrices)
            mean, gain = mean[:, None].astype(np.float32), gain[:, None, None].astype(np.float32)
            read = np.stack([coded(codec, *pair) for pair in zip(types, (x - mean) @ there, strict=True)])
            return gain * read @ back + mean

        def cache(i: int, k: Array, v: Array) -> tuple[Array, Array]:
            k_types, v_types = (t[i] if len(t) else [default] * len(k) for t in (self.k_types, self.v_types))
            return (
                through(k, self.k_mean[i], (self.k[i], back_k[i]), self.k_gain[i], k_types),
                through(v, self.v_mean[i], (self.v[i], back_v[i]), self.v_gain[i], v_types),
            )

        return cache
