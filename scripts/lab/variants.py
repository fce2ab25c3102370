"""Variants for transform_search.py: names, and the maps that they stand for.

    plain                  rotated only
    post-2048x4            means, scales: moments after RoPE, from 4 chunks of 2,048 tokens
    pre-512x2-n8192        mean of K before RoPE, turned over positions 0 .. 8,191
    pre-512x2-log32768     ... over caches filled to 256 .. 32,768 tokens, each doubling alike
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from transform_search import Array, Maps, hadamard

if TYPE_CHECKING:
    from transform_search import Lab

LARGEST_SCALE, FLOOR = 64.0, 1e-6
SHORTEST_FILL = 256


def make(lab: Lab, name: str) -> Maps:
    base, *changes = name.split("_")
    model = lab.model
    zeros, rotation = np.zeros((model.layers, model.kv_heads, model.head)), hadamard(model.head)
    if base == "plain":
        maps = Maps(zeros, np.broadcast_to(rotation, (*zeros.shape, model.head)), zeros, np.broadcast_to(rotation, (*zeros.shape, model.head)))
    else:
        kind, size, *rest = base.split("-")
        tag, size = re.fullmatch(r"([a-z]*)(\d+x\d+)", size).groups()
        moments = lab.moments(tag or "wiki", *map(int, size.split("x")))
        k_mean = moments["k_mean"] if kind == "post" else turned(lab, moments["k_raw_mean"], rest[0])
        maps = calibrated(lab, moments, k_mean, "v")
    for change in changes:
        raise ValueError(change)
    return maps


def diagonal(matrices: Array) -> Array:
    return np.diagonal(matrices, axis1=-2, axis2=-1)


def positions(where: str) -> Array:
    """Weights of positions 0, 1, ...: n8192 (all alike) or log8192."""
    kind, n = re.fullmatch(r"([a-z]+)(\d+)", where).groups()
    weights = np.ones(int(n)) if kind == "n" else 1 / np.maximum(np.arange(int(n)), SHORTEST_FILL) - 1 / int(n)
    return weights / weights.sum()


def turned(lab: Lab, mean: Array, where: str) -> Array:
    """What is left of vectors when RoPE turns them."""
    weights = positions(where)
    average = (weights[:, None] * np.exp(1j * np.outer(np.arange(len(weights)), lab.model.speeds))).sum(0)
    first, second = lab.model.pairs()
    z = (mean[..., first] + 1j * mean[..., second]) * average
    res = np.empty_like(mean)
    res[..., first], res[..., second] = z.real, z.imag
    return res


def pair_means(lab: Lab, squares: Array) -> Array:
    first, second = lab.model.pairs()
    res = np.empty_like(squares)
    res[..., first] = res[..., second] = (squares[..., first] + squares[..., second]) / 2
    return res


def scale(reader: Array, stored: Array) -> Array:
    def floored(x: Array) -> Array:
        return np.maximum(x, x.mean(-1, keepdims=True) * FLOOR)

    s = (floored(reader) / floored(stored)) ** 0.25
    s /= np.exp(np.log(s).mean(-1, keepdims=True))
    return np.clip(s, 1 / LARGEST_SCALE, LARGEST_SCALE)


def output_squares(lab: Lab) -> Array:
    """Second moments of what reads V: W^T W of the output projection, summed over the query heads of a group."""
    model = lab.model
    res = np.zeros((model.layers, model.kv_heads, model.head, model.head))
    for i in range(model.layers):
        w = np.asarray(model.get(i, "attn_output.weight"), np.float64).reshape(-1, model.kv_heads, model.heads // model.kv_heads, model.head)
        res[i] = np.einsum("ohgi,ohgj->hij", w, w, optimize=True)
    return res


def calibrated(lab: Lab, moments: dict[str, Array], k_mean: Array, v: str) -> Maps:
    """As `turbo-gguf calibrate` does."""
    rotation = hadamard(lab.model.head)
    k_left = np.maximum(pair_means(lab, diagonal(moments["k"]) - np.square(k_mean)), 0)
    v_left = np.maximum(diagonal(moments[v]) - np.square(moments[f"{v}_mean"]), 0)
    k_scale = scale(pair_means(lab, diagonal(moments["q"])), k_left)
    v_scale = scale(diagonal(output_squares(lab)), v_left)
    return Maps(k_mean, rotation * k_scale[..., None, :], moments[f"{v}_mean"], rotation * v_scale[..., None, :])
