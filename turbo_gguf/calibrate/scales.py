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

from collections.abc import Mapping

import numpy as np

from turbo_gguf.cache.calibration import Calibration, Floats, LayerCalibration
from turbo_gguf.calibrate.observation import Array, LayerShape, Moments, Observation

LARGEST_SCALE = 64.0
"""Scales are clamped to 1/64 .. 64: a channel that a text hardly uses must not be left without bits in another."""

_FLOOR = 1e-6
"""Least mean square of a channel, relative to that of its head: dead channels have scales, too."""


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


# --- file -----------------------------------------------------------------------------------------------------------------
