"""Bits per value of a KV cache: by the block layouts of its types, and by the sizes that the log of a run gives."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from turbo_gguf.cache.spec import CacheSpec, layer_types
from turbo_gguf.cache.types import cache_type
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.measure.log import KvCache, LogFacts, layers_of

MIB_ROUNDING = 0.005 + 1e-6
"""Half of the last digit of the sizes in the log, and a little more: 1.125 MiB is printed as 1.12, on the very edge."""


class Bits(msgspec.Struct, frozen=True):
    """Bits per value of a KV cache, K and V together."""

    nominal: float  # of the types' block layouts
    low: float | None = None  # least and greatest value that the sizes in the log allow; None: not derivable
    high: float | None = None
    exact: float = 0.0  # what the f16 copies of an exact sink and tail add, spread over all values of the cache

    @property
    def total(self) -> float:
        """What each value of the cache costs, copies included."""
        return self.nominal + self.exact

    @property
    def agrees(self) -> bool:
        """Whether the nominal number lies within what was measured (True when nothing could be measured)."""
        return self.low is None or self.high is None or self.low <= self.nominal <= self.high


def bits_per_value(facts: LogFacts, types: CacheSpec, model: ModelFile) -> Bits:
    """Bits per value of K and V together: nominal, and the interval that the rounded sizes in the log allow.

    The log gives K and V in MiB with two digits; the number of values is cells x streams x sum over the layers of KV heads x
    head size. The relative uncertainty is 0.005 MiB / size: below 1 % from about 1 MiB on.
    """
    bits_k, bits_v = nominal_bits(facts.caches, types, model)
    values_k, values_v = _values(facts, model, model.head_k), _values(facts, model, model.head_v)
    if values_k is None or values_v is None:
        return Bits(nominal=(bits_k * model.head_k + bits_v * model.head_v) / (model.head_k + model.head_v))
    nominal = (bits_k * values_k + bits_v * values_v) / (values_k + values_v)
    mib = sum(c.mib_k + c.mib_v for c in facts.caches)
    slack = 2 * MIB_ROUNDING * len(facts.caches)
    scale = 8 * 1024 * 1024 / (values_k + values_v)
    exact = sum(c.copies.mib for c in facts.caches if c.copies)
    return Bits(nominal=nominal, low=max(0.0, mib - slack) * scale, high=(mib + slack) * scale, exact=exact * scale)


def memory_mib(facts: LogFacts, types: CacheSpec, model: ModelFile) -> tuple[float, float]:
    """MiB of all KV caches and copies of exact tokens together, and how far this may be off.

    The log rounds sizes to .01 MiB, which is much of a small cache; its block layouts say it exactly. So sizes in the log count only where
    the number of values cannot be told, and for copies.
    """
    bits_k, bits_v = nominal_bits(facts.caches, types, model)
    values_k, values_v = _values(facts, model, model.head_k), _values(facts, model, model.head_v)
    copies = [cache.copies.mib for cache in facts.caches if cache.copies]
    if values_k is None or values_v is None:
        logged = [mib for cache in facts.caches for mib in (cache.mib_k, cache.mib_v)]
        return sum(logged) + sum(copies), MIB_ROUNDING * (len(logged) + len(copies))
    return (bits_k * values_k + bits_v * values_v) / 8 / 2**20 + sum(copies), MIB_ROUNDING * len(copies)


def nominal_bits(caches: Sequence[KvCache], types: CacheSpec, model: ModelFile) -> tuple[float, float]:
    """Bits per value of K, and of V, by the block layouts of the types asked for.

    Types by layer count with the values that their layers have in ``caches``. The log says which layers are in which:
    :func:`turbo_gguf.measure.guard.check` has made sure of it.
    """
    if not types.by_layer:
        return cache_type(types.k).bits, cache_type(types.v).bits
    heads = model.kv_heads
    placed = [layers_of(cache, len(heads)) for cache in caches]

    def average(asked: Sequence[str], side: int) -> float:
        sizes = [
            (cache.cells * cache.streams * heads[layer], cache_type(asked[layer]).bits)
            for cache, layers in zip(caches, placed, strict=True)
            for layer, _ in layers[side]
        ]
        return sum(values * bits for values, bits in sizes) / sum(values for values, _ in sizes)

    asked_k, asked_v = layer_types(types, len(heads))
    return average(asked_k, 0), average(asked_v, 1)


def _values(facts: LogFacts, model: ModelFile, head: int) -> int | None:
    """Values of K (or V) in all caches; None when the layers of a cache cannot be told from the metadata."""
    with_kv = model.kv_heads
    if not model.uniform or not with_kv:
        return None
    if len(set(with_kv)) == 1:
        return sum(c.cells * c.streams * c.layers for c in facts.caches) * with_kv[0] * head
    if len(facts.caches) == 1 and facts.caches[0].layers == len(with_kv):
        return facts.caches[0].cells * facts.caches[0].streams * sum(with_kv) * head
    return None
