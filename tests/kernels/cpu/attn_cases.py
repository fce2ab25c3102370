"""Attention ops for the CPU's implementations, and what they must give, by numpy in binary64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants
from variants import Variant, runner

from turbo_gguf.codec import scalar, trellis
from turbo_gguf.codec.tables import LEVEL_STEPS, QK_SCALAR, QK_TRELLIS, SCALAR, TRELLIS

Array = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

TURBO = {t.name: t for t in SCALAR}
TRELLIS = {t.name: t for t in TRELLIS}
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24}
HEADERS = {"q8_0": 2, "q4_0": 2, "q4_1": 4, "q5_0": 2, "q5_1": 4}  # bytes of binary16 that a block starts with
DEVIATION = {"q8_0": 74.0, "q4_0": 4.6, "q4_1": 4.6, "q5_0": 9.2, "q5_1": 9.2}  # of random levels
INTEGER_KEYS = (*TURBO, *TRELLIS, "q8_0", "q4_0")  # Q becomes int8 for these; else keys become floats
POISON = 0xFF  # NaN in every type of a cache


@dataclass(frozen=True)
class Case:
    """Q [seq, query, head, DK], K and V [seq, key, KV head, D], mask [mask seq, mask head, query, key]."""

    k: str = "turbo3"
    v: str = "turbo3"
    dk: int = 128
    dv: int = 128
    heads_kv: int = 2
    gqa: int = 4
    n_q: int = 1
    n_k: int = 300
    threads: int = 2
    seqs: int = 1
    mask: str = "causal"  # causal, random, lowest (finite where others are infinite), none
    mask_heads: int = 1
    scale: float = 0.0  # 0: 1 / sqrt(dk)
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    peak: float = 1.0  # standard deviation of scores
    hidden: int = 0  # last keys that no query sees, all NaN
    more_cells: int = 0  # of the cache, behind the last key, all NaN
    second: int = 0  # keys of a second segment, f16; a random part of them is visible
    first_hidden: bool = False  # every key of the first segment, with a second one
    use_ref: bool = False
    setting: str = "1"

    @property
    def heads(self) -> int:
        return self.heads_kv * self.gqa

    @property
    def rows(self) -> int:
        """Rows that share a KV head."""
        return self.gqa * self.n_q


@dataclass
class Inputs:
    """Of an op; ``k`` and ``v`` are what the bytes decode to."""

    q: npt.NDArray[np.float32]
    k_bytes: Bytes
    k: npt.NDArray[np.float32]
    v_bytes: Bytes
    v: npt.NDArray[np.float32]
    mask: npt.NDArray[np.float16] | None
    sinks: npt.NDArray[np.float32] | None
    second: tuple[npt.NDArray[np.float16], npt.NDArray[np.float16], npt.NDArray[np.float16]] | None = None  # K, V, mask


@dataclass
class Answer:
    """Of a program: how it computed, and the result [seq, query, head, DV]."""

    isa: str
    taken: int  # threads for which the op was ours
    allocations: int
    work_size: int
    intact: bool
    out: npt.NDArray[np.float32]


def random_rows(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Bytes:
    """Rows of a type with values of a standard deviation about 1: all levels, scales of both signs."""
    if kind in ("f32", "f16", "bf16"):
        x = rng.standard_normal(shape).astype(np.float32)
        if kind == "bf16":
            return np.ascontiguousarray(x.view(np.uint16)[..., 1::2]).view(np.uint8)
        return x.astype(np.float32 if kind == "f32" else np.float16).view(np.uint8)
    if kind in TRELLIS:
        shape = (*shape[:-1], shape[-1] // QK_TRELLIS, TRELLIS[kind].block_bytes)
        packed = rng.integers(0, 256, shape, dtype=np.uint8)
        deviation = np.std(TRELLIS[kind].codebooks) / LEVEL_STEPS
        packed[..., 0] = (rng.uniform(0.5, 1.4, shape[:-1]) / deviation).astype(np.float16).view(np.uint16) >> 7
        return packed.reshape(*shape[:-2], -1)
    t = TURBO.get(kind)
    size = t.block_bytes if t else BLOCK_BYTES[kind]
    deviation = float(np.std(t.codebook)) if t else DEVIATION[kind]
    blocks = (*shape[:-1], shape[-1] // QK_SCALAR)
    packed = rng.integers(0, 256, (*blocks, size), dtype=np.uint8)
    d = (rng.uniform(0.5, 1.4, blocks) * rng.choice([-1, 1], blocks) / deviation).astype(np.float16)
    packed[..., :2] = d[..., None].view(np.uint8)
    if HEADERS.get(kind) == 4:
        smallest = (-d.astype(np.float32) * DEVIATION[kind] * 3**0.5).astype(np.float16)
        packed[..., 2:4] = smallest[..., None].view(np.uint8)
    return packed.reshape(*shape[:-1], -1)


def decode(kind: str, rows: Bytes) -> npt.NDArray[np.float32]:
    """What rows stand for."""
    if kind in ("f32", "f16"):
        return rows.view(np.float32 if kind == "f32" else np.float16).astype(np.float32)
    if kind in TURBO:
        return scalar.dequantize(TURBO[kind], rows)
    if kind in TRELLIS:
        return trellis.dequantize(TRELLIS[kind], rows)
    return quants.dequantize(rows, GGMLQuantizationType[kind.upper()]).astype(np.float32)


@cache
def inputs(case: Case) -> Inputs:
    rng, cells = np.random.default_rng(1), case.n_k + case.more_cells
    q = (case.peak * rng.standard_normal((case.seqs, case.n_q, case.heads, case.dk))).astype(np.float32)
    if case.dk > QK_SCALAR:
        q[:, :, -1, :QK_SCALAR] = 0  # a block without a scale
    k_bytes = random_rows(case.k, rng, (case.seqs, cells, case.heads_kv, case.dk))
    v_bytes = random_rows(case.v, rng, (case.seqs, cells, case.heads_kv, case.dv))
    for packed in (k_bytes, v_bytes):
        packed[:, case.n_k - case.hidden :] = POISON
    k, v = (decode(kind, packed[:, : case.n_k]) for kind, packed in ((case.k, k_bytes), (case.v, v_bytes)))
    for values in (k, v):
        values[:, case.n_k - case.hidden :] = 0
    sinks = np.linspace(-1, 3, case.heads, dtype=np.float32) if case.sinks else None
    x = Inputs(q, k_bytes, k, v_bytes, v, _mask(case, rng), sinks)
    if case.second:
        second_k, second_v = (
            rng.standard_normal((case.seqs, case.second, case.heads_kv, d)).astype(np.float16) for d in (case.dk, case.dv)
        )
        visible = rng.random((case.seqs, 1, case.n_q, case.second)) < 0.7
        x.second = second_k, second_v, np.where(visible, -rng.random(visible.shape), -np.inf).astype(np.float16)
    if case.first_hidden and x.mask is not None:
        x.mask[:] = -np.inf
    return x


def _mask(case: Case, rng: np.random.Generator) -> npt.NDArray[np.float16] | None:
    """Queries are the last cells of their sequence, which has 37 cells less than the one before."""
    if case.mask == "none":
        return None
    shape = (case.seqs, case.mask_heads, case.n_q, case.n_k)
    seq, _, query, key = np.ogrid[tuple(slice(n) for n in shape)]
    distance = np.broadcast_to(case.n_k - case.hidden - case.n_q + query - 37 * seq - key, shape)
    values = -distance / 64 if case.max_bias else np.zeros(shape)
    visible = distance >= 0
    if case.mask != "causal":
        values = values - rng.random(shape)
        visible = visible & (rng.random(shape) < 0.7) & (key // 64 != (case.mask == "random"))  # a whole tile is hidden
    if case.mask == "random":
        visible = visible & (query != 1)
    return np.where(visible, values, -65504 if case.mask == "lowest" else -np.inf).astype(np.float16)


def slopes(case: Case) -> Array:
    """ALiBi, one for each head."""
    if not case.max_bias:
        return np.ones(case.heads)
    n = 2 ** int(np.log2(case.heads))
    head = np.arange(case.heads)
    each: Array = np.exp2(np.where(head < n, -case.max_bias / n * (head + 1), -case.max_bias / 2 / n * (2 * (head - n) + 1)))
    return each


def quantized_query(q: npt.NDArray[np.float32]) -> Array:
    """What is left of Q as int8 with a scale for each block."""
    blocks = q.reshape(*q.shape[:-1], -1, QK_SCALAR)
    top = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    left: Array = (np.rint(blocks * inverse).astype(np.float64) * (top / np.float32(127))).reshape(q.shape)
    return left


def raw_scores(case: Case, q: Array, k: npt.NDArray[np.floating]) -> Array:
    """Products of all queries and keys, [seq, head, query, key]."""
    q = q.reshape(case.seqs, case.n_q, case.heads_kv, case.gqa, case.dk).transpose(0, 2, 1, 3, 4)
    keys = k.astype(np.float64).transpose(0, 2, 3, 1)
    scores = q.reshape(case.seqs, case.heads_kv, -1, case.dk) @ keys * (case.scale or case.dk**-0.5)
    scores = scores.reshape(case.seqs, case.heads_kv, case.n_q, case.gqa, -1)
    each: Array = scores.transpose(0, 1, 3, 2, 4).reshape(case.seqs, case.heads, case.n_q, -1)
    return each


def attend(case: Case, x: Inputs, *, int8: bool) -> Array:
    """The op in binary64. ``int8``: with Q as the implementations see it, where keys are multiplied as integers."""
    q = quantized_query(x.q) if int8 and case.k in INTEGER_KEYS else x.q.astype(np.float64)
    scores, v, every_mask = raw_scores(case, q, x.k), x.v, x.mask
    if x.second:
        second_k, second_v, second_mask = x.second
        scores = np.concatenate((scores, raw_scores(case, x.q.astype(np.float64), second_k)), -1)
        v = np.concatenate((v, second_v.astype(np.float32)), 1)
        assert x.mask is not None
        every_mask = np.concatenate((x.mask, np.broadcast_to(second_mask, (*x.mask.shape[:-1], case.second))), -1)
    values = v.astype(np.float64).transpose(0, 2, 1, 3)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if every_mask is not None:
        mask = np.tile(every_mask.astype(np.float64), (1, case.heads // case.mask_heads, 1, 1))  # head h has mask h % mask_heads
        hidden = np.isinf(mask)
        scores = np.where(hidden, -np.inf, scores + slopes(case)[:, None, None] * np.where(hidden, 0, mask))
    sinks = np.full(case.heads, -np.inf) if x.sinks is None else x.sinks.astype(np.float64)
    top = np.maximum(scores.max(-1), sinks[:, None])
    top = np.where(np.isinf(top), 0, top)[..., None]
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + np.exp(sinks[:, None, None] - top)
    weights = weights / np.where(total == 0, 1, total)
    out = weights.reshape(case.seqs, case.heads_kv, -1, values.shape[2]) @ values
    return out.reshape(case.seqs, case.heads, case.n_q, case.dv).transpose(0, 2, 1, 3)


@cache
def expected(case: Case, *, int8: bool) -> Array:
    return attend(case, inputs(case), int8=int8)


def run(variant: Variant, case: Case, x: Inputs | None) -> Answer:
    """Compute on an implementation; without inputs, only plan."""
    numbers = [case.dk, case.dv, case.heads_kv, case.gqa, case.n_q, case.n_k, case.n_k + case.more_cells, case.seqs]
    numbers += [case.mask_heads if case.mask != "none" else 0, case.seqs, case.second]
    numbers += [int(case.sinks), case.threads]
    line = " ".join(map(str, [case.k, case.v, *numbers, int(case.use_ref), int(x is not None)]))
    line += f" {case.scale or case.dk**-0.5!r} {case.max_bias!r} {case.softcap!r}"
    shape = (case.seqs, case.n_q, case.heads, case.dv)
    parts: list[npt.NDArray[np.generic] | None] = [] if x is None else [x.q, x.k_bytes, x.v_bytes, x.mask, x.sinks, *(x.second or ())]
    data = [part.tobytes() for part in parts if part is not None]
    words, result = runner("attn", variant, case.setting).ask(line, data, 4 * int(np.prod(shape)) if data else 0)
    out = np.frombuffer(result, np.float32).reshape(shape) if data else np.zeros(0, np.float32)
    return Answer(words[0], int(words[1]), int(words[2]), int(words[3]), words[4] == "1", out)


@cache
def answer(variant: Variant, case: Case) -> Answer:
    """The op on its own inputs; computed once, for several tests."""
    return run(variant, case, inputs(case))


def nmse(out: npt.NDArray[np.float32], want: npt.NDArray[np.floating]) -> float:
    """Squared error, relative to the squares of what is wanted; infinite for NaN."""
    want = want.astype(np.float64)
    error = float(((out - want) ** 2).sum() / (want**2).sum())
    return error if np.isfinite(error) else np.inf


def largest_error(out: npt.NDArray[np.float32], want: npt.NDArray[np.floating]) -> float:
    error = float(np.abs(out - want).max())
    return error if np.isfinite(error) else np.inf
