"""Whether a model can have a cache: head sizes, layers, decay."""

from __future__ import annotations

from turbo_gguf.cache.spec import CacheSpec, layer_types, named_types, nothing_decays
from turbo_gguf.cache.types import CACHE_TYPES, cache_type
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.models import ModelFile


def check_fit(types: CacheSpec, model: ModelFile) -> None:
    """Refuse types that this model cannot have, before any tool runs.

    Raises:
        UsageError: head sizes, as :func:`check_head_sizes`; a layer that the model lacks; decay that no layer can have.
    """
    check_head_sizes(types, model.head_k, model.head_v)
    sides = layer_types(types, len(model.kv_heads))
    if types.decay and not any(cache_type(name).decays for side in sides for name in side):
        raise nothing_decays(types)


def check_head_sizes(types: CacheSpec, head_k: int, head_v: int) -> None:
    """Refuse a head size that cannot be cut into blocks.

    Raises:
        UsageError: names the head size and the types that do work.
    """
    for side, names, head in zip("KV", named_types(types), (head_k, head_v), strict=True):
        for name in names:
            _check_head_size(name, side, head)


def _check_head_size(name: str, side: str, head: int) -> None:
    block = cache_type(name).block
    if head % block:
        working = ", ".join(t.name for t in CACHE_TYPES.values() if head % t.block == 0)
        raise UsageError(
            f"cache type {name}: the {side} head size {head} of this model is not a multiple of its block of {block} values",
            f"types that work with head size {head}: {working}",
        )
