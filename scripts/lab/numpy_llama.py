"""A Llama or Qwen2 model from a GGUF file in numpy, with attention whose cached K and V may be replaced.

Enough for experiments that a build of llama.cpp cannot do without new code: float32 everywhere, one window of tokens at a time. K and V
that attention reads from the cache are whatever a function makes of them; keys of the sink and of the tail are read as they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, quants

Array = np.ndarray
Cache = Callable[[int, Array, Array], tuple[Array, Array]]
"""From layer, K and V, [heads, tokens, head size], to what attention reads from the cache."""

ROWS = 256  # queries that are attended together


@dataclass
class Layer:
    """What an observer sees. Heads first: [heads, tokens, head size]; K and Q before and after RoPE."""

    number: int
    q_raw: Array
    k_raw: Array
    q: Array
    k: Array
    v: Array


class Model:
    """Weights, dequantized to a folder once and mapped into memory."""

    def __init__(self, path: Path, folder: Path) -> None:
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.arch = self.fields["general.architecture"]
        self.layers = self._field("block_count")
        self.heads, self.kv_heads = self._field("attention.head_count"), self._field("attention.head_count_kv")
        self.head = self._field("embedding_length") // self.heads
        self.eps = self._field("attention.layer_norm_rms_epsilon")
        self.pairing = "neox" if self.arch == "qwen2" else "normal"
        self.speeds = float(self._field("rope.freq_base")) ** (-np.arange(self.head // 2) * 2.0 / self.head)
        folder.mkdir(parents=True, exist_ok=True)
        self.weights = {}
        for tensor in reader.tensors:
            file = folder / f"{path.stem}.{tensor.name}.npy"
            if not file.exists():
                np.save(file, np.ascontiguousarray(quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)))
            self.weights[tensor.name] = np.load(file, mmap_mode="r")

    def _field(self, name: str) -> float:
        return self.fields[f"{self.arch}.{name}"]

    def get(self, layer: int, name: str) -> Array | None:
        return self.weights.get(f"blk.{layer}.{name}")

    def norm(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(self.eps)) * weight

    def turn(self, x: Array, angles: Array) -> Array:
        """Turn the pairs of the last axis by angles [tokens, pairs]."""
        cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
        first, second = self.pairs()
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    def pairs(self) -> tuple[slice, slice]:
        """Both channels of each RoPE pair."""
        half = self.head // 2
        return (slice(0, half), slice(half, None)) if self.pairing == "neox" else (slice(0, None, 2), slice(1, None, 2))

    def project(self, layer: int, name: str, x: Array, heads: int) -> Array:
        y = x @ self.get(layer, f"attn_{name}.weight").T
        bias = self.get(layer, f"attn_{name}.bias")
        y = y if bias is None else y + bias
        return np.ascontiguousarray(y.reshape(len(x), heads, -1).transpose(1, 0, 2))

    def hidden(
        self,
        tokens: Array,
        cache: Cache | None = None,
        exact: tuple[int, int] = (0, 0),
        watch: Callable[[Layer], None] | None = None,
        weights: Callable[[int, int, int, Array], None] | None = None,
    ) -> Array:
        """Normed states before the output projection, [tokens, width].

        Args:
            tokens: at positions 0, 1, ...
            cache: makes what attention reads.
            exact: sink and tail.
            watch: is shown each layer.
            weights: is shown layer, first query, KV head and attention weights [group, queries, keys].
        """
        x = np.array(self.weights["token_embd.weight"][tokens])
        angles = np.outer(np.arange(len(tokens)), self.speeds)
        for i in range(self.layers):
            h = self.norm(x, self.get(i, "attn_norm.weight"))
            q, k = self.project(i, "q", h, self.heads), self.project(i, "k", h, self.kv_heads)
            v = self.project(i, "v", h, self.kv_heads)
            turned_q, turned_k = self.turn(q, angles), self.turn(k, angles)
            if watch:
                watch(Layer(i, q, k, turned_q, turned_k, v))
            cached = cache(i, turned_k, v) if cache else (turned_k, v)
            shown = (lambda first, h, p, i=i: weights(i, first, h, p)) if weights else None
            out = attend(turned_q, turned_k, v, cached, exact=exact if cache else (0, 0), weights=shown)
            x += out @ self.get(i, "attn_output.weight").T
            h = self.norm(x, self.get(i, "ffn_norm.weight"))
            gate = h @ self.get(i, "ffn_gate.weight").T
            gate = gate / (1 + np.exp(-gate)) * (h @ self.get(i, "ffn_up.weight").T)
            x += gate @ self.get(i, "ffn_down.weight").T
        return self.norm(x, self.weights["output_norm.weight"])

    def log_probabilities(self, hidden: Array) -> Array:
        output = self.weights.get("output.weight")
        logits = hidden @ (self.weights["token_embd.weight"] if output is None else output).T
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits


def attend(
    q: Array,
    k: Array,
    v: Array,
    cached: tuple[Array, Array],
    *,
    exact: tuple[int, int] = (0, 0),
    weights: Callable[[int, int, Array], None] | None = None,
) -> Array:
    """Causal attention, [tokens, heads * head size].

    A query at position p reads keys below the sink or above p - tail from `k` and `v`, and all others from `cached`.
    """
    heads, n, head = q.shape
    kv_heads = len(k)
    group = heads // kv_heads
    sink, tail = exact
    q = (q / np.sqrt(np.float32(head))).reshape(kv_heads, group, n, head)
    out = np.empty((n, kv_heads, group, head), np.float32)
    delta_k, delta_v = k - cached[0], v - cached[1]
    for first in range(0, n, ROWS):
        end = min(first + ROWS, n)
        low = max(0, first - tail + 1)
        spans = [slice(0, min(sink, low)), slice(low, end)] if sink or tail else []
        at = np.arange(first, end)[:, None]
        masks = [((keys := np.arange(span.start, span.stop)) < sink) | (keys > at - tail) for span in spans]
        future = np.where(np.arange(first, end) > at, np.float32(-np.inf), np.float32(0))
        for h in range(kv_heads):
            rows = q[h, :, first:end].reshape(-1, head)
            s = (rows @ cached[0][h, :end].T).reshape(group, end - first, end)
            for span, mask in zip(spans, masks, strict=True):
                s[:, :, span] += (rows @ delta_k[h, span].T).reshape(group, end - first, -1) * mask
            s[:, :, first:] += future
            s -= s.max(-1, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(-1, keepdims=True)
            if weights:
                weights(first, h, s)
            o = s.reshape(-1, end) @ cached[1][h, :end]
            for span, mask in zip(spans, masks, strict=True):
                o += (s[:, :, span] * mask).reshape(len(o), -1) @ delta_v[h, span]
            out[first:end, h] = o.reshape(group, end - first, head).transpose(1, 0, 2)
    return out.reshape(n, -1)


_LETTER, _DIGIT = r"[^\W\d_]", r"\d"
_OTHER = rf"(?:(?!{_LETTER}|{_DIGIT})\S)"
_SPLIT = {
    "smollm": rf"{_DIGIT}|'s|'t|'re|'ve|'m|'ll|'d| ?{_LETTER}+| ?{_OTHER}+|\s+(?!\S)|\s+",
    "qwen2": rf"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|(?:(?!{_LETTER}|{_DIGIT})[^\r\n])?{_LETTER}+|{_DIGIT}"
    rf"| ?{_OTHER}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Tokenizer:
    """Byte pairs, for text without special tokens."""

    def __init__(self, fields: dict) -> None:
        self.split = re.compile(_SPLIT[fields["tokenizer.ggml.pre"]])
        self.ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in visible]
        self.letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str, most: int) -> Array:
        found: list[int] = []
        for word in self._words(text):
            found += word
            if len(found) >= most:
                break
        return np.array(found[:most])

    def _words(self, text: str) -> Iterator[list[int]]:
        for match in self.split.finditer(text):
            word = match.group()
            if word not in self.known:
                self.known[word] = self._merge([self.letters[b] for b in word.encode()])
            yield self.known[word]

    def _merge(self, parts: list[str]) -> list[int]:
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(self.ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]
