"""Moments of Q, K and V over chunks of a text."""

from __future__ import annotations

import numpy as np
from numpy_llama import Array, Layer, Model

SKIP = 4  # first tokens of a chunk, which moments leave out
SINK, TAIL = 4, 64  # what is not read from the cache
ROWS = ("q", "k", "q_raw", "k_raw")
WEIGHTS = ("att", "out")
NAMES = (*ROWS, *(f"{rows}_{weight}" for rows in ROWS for weight in WEIGHTS), "v", "v_far")


class Moments:
    """Sums over chunks of a text. Second moments are whole matrices, [layers, KV heads, head, head]; K and Q after and before RoPE.

    V is weighted by the squares p^2 of the attention weights: of all queries (v), and of those that read the key from the cache (v_far).
    Q and K are weighted equally, and where the key is read from the cache by p^2 (att), and by what an error of a score does to the
    output, p^2 |v - o|^2 (out).
    """

    def __init__(self, model: Model) -> None:
        self.model, shape = model, (model.layers, model.kv_heads)
        self.sums: dict[str, Array] = {}
        for name in NAMES:
            self.sums[name] = np.zeros((*shape, model.head, model.head))
            self.sums[f"{name}_mean"] = np.zeros((*shape, model.head))
            self.sums[f"{name}_n"] = np.zeros(shape)
        self.weights: dict[str, Array] = {}  # of keys, [KV heads, 1, tokens], and of queries, [KV heads, group, tokens]

    def read(self, tokens: Array) -> None:
        """Add one chunk."""
        n, heads, group = len(tokens), self.model.kv_heads, self.model.heads // self.model.kv_heads
        at = np.arange(n)

        def watch(layer: Layer) -> None:
            self._flush()
            self.layer = layer
            self.weights = {name: np.zeros((heads, 1, n)) for name in ("v", "k_att", "k_out")}
            self.weights |= {name: np.zeros((heads, group, n)) for name in ("q_att", "q_out")}

        def weights(_layer: int, first: int, head: int, p: Array) -> None:
            end, queries = p.shape[2], slice(first, first + p.shape[1])
            squares = p * p
            self.weights["v"][head, 0, :end] += squares.sum((0, 1))
            squares *= (at[:end] <= at[queries, None] - TAIL) & (at[:end] >= SINK)
            v = self.layer.v[head, :end]
            o = p @ v
            distance = np.maximum(np.square(v).sum(1) + np.square(o).sum(2)[..., None] - 2 * (o @ v.T), 0)
            for name, weight in (("att", squares), ("out", squares * distance)):
                self.weights[f"k_{name}"][head, 0, :end] += weight.sum((0, 1))
                self.weights[f"q_{name}"][head, :, queries] += weight.sum(2)

        self.model.hidden(tokens, watch=watch, weights=weights)
        self._flush()

    def _flush(self) -> None:
        if not self.weights:
            return
        for name in ROWS:
            rows = getattr(self.layer, name)
            self._add(name, rows, np.ones((self.model.kv_heads, len(rows) // self.model.kv_heads, rows.shape[1])))
            for weight in WEIGHTS:
                self._add(f"{name}_{weight}", rows, self.weights[f"{name[0]}_{weight}"])
        self._add("v", self.layer.v, self.weights["v"])
        self._add("v_far", self.layer.v, self.weights["k_att"])
        self.weights = {}

    def _add(self, name: str, rows: Array, weight: Array) -> None:
        """Rows [heads, tokens, head size], weights [KV heads, heads of a group, tokens]."""
        i, heads = self.layer.number, self.model.kv_heads
        rows = rows.reshape(heads, -1, *rows.shape[1:])[:, :, SKIP:].reshape(heads, -1, rows.shape[-1])
        weight = weight[:, :, SKIP:].reshape(heads, -1).astype(np.float32)
        weighted = rows * weight[..., None]
        self.sums[name][i] += weighted.transpose(0, 2, 1) @ rows
        self.sums[f"{name}_mean"][i] += weighted.sum(1)
        self.sums[f"{name}_n"][i] += weight.sum(1)

    def result(self) -> dict[str, Array]:
        """Means instead of sums."""
        res = {}
        for name in NAMES:
            n = self.sums[f"{name}_n"]
            res[name] = self.sums[name] / n[..., None, None]
            res[f"{name}_mean"] = self.sums[f"{name}_mean"] / n[..., None]
        return res
