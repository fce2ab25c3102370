"""Moments of Q, K and V over chunks of a text."""

from __future__ import annotations

import numpy as np
from numpy_llama import Array, Layer, Model

SKIP = 4  # first tokens of a chunk, which moments leave out
SINK, TAIL = 4, 64  # what is not read from the cache
NAMES = ("q", "k", "q_raw", "k_raw", "v", "v_far", "q_out", "k_out")


class Moments:
    """Sums over chunks of a text. Second moments are whole matrices, [layers, KV heads, head, head]; K and Q before and after RoPE.

    V is weighted by the squares of the attention weights: of all queries (v), and of those that read the key from the cache (v_far).
    Q and K are also weighted by what an error of a score does to the output, p^2 |v - o|^2, where the key is read from the cache
    (q_out, k_out).
    """

    def __init__(self, model: Model) -> None:
        self.model, shape = model, (model.layers, model.kv_heads)
        self.sums: dict[str, Array] = {}
        for name in NAMES:
            self.sums[name] = np.zeros((*shape, model.head, model.head))
            self.sums[f"{name}_mean"] = np.zeros((*shape, model.head))
            self.sums[f"{name}_n"] = np.zeros(shape)
        self.squares: dict[str, Array] = {}

    def read(self, tokens: Array) -> None:
        n = len(tokens)
        at = np.arange(n)

        def watch(layer: Layer) -> None:
            self._flush()
            self.layer = layer
            self.squares = {name: np.zeros((self.model.kv_heads, n)) for name in ("v", "v_far", "k_out")}
            self.squares["q_out"] = np.zeros((self.model.kv_heads, self.model.heads // self.model.kv_heads, n))

        def weights(_layer: int, first: int, head: int, p: Array) -> None:
            rows, end = p.shape[1], p.shape[2]
            squares = p * p
            self.squares["v"][head, :end] += squares.sum((0, 1))
            squares *= (at[:end] <= np.arange(first, first + rows)[:, None] - TAIL) & (at[:end] >= SINK)
            self.squares["v_far"][head, :end] += squares.sum((0, 1))
            v = self.layer.v[head, :end]
            o = p @ v
            squares *= np.maximum(np.square(v).sum(1) + np.square(o).sum(2)[..., None] - 2 * (o @ v.T), 0)
            self.squares["k_out"][head, :end] += squares.sum((0, 1))
            self.squares["q_out"][head, :, first : first + rows] += squares.sum(2)

        self.model.hidden(tokens, watch=watch, weights=weights)
        self._flush()

    def _flush(self) -> None:
        if not self.squares:
            return
        layer = self.layer
        for name in ("q", "k", "q_raw", "k_raw"):
            rows = getattr(layer, name)
            self._add(name, self._grouped(rows), None)
            weight = self.squares.get(f"{name}_out")
            if weight is not None:
                shape = (*rows.shape[:-1], 1)
                self._add(f"{name}_out", self._grouped(rows), self._grouped(weight.reshape(shape))[..., 0])
        for name in ("v", "v_far"):
            self._add(name, layer.v[:, None, SKIP:], self.squares[name][:, None, SKIP:])
        self.squares = {}

    def _grouped(self, rows: Array) -> Array:
        return rows.reshape(self.model.kv_heads, -1, *rows.shape[1:])[:, :, SKIP:]

    def _add(self, name: str, rows: Array, weight: Array | None) -> None:
        """Rows [KV heads, query heads of a group, tokens, head]."""
        i, heads = self.layer.number, rows.shape[0]
        flat = rows.reshape(heads, -1, rows.shape[-1])
        w = np.ones(flat.shape[:2], np.float32) if weight is None else weight.reshape(heads, -1).astype(np.float32)
        self.sums[name][i] += (flat * w[..., None]).transpose(0, 2, 1) @ flat
        self.sums[f"{name}_mean"][i] += (flat * w[..., None]).sum(1)
        self.sums[f"{name}_n"][i] += w.sum(1)

    def result(self) -> dict[str, Array]:
        """Means instead of sums."""
        res = {}
        for name in NAMES:
            n = self.sums[f"{name}_n"]
            res[name] = self.sums[name] / n[..., None, None]
            res[f"{name}_mean"] = self.sums[f"{name}_mean"] / n[..., None]
        return res
