"""One attending layer of a model file: which tensors it has, and what can be folded into them. Reasons are said where something can't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from turbo_gguf.fuse import architectures as known
from turbo_gguf.fuse.architectures import Attention
from turbo_gguf.fuse.rows import FINE, can_decode
from turbo_gguf.inputs.gguf_file import Fields, Tensor

Part = tuple[Tensor, slice]
"""A tensor, and the rows of it that are Q, K or V."""


@dataclass(frozen=True)
class Heads:
    """Numbers and sizes of the heads of a layer."""

    n: int
    n_kv: int
    size_k: int
    size_v: int

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each projection."""
        return {"q": self.n * self.size_k, "k": self.n_kv * self.size_k, "v": self.n_kv * self.size_v}


@dataclass
class AttentionLayer:
    """The tensors around the attention of a layer.

    Attributes:
        why_not: reasons by part, ``"V"``, ``"means of V"``, ``"K"``; without an entry the part can be folded.
    """

    number: int
    heads: Heads
    tensors: Mapping[str, Tensor]  # by what they are: attn_v.weight, ...
    attention: Attention
    why_not: dict[str, str] = field(default_factory=dict)

    @property
    def is_merged(self) -> bool:
        """Whether Q, K and V are one tensor."""
        return "attn_qkv.weight" in self.tensors

    def name(self, what: str) -> str:
        """Name in the file."""
        return f"blk.{self.number}.{what}"

    def rows_of(self, side: str) -> slice:
        """Rows of Q, K or V in their weight."""
        rows, start = self.heads.rows, 0
        for other in "qkv" if self.is_merged else side:
            if other == side:
                break
            start += rows[other]
        return slice(start, start + rows[side])

    def weight_of(self, side: str) -> str:
        """What the weight of Q, K or V is called."""
        return "attn_qkv.weight" if self.is_merged else f"attn_{side}.weight"

    def bias_of(self, side: str) -> str | None:
        """What its bias is called, whose rows are those of the weight unless it stands alone; ``None``: there is none."""
        names = ("attn_qkv.bias", f"attn_{side}.bias") if self.is_merged else (f"attn_{side}.bias",)
        return next((name for name in names if name in self.tensors), None)

    def pairs(self, n_rot: int) -> npt.NDArray[np.int64]:
        """Number of the class of each channel of K: RoPE turns channels of a class into each other."""
        number = np.arange(self.heads.size_k)
        if self.attention.rope == known.NONE:
            return number
        half = n_rot // 2
        merged = {
            known.NORM: number // 2,
            known.NEOX: number % max(half, 1),
            known.EITHER: number // 2 % max(half // 2, 1) if half % 2 == 0 else number * 0,
        }[self.attention.rope]
        found = np.where(number < n_rot, merged, number)
        return np.unique(found, return_inverse=True)[1]


def look(number: int, kv: tuple[int, int, int], tensors: Mapping[str, Tensor], attention: Attention) -> AttentionLayer:
    """See what a layer has.

    Args:
        number: of the layer.
        kv: KV heads, and the sizes of heads of K and V.
        tensors: of the layer, by their names without ``blk.N.``.
        attention: of the architecture.
    """
    n_kv, size_k, size_v = kv
    output = tensors.get("attn_output.weight")
    n = output.ne[0] // size_v if output and size_v else 0
    layer = AttentionLayer(number, Heads(n, n_kv, size_k, size_v), tensors, attention)
    if reason := _misfit(layer, output):
        layer.why_not |= dict.fromkeys(("V", "K"), reason)
    return layer


def refuse(layer: AttentionLayer, fields: Fields, fallback: str | None) -> None:
    """Note what can't be folded, and why."""
    arch = fields["general.architecture"]
    if arch in known.CLAMPED and float(fields.get(f"{arch}.attention.clamp_kqv", 0.0)) > 0:
        layer.why_not |= dict.fromkeys(("V", "K"), "large values of Q, K and V are cut off")
    if any(name.startswith("attn_") and name.endswith(".scale") and tensor.ne != (1,) for name, tensor in layer.tensors.items()):
        layer.why_not |= dict.fromkeys(("V", "K"), "its weights have several scales")
    if ("attn_q_norm.weight" in layer.tensors) != ("attn_k_norm.weight" in layer.tensors):
        layer.why_not.setdefault("K", "only one of Q and K has a norm")
    if any(not _is_norm_of(layer, side) for side in "qk"):
        layer.why_not.setdefault("K", "its norms have another shape")
    if not layer.attention.keys:
        layer.why_not.setdefault("K", "K and Q are normed without weights")
    if "V" not in layer.why_not:
        for name in (layer.weight_of("v"), "attn_output.weight"):
            kind = layer.tensors[name].type_name
            if kind in FINE or (fallback and can_decode(kind)):
                continue
            hint = "name a type with --fallback" if can_decode(kind) else "the package gguf does not read it"
            layer.why_not.setdefault("V", f"{name} is {kind}, in which it would lose too much a second time: {hint}")
    if "V" not in layer.why_not and not _takes_means(layer):
        layer.why_not["means of V"] = "llama.cpp adds no bias to its output projection"


def _is_norm_of(layer: AttentionLayer, side: str) -> bool:
    """Whether a norm of Q or K, if there is one, has a weight for each channel of a head, or of all heads."""
    norm = layer.tensors.get(f"attn_{side}_norm.weight")
    rows, size = layer.heads.rows[side], layer.heads.size_k
    return norm is None or norm.ne in ((size,), (rows,), (size, rows // size))


def _takes_means(layer: AttentionLayer) -> bool:
    return "attn_sinks.weight" not in layer.tensors and layer.attention.output_bias


def _misfit(layer: AttentionLayer, output: Tensor | None) -> str:
    """Why the tensors are not those of plain attention; "": they are."""
    heads, tensors = layer.heads, layer.tensors
    if output is None:
        return "it has no attn_output.weight"
    if not heads.n_kv or not heads.n or output.ne[0] != heads.n * heads.size_v or heads.n % heads.n_kv:
        return f"attn_output.weight has {output.ne[0]} columns, no whole number of heads of {heads.size_v} for {heads.n_kv} KV heads"
    wanted = {"attn_qkv": sum(heads.rows.values())} if layer.is_merged else {f"attn_{side}": heads.rows[side] for side in "qkv"}
    for name, rows in wanted.items():
        if f"{name}.weight" not in tensors:
            return f"it has no {name}.weight"
        ne = tensors[f"{name}.weight"].ne
        if len(ne) != 2 or ne[1] != rows:
            return f"{name}.weight is {list(ne)}, its heads need {rows} rows"
    return ""
