"""Moments of Q, K and V estimated from the weights of a model alone, for a calibration without a text.

What enters a layer's projections is taken as white noise times the weights of the norm before them. So the mean square of a channel is that
of its row of the projection; biases add what is constant, and norms of Q and K set the level. What a text would show beyond that
(directions that real text prefers) is missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from turbo_gguf.calibrate.observation import Array, LayerShape, Moments, Observation
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.gguf_file import GgufFile

POSITIONS = 2048
"""Tokens over which RoPE turns the bias of K: what is left of it on average is its mean."""

_DEFAULT_BASE = 10_000.0


class Weights:
    """Tensors of a GGUF model by name, dequantized when they are asked for.

    Raises:
        UsageError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = GgufFile(path)
        self._tensors, self._fields = {tensor.name: tensor for tensor in found.tensors}, found.fields

    def get(self, name: str) -> Array | None:
        """A tensor, rows first, or ``None``."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.values().astype(np.float64)

    def need(self, name: str) -> Array:
        """A tensor that must be there.

        Raises:
            UsageError: it is not.
        """
        found = self.get(name)
        if found is None:
            raise UsageError(f"{self.path}: no tensor {name}: this model cannot be calibrated from its weights", "give a text")
        return found

    def rope_speeds(self, arch: str, n_rot: int) -> Array:
        """By how many radians RoPE turns each pair per token."""
        base = float(self._fields.get(f"{arch}.rope.freq_base", _DEFAULT_BASE))
        factors = self.get("rope_freqs.weight")
        return base ** (-np.arange(n_rot // 2) * 2.0 / n_rot) / (1.0 if factors is None else factors[: n_rot // 2])


def estimate(found: Observation, weights: Weights) -> dict[int, Moments]:
    """Estimate the moments of each layer.

    Raises:
        UsageError: the model has other tensors than those of plain attention.
    """
    return {shape.number: _layer(shape, found, weights) for shape in found.layers}


def output_sq(found: Observation, weights: Weights) -> dict[int, Array]:
    """Sums of squares of the columns of the output projections, over the query heads of a KV head: ``[n_head_kv, head_v]``.

    Layers whose output projection has another form are left out.
    """
    sums: dict[int, Array] = {}
    for shape in found.layers:
        matrix = weights.get(f"blk.{shape.number}.attn_output.weight")
        if matrix is not None and matrix.ndim == 2 and matrix.shape[1] == shape.n_head * shape.head_v:
            sums[shape.number] = np.square(matrix).sum(0).reshape(shape.n_head_kv, -1, shape.head_v).sum(1)
    return sums


def _layer(shape: LayerShape, found: Observation, weights: Weights) -> Moments:
    block = f"blk.{shape.number}"
    gain = weights.get(f"{block}.attn_norm.weight")
    shift = weights.get(f"{block}.attn_norm.bias")

    def project(matrix: Array, bias: Array | None, heads: int, head: int) -> tuple[Array, Array]:
        """Variance and mean of each channel, ``[heads, head]``, before RoPE."""
        variance = np.square(matrix if gain is None else matrix * gain).sum(1)
        mean = (0.0 if bias is None else bias) + (0.0 if shift is None else matrix @ shift)
        return variance.reshape(heads, head), np.broadcast_to(mean, matrix.shape[0]).reshape(heads, head)

    q, k, v = _projections(shape, weights)
    q_var, q_mean = _normed(*project(*q, shape.n_head, shape.head_k), weights.get(f"{block}.attn_q_norm.weight"))
    k_var, k_mean = _normed(*project(*k, shape.n_head_kv, shape.head_k), weights.get(f"{block}.attn_k_norm.weight"))
    v_var, v_mean = project(*v, shape.n_head_kv, shape.head_v)
    return Moments(
        q_sq=(q_var + np.square(q_mean)).reshape(shape.n_head_kv, -1, shape.head_k).mean(1),
        k_sq=k_var + np.square(k_mean),
        k_mean=_turned(k_mean, found.rope, shape.n_rot, weights.rope_speeds(found.arch, shape.n_rot)),
        v_sq=v_var + np.square(v_mean),
        v_mean=v_mean,
    )


Projection = tuple[Array, Array | None]
"""Matrix, rows first, and bias."""


def _projections(shape: LayerShape, weights: Weights) -> tuple[Projection, Projection, Projection]:
    """Those of Q, K and V, which some models keep in one tensor."""
    block = f"blk.{shape.number}"
    matrix, bias = weights.get(f"{block}.attn_qkv.weight"), weights.get(f"{block}.attn_qkv.bias")
    rows = (shape.n_head * shape.head_k, shape.n_head_kv * shape.head_k, shape.n_head_kv * shape.head_v)
    if matrix is not None and matrix.shape[0] == sum(rows):
        ends = np.cumsum(rows)[:-1]
        matrices = np.split(matrix, ends)
        biases: list[Array] | list[None] = [None] * 3 if bias is None else np.split(bias, ends)
        found = tuple(zip(matrices, biases, strict=True))
    else:
        found = tuple((weights.need(f"{block}.attn_{x}.weight"), weights.get(f"{block}.attn_{x}.bias")) for x in "qkv")
    if tuple(len(matrix) for matrix, _ in found) != rows:
        raise UsageError(f"{weights.path}: layer {shape.number} cannot be calibrated from its weights", "give a text")
    return found[0], found[1], found[2]


def _normed(variance: Array, mean: Array, weight: Array | None) -> tuple[Array, Array]:
    """Behind a norm of Q or K: over each head when its weights are those of one head, else over all heads."""
    if weight is None:
        return variance, mean
    squares = variance + np.square(mean)
    level = squares.mean(1, keepdims=True) if weight.size == variance.shape[1] else squares.mean()
    gain = np.broadcast_to(weight.reshape(-1, variance.shape[1]), variance.shape)
    return variance / level * np.square(gain), mean / np.sqrt(level) * gain


def _turned(mean: Array, rope: str, n_rot: int, speeds: Array) -> Array:
    """What is left of a constant vector, on average over :data:`POSITIONS`, when RoPE turns its pairs."""
    if rope == "none" or n_rot == 0:
        return mean
    average = np.exp(1j * np.outer(np.arange(POSITIONS), speeds)).mean(0)
    first, second = (slice(0, n_rot, 2), slice(1, n_rot, 2)) if rope == "normal" else (slice(0, n_rot // 2), slice(n_rot // 2, n_rot))
    turned = (mean[:, first] + 1j * mean[:, second]) * average
    res = np.array(mean)
    res[:, first], res[:, second] = turned.real, turned.imag
    return res
