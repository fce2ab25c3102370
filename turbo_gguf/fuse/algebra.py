"""What a fold does to each tensor: functions of arrays, rows first, in binary64.

A layer has KV heads, and each of them serves a group of query heads. With G the rotation (:mod:`turbo_gguf.fuse.mixing`), s and n the
scales and means of V by KV head and channel, and c the scales of K:

    stored V     G s (V - n)     rows of attn_v times G s, its bias likewise, and less G s n
    output       W o             columns of attn_output divided by s and times G^T; W n is added to its bias
    stored K     c K             rows of attn_k, its bias, or the weight of its norm, times c
    queries      Q / c           likewise, divided

Attention weights of a query sum to one, so n leaves the output as a constant. Scores are sums over channels, in which c cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbo_gguf.fuse.mixing import mixing

Array = npt.NDArray[np.float64]
Exponents = npt.NDArray[np.int64]

LARGEST_EXPONENT = 6
"""Scales of K are powers of two up to this one. A channel that a text hardly uses must not be left without bits in another one."""


@dataclass(frozen=True)
class ValueFold:
    """What V of one layer is multiplied by and loses.

    Attributes:
        scale: ``[n_head_kv, channel]``; ones: nothing.
        mean: likewise; ``None``: it stays.
    """

    scale: Array
    mean: Array | None

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.scale)

    def rows(self, weight: Array) -> Array:
        """Rows of the value projection, ``[n_head_kv x channel, n_in]``."""
        heads = weight.reshape(self.heads, -1, weight.shape[-1]) * self.scale[..., None]
        return np.asarray((mixing(heads.shape[1]) @ heads).reshape(weight.shape))

    def bias(self, bias: Array) -> Array:
        """Its bias, ``[n_head_kv x channel]``."""
        heads = bias.reshape(self.heads, -1)
        heads = heads if self.mean is None else heads - self.mean
        return ((heads * self.scale) @ mixing(heads.shape[1]).T).reshape(-1)

    def columns(self, weight: Array) -> Array:
        """Columns of the output projection, ``[n_out, n_head x channel]``."""
        channels = self.scale.shape[1]
        heads = weight.reshape(len(weight), self.heads, -1, channels) / self.scale[:, None]
        return (heads @ mixing(channels).T).reshape(weight.shape)

    def constant(self, weight: Array) -> Array:
        """What the output projection as it was makes of the means: ``[n_out]``."""
        mean = np.zeros_like(self.scale) if self.mean is None else self.mean
        heads = weight.reshape(len(weight), self.heads, -1, mean.shape[1])
        return np.asarray(np.einsum("ohgc,hc->o", heads, mean))


def value_fold(scale: npt.ArrayLike, mean: npt.ArrayLike | None) -> ValueFold:
    """From what a calibration has."""
    return ValueFold(np.asarray(scale, np.float64), None if mean is None else np.asarray(mean, np.float64))


def key_exponents(maps: npt.ArrayLike, pairs: npt.NDArray[np.int64], *, shared: bool = False) -> Exponents:
    """Scales of K as powers of two, from the maps of a calibration: what is left to these has channels of about one size.

    Args:
        maps: ``[n_head_kv, to, from]``; scales are diagonal ones.
        pairs: number of the class of each channel ``[channel]``. Channels of a class, which RoPE turns into each other, get one scale.
        shared: all heads get the same, since they share the weight that it goes into.

    Returns:
        ``[n_head_kv, channel]``, with a mean near 0 in each head.
    """
    level = np.log2(np.square(np.asarray(maps, np.float64)).sum(1)) / 2
    if shared:
        level = np.broadcast_to(level.mean(0), level.shape)
    sums = np.zeros((len(level), int(pairs.max()) + 1))
    np.add.at(sums.T, pairs, level.T)
    level = (sums / np.bincount(pairs))[:, pairs]
    level = level - level.mean(1, keepdims=True)
    return np.asarray(np.clip(np.rint(level), -LARGEST_EXPONENT, LARGEST_EXPONENT), np.int64)


def of_queries(exponents: Exponents, n_head: int) -> Exponents:
    """What queries get, ``[n_head, channel]``, from what keys get."""
    return np.asarray(-np.repeat(exponents, n_head // len(exponents), axis=0))


def scaled(values: Array, exponents: Exponents) -> Array:
    """Biases, or weights of norms, of as many values as there are exponents, or of those of one head."""
    chosen = exponents if values.size == exponents.size else exponents[:1]
    return np.ldexp(values.reshape(chosen.shape), chosen).reshape(values.shape)
