"""Variants for transform_search.py: names, and the maps that they stand for.

`plain` is rotated only. Others start with the moments: `post-2048x4` are those after RoPE of 4 chunks of 2,048 tokens, `post-code512x2`
those of another text, `pre-512x2-n8192` those before RoPE, turned over positions 0 .. 8,191, and `pre-512x2-log32768` the same over caches
filled to 256 .. 32,768 tokens, where each doubling counts alike. What follows behind underscores is in `Choice.of`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from kv_maps import Codec, Maps
from numpy_llama import Array, Layer, attend

from turbo_gguf.codec import rotation

if TYPE_CHECKING:
    from transform_search import Lab

LARGEST_SCALE, FLOOR = 64.0, 1e-6
SHORTEST_FILL = 256


@dataclass
class Choice:
    """What stands behind the underscores of a name."""

    k_moments: str = "k"
    q_moments: str = "q"
    v_moments: str = "v"
    k_full: float | None = None  # matrices instead of scales, with this part of each covariance made diagonal
    v_full: float | None = None
    k_split: str = ""
    v_split: str = ""
    k_mix: float = 1.0  # part of weighted moments, the rest is of equal weights
    q_mix: float = 1.0
    k_part: float = 1.0  # of the mean of K is taken away
    k_gain: float = 1.0
    v_gain: float = 1.0
    gains: bool = False  # chosen for each head
    random: bool = False
    means_only: bool = False

    @classmethod
    def of(cls, names: list[str]) -> Choice:  # noqa: PLR0912
        res = cls()
        for name in names:
            what, number = re.fullmatch(r"([a-z]+)(\d*)", name).groups()
            part = int(number) / 100 if number else 0.0
            match what:
                case "kfull" | "vfull" | "full":
                    res.k_full, res.v_full = (res.k_full if what == "vfull" else part), (res.v_full if what == "kfull" else part)
                case "ksplit" | "vsplit" | "split" | "ksplitbest" | "vsplitbest" | "splitbest":
                    how = "best" if what.endswith("best") else "all"
                    res.k_split, res.v_split = (res.k_split if what[0] == "v" else how), (res.v_split if what[0] == "k" else how)
                case "kpart":
                    res.k_part = part
                case "kgain":
                    res.k_gain = part
                case "vgain":
                    res.v_gain = part
                case "vfar":
                    res.v_moments = "v_far"
                case "kout" | "katt":
                    res.k_moments, res.k_mix = f"k_{what[1:]}", part or 1.0
                case "qout" | "qatt":
                    res.q_moments, res.q_mix = f"q_{what[1:]}", part or 1.0
                case "gains":
                    res.gains = True
                case "random":
                    res.random = True
                case "means":
                    res.means_only = True
                case _:
                    raise ValueError(name)
        return res


def make(lab: Lab, name: str) -> Maps:
    base, *names = name.split("_")
    model, choice = lab.model, Choice.of(names)
    shape = (model.layers, model.kv_heads, model.head)
    k_mean = v_mean = np.zeros(shape)
    k_matrix = v_matrix = np.broadcast_to(np.eye(model.head), (*shape, model.head))
    k_energy = v_energy = np.ones(shape)
    if base != "plain":
        kind, size, *where = base.split("-")
        tag, size = re.fullmatch(r"([a-z]*)(\d+x\d+)", size).groups()
        moments = lab.moments(tag or "wiki", *map(int, size.split("x")))
        if kind == "pre":
            for x in {choice.q_moments, choice.k_moments, "q", "k"}:
                raw = x.replace("q", "q_raw").replace("k", "k_raw")
                moments[f"{x}_mean"] = turned(lab, moments[f"{raw}_mean"], where[0])
                moments[x] = turned_squares(lab, moments[raw], where[0])
        for x, weighted, part in (("k", choice.k_moments, choice.k_mix), ("q", choice.q_moments, choice.q_mix)):
            for end in ("", "_mean"):
                moments[f"{weighted}{end}"] = part * moments[f"{weighted}{end}"] + (1 - part) * moments[f"{x}{end}"]
        k_mean, v_mean = moments[f"{choice.k_moments}_mean"], moments[f"{choice.v_moments}_mean"]
        if not choice.means_only:
            k = centered(moments[choice.k_moments], k_mean, choice.k_part)
            v = centered(moments[choice.v_moments], v_mean)
            k_matrix, k_energy = joint(lab, moments[choice.q_moments], k, choice.k_full, paired=True)
            v_matrix, v_energy = joint(lab, output_squares(lab), v, choice.v_full, paired=False)
    k_rotation, k_types = rotations(k_energy, choice.k_split, lab.args.type, choice.random)
    v_rotation, v_types = rotations(v_energy, choice.v_split, lab.args.type, choice.random)
    gains = [np.full(shape[:2], gain) for gain in (choice.k_gain, choice.v_gain)]
    k_mean = choice.k_part * k_mean
    maps = Maps(k_mean, k_rotation @ k_matrix, gains[0], v_mean, v_rotation @ v_matrix, gains[1], k_types, v_types)
    return best_gains(lab, maps) if choice.gains else maps


def diagonal(matrices: Array) -> Array:
    return np.diagonal(matrices, axis1=-2, axis2=-1)


def positions(where: str) -> Array:
    """Weights of positions 0, 1, ...: n8192 (all alike), log8192 (fills from 256 on) or log8192from16."""
    kind, n, shortest = re.fullmatch(r"(n|log)(\d+)(?:from(\d+))?", where).groups()
    weights = np.ones(int(n)) if kind == "n" else 1 / np.maximum(np.arange(int(n)), int(shortest or SHORTEST_FILL)) - 1 / int(n)
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
        w = np.asarray(model.get(i, "attn_output.weight"), np.float64)
        w = w.reshape(-1, model.kv_heads, model.heads // model.kv_heads, model.head)
        res[i] = np.einsum("ohgi,ohgj->hij", w, w, optimize=True)
    return res


def centered(squares: Array, mean: Array, part: float = 1.0) -> Array:
    """Second moments of rows of which a part of their mean is taken away."""
    return squares - (1 - (1 - part) ** 2) * mean[..., :, None] * mean[..., None, :]


def turned_squares(lab: Lab, squares: Array, where: str) -> Array:
    """Second moments, averaged over positions at which RoPE turns the rows."""
    weights, speeds = positions(where), lab.model.speeds
    at = np.arange(len(weights))
    first, second = lab.model.pairs()
    xx, yy = squares[..., first, :][..., first], squares[..., second, :][..., second]
    xy, yx = squares[..., first, :][..., second], squares[..., second, :][..., first]

    def average(speed: Array) -> Array:
        distinct, where_of = np.unique(np.round(speed, 12), return_inverse=True)
        return np.array([(weights * np.exp(1j * at * s)).sum() for s in distinct])[where_of].reshape(speed.shape)

    p = (xx + yy + 1j * (yx - xy)) * average(speeds[:, None] - speeds)
    q = (xx - yy + 1j * (xy + yx)) * average(speeds[:, None] + speeds)
    res = np.empty_like(squares)
    for rows, columns, block in (
        (first, first, (p + q).real),
        (second, second, (p - q).real),
        (first, second, (q - p).imag),
        (second, first, (p + q).imag),
    ):
        part = res[..., rows, :]
        part[..., columns] = block / 2
    return res


def joint(lab: Lab, reader: Array, stored: Array, full: float | None, *, paired: bool) -> tuple[Array, Array]:
    """Matrix that makes noise of equal size in all channels of what is stored cost least, and the energy of each of its channels.

    With scales, what `turbo-gguf calibrate` does. With a matrix A: A^T A is the geometric mean of reader and inverse of stored, so that
    what is stored and what reads it have the same covariance, and A is chosen so that it is diagonal, largest first.
    """
    if full is None:
        read, kept = diagonal(reader), np.maximum(diagonal(stored), 0)
        if paired:
            read, kept = pair_means(lab, read), pair_means(lab, kept)
        s = scale(read, kept)
        energy = np.sqrt(read * kept)
        order = np.argsort(-energy, axis=-1, kind="stable")
        identity = np.broadcast_to(np.eye(s.shape[-1]), reader.shape)
        return np.take_along_axis(identity * s[..., None, :], order[..., None], axis=-2), np.take_along_axis(energy, order, axis=-1)
    read, kept = shrunk(lab, reader, full, paired), shrunk(lab, stored, full, paired)
    root = power(kept, 0.5)
    energy, vectors = np.linalg.eigh(root @ read @ root)  # squares of the common diagonal
    energy, vectors = np.sqrt(energy[..., ::-1]), vectors[..., ::-1]
    return np.sqrt(energy)[..., None] * (vectors.swapaxes(-1, -2) @ np.linalg.inv(root)), energy


def shrunk(lab: Lab, matrices: Array, part: float, paired: bool) -> Array:
    """Positive, and with this part of it made diagonal."""
    squares = np.maximum(diagonal(matrices), 0)
    squares = pair_means(lab, squares) if paired else squares
    squares = np.maximum(squares, squares.mean(-1, keepdims=True) * 1e-4)
    identity = np.eye(matrices.shape[-1])
    values, vectors = np.linalg.eigh((1 - part) * matrices + part * squares[..., None] * identity)
    values = np.maximum(values, values[..., -1:] * 1e-6)
    return (vectors * values[..., None, :]) @ vectors.swapaxes(-1, -2)


def power(matrices: Array, exponent: float) -> Array:
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * values[..., None, :] ** exponent) @ vectors.swapaxes(-1, -2)


NOISE = {"turbo2t": 0.0647, "turbo3t": 0.0162, "turbo4t": 0.0041}
SPLIT = {"turbo3t": "turbo4t+turbo2t"}


def rotations(energy: Array, split: str, name: str, random: bool) -> tuple[Array, Array | tuple[str, ...]]:
    """Rotation of each head, and the types of its halves."""
    n = energy.shape[-1]
    whole, halves = rotation.matrix(n), np.kron(np.eye(2), rotation.matrix(n // 2))
    if random:
        whole = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
    if not split:
        return whole, ()
    high, low = (NOISE[half] for half in SPLIT[name].split("+"))
    sums = energy.reshape(*energy.shape[:-1], 2, n // 2).sum(-1)
    gain = 2 * (high * sums[..., 0] ** 2 + low * sums[..., 1] ** 2) / (NOISE[name] * sums.sum(-1) ** 2)
    chosen = (gain < 1) | (split == "all")
    print(f"split: {chosen.mean():.2f} of the heads, predicted error {np.where(chosen, gain, 1).mean():.2f}")
    return np.where(chosen[..., None, None], halves, whole), np.where(chosen, SPLIT[name], name)


GAINS = (-1.5, -1.0, -0.5, 0.0, 0.5)  # in parts of the relative error of the codes: least squares is -1, matched norm -.5
GAIN_TOKENS = 1024


def best_gains(lab: Lab, maps: Maps) -> Maps:
    """For each KV head, the gains of K and of V with the least error of what attention adds to the stream, on the text to fit."""
    model, args = lab.model, lab.args
    codec, exact = Codec(Path(args.bin)), (args.sink, args.tail)
    cache, grid = maps.cache(codec, args.type), 1 + np.array(GAINS) * NOISE[args.type]
    chosen = np.ones((2, model.layers, model.kv_heads))

    def added(i: int, out: Array) -> Array:
        """[KV heads, tokens, width]"""
        w = model.get(i, "attn_output.weight")
        return np.stack([a @ b.T for a, b in zip(np.split(out, model.kv_heads, 1), np.split(w, model.kv_heads, 1), strict=True)])

    def watch(layer: Layer) -> None:
        i, k, v = layer.number, layer.k, layer.v
        right = added(i, attend(layer.q, k, v, (k, v)))
        k_read, v_read = cache(i, k, v)
        k_mean, v_mean = (mean[i][:, None].astype(np.float32) for mean in (maps.k_mean, maps.v_mean))
        errors = np.empty((2, len(grid), model.kv_heads))
        for j, gain in enumerate(grid.astype(np.float32)):
            for side, pair in enumerate(((gain * (k_read - k_mean) + k_mean, v), (k, gain * (v_read - v_mean) + v_mean))):
                errors[side, j] = np.square(added(i, attend(layer.q, k, v, pair, exact=exact)) - right).sum((1, 2))
        chosen[:, i] = grid[errors.argmin(1)]

    model.hidden(lab.tokens("fit", GAIN_TOKENS), watch=watch)
    for side in range(2):
        print("gains", "kv"[side], dict(zip(*np.unique(np.round(chosen[side], 4), return_counts=True), strict=True)), flush=True)
    return replace(maps, k_gain=chosen[0], v_gain=chosen[1])
