"""A calibration computed in numpy, from the weights of a tiny model and a text: what src/turbo/calibrate.h says, in another language.

It knows the models of ``tiny_models`` with plain attention: Llama, Deci, Qwen 2 and StableLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tiny_models import Shape

CHUNK = 384  # tokens that are read at once, behind BOS
FIRST = 4  # tokens of a chunk that are left out
LEAST = 64  # fewer at the end of the text are not read
BOS = 1
FEW = 256
POSITIONS = 32_768
LARGEST_SCALE = 64.0
LEAST_SQUARE = 1e-6
LEAST_SQUARE_OF_MAPS = 1e-4
DOUBT = 0.1  # part of the products that is not trusted, if there are ten times as many tokens as channels

Array = npt.NDArray[np.float64]


@dataclass
class Seen:
    """Q and K before RoPE, V ``[token, head, channel]``, and the weights ``[head, query, key]`` of one layer and chunk."""

    q: Array
    k: Array
    v: Array
    weights: Array


@dataclass
class Layer:
    """What a calibration has of a layer, ``[n_head_kv, channel]``; of its map A the product A^T A, which rotations do not change."""

    k_mean: Array
    k_metric: Array
    v_mean: Array
    v_scale: Array
    distances: Array  # of the first tokens


def calibrate(path: Path, shape: Shape, text: str, n_tokens: int) -> tuple[int, list[Layer]]:
    """Compute a calibration; returns the number of tokens that were read, too."""
    tokens = [byte + 3 for byte in ("\u2581" + text.replace(" ", "\u2581")).encode()][:n_tokens]  # as SentencePiece has spaces
    chunks = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
    chunks = [chunk for chunk in chunks if len(chunk) >= LEAST]
    model = Model(path, shape)
    seen = [model.read([BOS, *chunk]) for chunk in chunks]
    layers = [_layer(shape, [chunk[il] for chunk in seen], model.weights[f"blk.{il}.attn_output.weight"]) for il in range(shape.n_layer)]
    return sum(map(len, chunks)), layers


# --- the model ------------------------------------------------------------------------------------------------------------------


class Model:
    """A transformer in binary64."""

    def __init__(self, path: Path, shape: Shape) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
        self.shape = shape

    def read(self, tokens: list[int]) -> list[Seen]:
        """What each layer makes of a text."""
        x, found = self.weights["token_embd.weight"][tokens], []
        for il in range(self.shape.n_layer):
            seen = self._attend(il, self._norm(x, f"blk.{il}.attn_norm"))
            out = np.einsum("hqk,khd->qhd", seen.weights, self._per_query_head(il, seen.v)).reshape(len(tokens), -1)
            x = x + self._project(out, f"blk.{il}.attn_output")
            y = self._norm(x, f"blk.{il}.ffn_norm")
            gate = self._project(y, f"blk.{il}.ffn_gate")
            x = x + self._project(gate / (1 + np.exp(-gate)) * self._project(y, f"blk.{il}.ffn_up"), f"blk.{il}.ffn_down")
            found.append(seen)
        return found

    def _attend(self, il: int, x: Array) -> Seen:
        n_head, n_head_kv = self.shape.n_heads(il)
        q = self._project(x, f"blk.{il}.attn_q").reshape(len(x), n_head, -1)
        k = self._project(x, f"blk.{il}.attn_k").reshape(len(x), n_head_kv, -1)
        v = self._project(x, f"blk.{il}.attn_v").reshape(len(x), n_head_kv, -1)
        turns = turns_of(self.shape, np.arange(len(x)))[:, None]
        scores = np.einsum("qhd,khd->hqk", turn(self.shape, q, turns), self._per_query_head(il, turn(self.shape, k, turns))) / np.sqrt(
            self.shape.head_k
        )
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return Seen(q, k, v, weights / weights.sum(-1, keepdims=True))

    def _per_query_head(self, il: int, x: Array) -> Array:
        n_head, n_head_kv = self.shape.n_heads(il)
        return np.repeat(x, n_head // n_head_kv, axis=1)

    def _project(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, x: Array, name: str) -> Array:
        if self.shape.arch == "stablelm":
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * self.weights[f"{name}.weight"]


def pairs_of(shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and second channels of the pairs that RoPE turns."""
    pair = np.arange(shape.n_rot // 2)
    return (pair, pair + shape.n_rot // 2) if shape.neox else (2 * pair, 2 * pair + 1)


def turns_of(shape: Shape, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.complex128]:
    """By what each pair is multiplied, ``[position, pair]``."""
    return np.exp(1j * np.outer(positions, 10_000.0 ** (-2 * np.arange(shape.n_rot // 2) / shape.n_rot)))


def turn(shape: Shape, x: Array, turns: npt.NDArray[np.complex128]) -> Array:
    """Multiply pairs of channels, the last axis."""
    a, b = pairs_of(shape)
    turned = (x[..., a] + 1j * x[..., b]) * turns
    res = np.array(x)
    res[..., a], res[..., b] = turned.real, turned.imag
    return res


# --- moments --------------------------------------------------------------------------------------------------------------------


def _layer(shape: Shape, chunks: list[Seen], wo: Array) -> Layer:
    n_head_kv = chunks[0].k.shape[1]
    q = np.concatenate([chunk.q[FIRST:] for chunk in chunks])
    k = np.concatenate([chunk.k[FIRST:] for chunk in chunks])
    v = np.concatenate([chunk.v[FIRST:] for chunk in chunks])
    q = q.reshape(len(q), n_head_kv, -1, shape.head_k).swapaxes(1, 2).reshape(-1, n_head_kv, shape.head_k)

    # Q and K, wherever RoPE turns them to: positions as contexts of all lengths have them
    position = np.arange(POSITIONS)
    share = 1 / np.maximum(position, FEW) - 1 / POSITIONS
    share /= share.sum()
    mean = k.mean(0)
    k_mean = turn(shape, mean, share @ turns_of(shape, position))
    products = [turn_products(shape, np.einsum("thi,thj->hij", x, x) / len(x), share) for x in (q, k)]
    products[1] -= k_mean[:, :, None] * k_mean[:, None]
    k_metric = metric(*(trusted(shape, x, n) for x, n in zip(products, (len(q), len(k)), strict=True)))

    # V, by the squares of the weights that tokens get
    share_v = np.concatenate(
        [np.square(chunk.weights).sum(1).reshape(n_head_kv, -1, chunk.weights.shape[2]).sum(1).T[FIRST:] for chunk in chunks]
    )[..., None]
    v_mean = (share_v * v).sum(0) / share_v.sum(0)
    v_sq = (share_v * np.square(v)).sum(0) / share_v.sum(0) - np.square(v_mean)

    spread = np.square(k - mean).mean(0).sum()
    distances = np.sqrt(np.square(chunks[-1].k[:FIRST] - mean).sum((1, 2)) / spread)
    return Layer(k_mean, k_metric, v_mean, balance(columns_sq(wo, n_head_kv, shape.head_v), v_sq), distances)


def turn_products(shape: Shape, products: Array, share: Array) -> Array:
    """Mean products of channels ``[n_head_kv, channel, channel]``, once RoPE has turned them to positions with these shares."""
    a, b = pairs_of(shape)
    rest = np.arange(shape.n_rot, shape.head_k).reshape(-1, 2).T
    a, b = np.append(a, rest[0]), np.append(b, rest[1])
    turns = turns_of(shape, np.arange(len(share)))
    turns = np.hstack([turns, np.ones((len(share), len(rest[0])))])
    same, opposite = turns.T @ (share[:, None] * turns.conj()), turns.T @ (share[:, None] * turns)
    xx, xy = products[:, a][..., a], products[:, a][..., b]
    yx, yy = products[:, b][..., a], products[:, b][..., b]
    along = same * (xx + yy + 1j * (yx - xy))  # of z_i with the conjugate of z_j, z = x + iy
    across = opposite * (xx - yy + 1j * (yx + xy))  # of z_i with z_j
    res = np.empty_like(products)
    for rows, columns, block in (
        (a, a, (along + across).real),
        (b, b, (along - across).real),
        (a, b, (across - along).imag),
        (b, a, (across + along).imag),
    ):
        res[np.ix_(np.arange(len(res)), rows, columns)] = block / 2
    return res


def trusted(shape: Shape, products: Array, n_tokens: int) -> Array:
    """With a part of it made diagonal."""
    squares = np.array(np.diagonal(products, axis1=1, axis2=2))
    a, b = pairs_of(shape)
    for i, j in (*zip(a, b, strict=True), *((i, i + 1) for i in range(shape.n_rot, shape.head_k, 2))):
        squares[:, [i, j]] = squares[:, [i, j]].mean(1, keepdims=True)
    squares = np.maximum(squares, LEAST_SQUARE_OF_MAPS * squares.mean(1, keepdims=True))
    doubt = np.clip(shape.head_k / n_tokens, DOUBT, 1)
    return (1 - doubt) * products + doubt * squares[:, :, None] * np.eye(shape.head_k)


def metric(reader: Array, stored: Array) -> Array:
    """Geometric mean of one and the inverse of the other, with a determinant of 1."""
    root = power(stored, 0.5)
    back = np.linalg.inv(root)
    mean = back @ power(root @ reader @ root, 0.5) @ back
    return mean / np.exp(np.linalg.slogdet(mean)[1] / mean.shape[-1])[:, None, None]


def power(matrices: Array, exponent: float) -> Array:
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * values[:, None] ** exponent) @ vectors.swapaxes(1, 2)


def columns_sq(wo: Array, n_head_kv: int, head_v: int) -> Array:
    """Squares of the columns of the output projection, summed over the query heads of a KV head."""
    return np.square(wo).reshape(len(wo), n_head_kv, -1, head_v).sum((0, 2))


def balance(reader_sq: Array, stored_sq: Array) -> Array:
    """Fourth root of a ratio, with a geometric mean of 1."""

    def floored(squares: Array) -> Array:
        return np.maximum(squares, LEAST_SQUARE * squares.mean(1, keepdims=True))

    scale = (floored(reader_sq) / floored(stored_sq)) ** 0.25
    scale /= np.exp(np.log(scale).mean(1, keepdims=True))
    return np.clip(scale, 1 / LARGEST_SCALE, LARGEST_SCALE)
