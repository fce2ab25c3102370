"""Bytes of a context, from the shape of a model: pure functions.

What is exact, byte for byte: cells, KV caches, copies of exact tokens, and the state of recurrent layers. What is estimated: the compute
buffer, since only llama.cpp's own graph tells how large it is. ``eval/results/plan.md`` has how far both are off.
"""

from __future__ import annotations

import math

import msgspec

from turbo_gguf.cache.settings import NONE
from turbo_gguf.cache.spec import CacheSpec, is_turbo, layer_types, named_types, with_defaults
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import UsageError
from turbo_gguf.plan import architectures
from turbo_gguf.plan.shape import Cache, Layer, Shape

PAD = 256
"""Cells come in multiples of this."""

BATCH, UBATCH = 2048, 512
"""Tokens of a decode call, and tokens that are computed at a time: llama-server's defaults."""

REWIND = 16
"""Tokens for which copies have room beside sink and tail, where nothing drafts."""

_ROW_STEP = 32
_LEAST_TAIL = 4
_F16, _F32 = 2, 4


class Context(msgspec.Struct, frozen=True):
    """A context as llama-server makes it."""

    ctx: int  # tokens of a slot; on one pool, of all slots together
    parallel: int = 1  # slots
    unified: bool = False  # one pool
    ubatch: int = UBATCH
    full_windows: bool = False  # --swa-full

    @property
    def streams(self) -> int:
        """Parts that a cache has."""
        return 1 if self.unified else self.parallel

    @property
    def total(self) -> int:
        """What ``-c`` says."""
        return self.ctx * self.streams

    @property
    def cells(self) -> int:
        """Of a stream that holds all tokens."""
        return _pad(self.ctx)


class Memory(msgspec.Struct, frozen=True):
    """Bytes by what they are for."""

    kv: int
    copies: int = 0  # of exact tokens
    calibration: int = 0
    state: int = 0  # of recurrent layers
    weights: int = 0  # copies in another layout included
    compute: int = 0  # buffers of graphs, and of what they put out

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, name) for name in self.__struct_fields__)


def _pad(n: int, step: int = PAD) -> int:
    return math.ceil(n / step) * step


def cells(cache: Cache, context: Context) -> tuple[int, int]:
    """Cells of a stream of a cache, and its streams."""
    size = context.cells
    streams = context.parallel if cache.split else context.streams
    if cache.window and not context.full_windows:
        sharing = context.parallel if streams == 1 else 1
        size = _pad(min(size, cache.window * sharing + min(context.ubatch, BATCH, context.total)))
    if cache.every > 1:
        size = _pad(max(1, math.ceil(size / cache.every)))
    return size, streams


def row_bytes(name: str, values: int) -> int:
    """Bytes of a row of so many values in a cache type."""
    kind = cache_type(name)
    return values // kind.block * kind.size


def _rows(shape: Shape, cache: Cache, types: CacheSpec) -> tuple[int, int]:
    """Bytes of K and of V that all layers of a cache take for a token."""
    by_layer = dict(zip(shape.numbers, zip(*layer_types(types, len(shape.numbers)), strict=True), strict=True))
    kinds = [by_layer.get(layer.number, (types.k, types.v)) for layer in cache.layers]
    k = sum(row_bytes(kind[0], layer.k) for kind, layer in zip(kinds, cache.layers, strict=True))
    return k, sum(row_bytes(kind[1], layer.v) for kind, layer in zip(kinds, cache.layers, strict=True))


def per_token(shape: Shape, types: CacheSpec) -> float:
    """Bytes that one token more takes, where windows are full."""
    return sum(sum(_rows(shape, cache, types)) / cache.every for cache in shape.caches if not cache.window)


def kv_bytes(shape: Shape, types: CacheSpec, context: Context) -> tuple[tuple[int, int], ...]:
    """Bytes of K and of V of each cache, in the order of the shape."""
    found = []
    for cache in shape.caches:
        size, streams = cells(cache, context)
        k, v = _rows(shape, cache, types)
        found.append((size * streams * k, size * streams * v))
    return tuple(found)


# --- what turbo types bring -----------------------------------------------------------------------------------------------


def why_not(shape: Shape, types: CacheSpec) -> str:
    """Why a model can't have a cache; "": it can."""
    if is_turbo(types) and shape.refusal:
        return shape.refusal
    if shape.arch in architectures.NO_FLASH_ATTENTION and any(cache_type(name).is_quantized for name in named_types(types)[1]):
        return "V needs flash attention, which this architecture does not support"
    if shape.latent and types.k != types.v and not any(layer.v for cache in shape.caches for layer in cache.layers):
        return "with multi-head latent attention, K and V have the same type"
    for cache in shape.caches:
        for layer in cache.layers:
            for side, names, head in zip("KV", named_types(types), (layer.head_k, layer.head_v), strict=True):
                for name in names:
                    if head % cache_type(name).block:
                        return f"the {side} head size {head} is no multiple of the block of {cache_type(name).block} values of {name}"
    return ""


def exact_tokens(shape: Shape, types: CacheSpec, context: Context) -> tuple[int, int]:
    """Sink and tail in force: a tail by default is shorter where a sequence has few cells."""
    asked = with_defaults(types)
    sink, tail = asked.sink or 0, asked.tail or 0
    if types.sink is None or types.tail is None:
        part = context.total // context.parallel
        room = (part if context.unified else _pad(part)) // 8 // _LEAST_TAIL * _LEAST_TAIL
        fits = room >= sink + REWIND + _LEAST_TAIL
        by_default = (sink, min(tail, room - sink - REWIND)) if fits else (0, 0)
        sink = by_default[0] if types.sink is None else sink
        tail = by_default[1] if types.tail is None else tail
    return (0, 0) if shape.latent or shape.arch in architectures.OWN_ATTENTION else (sink, tail)


def copies_bytes(shape: Shape, types: CacheSpec, context: Context) -> int:
    """Bytes of the f16 copies of exact tokens."""
    exact = exact_tokens(shape, types, context)
    return sum(
        _copies_of(cache, exact, context) * cells(cache, context)[1] * sum(layer.k + layer.v for layer in cache.layers) * _F16
        for cache in shape.caches
    )


def _copies_of(cache: Cache, exact: tuple[int, int], context: Context) -> int:
    """Rows of a stream of a cache, for copies of a sink and a tail."""
    size, streams = cells(cache, context)
    needed = context.parallel // streams * (sum(exact) + REWIND)
    return min(_pad(needed, _ROW_STEP), size) if sum(exact) else 0


def calibration_bytes(shape: Shape, types: CacheSpec) -> int:
    """Bytes of what a calibration puts beside the weights: two matrices for each head of K, scales and means."""
    calibration = with_defaults(types).calibration
    if calibration is None or calibration == NONE or shape.latent or shape.arch in architectures.OWN_ATTENTION:
        return 0
    return _F32 * sum(_calibrated(layer) for cache in shape.caches for layer in cache.layers)


def _calibrated(layer: Layer) -> int:
    """Values: two maps, mean and two scales of K, two means and two scales of V."""
    return layer.heads * (2 * layer.head_k * layer.head_k + 3 * layer.head_k + 4 * layer.head_v)


# --- all of it ------------------------------------------------------------------------------------------------------------


def estimated_compute(shape: Shape, types: CacheSpec, context: Context) -> int:
    """About what graphs take: rows that are alive at a time, a mask for each cache and for exact tokens, and logits.

    Without flash attention, scores of all heads come on top.
    """
    tokens = min(context.ubatch, BATCH, context.total)
    alive = 5 * shape.n_embd + 3 * max(shape.n_ff, shape.n_head)
    masks = 0
    for cache in shape.caches:
        if cache.layers and not cache.indexer:
            masks += cells(cache, context)[0]
            if rows := _copies_of(cache, exact_tokens(shape, types, context), context):
                masks += _pad(rows + tokens // context.streams)
    return tokens * (alive * _F32 + masks * _F16) + context.parallel * shape.n_vocab * _F32


def estimate(shape: Shape, types: CacheSpec, context: Context) -> Memory:
    """What a context takes, with an estimate of its compute buffers.

    Raises:
        UsageError: the model can't have these types.
    """
    if reason := why_not(shape, types):
        raise UsageError(f"{types}: {reason}")
    return Memory(
        kv=sum(map(sum, kv_bytes(shape, types, context))),
        copies=copies_bytes(shape, types, context),
        calibration=calibration_bytes(shape, types),
        state=shape.state * context.parallel,
        weights=shape.weights,
        compute=estimated_compute(shape, types, context),
    )
