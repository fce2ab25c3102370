"""What is folded into each layer, and the tensors that come of it. They are computed when they are written, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbo_gguf.cache.calibration import Floats, LayerCalibration
from turbo_gguf.errors import UsageError
from turbo_gguf.fuse import architectures as known
from turbo_gguf.fuse.algebra import Array, Exponents, ValueFold, key_exponents, of_queries, scaled, value_fold
from turbo_gguf.fuse.layer import AttentionLayer, look, refuse
from turbo_gguf.fuse.mixing import mixing
from turbo_gguf.fuse.rows import FINE, NotExact, Rows, row_bytes
from turbo_gguf.inputs.gguf_file import Fields, GgufFile, Tensor
from turbo_gguf.plan.shape import shape_of

LARGEST_MAP = 256
"""Largest head size of K that gets maps: llama.cpp's own calibrations have scales beyond it, too."""

NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")


@dataclass(frozen=True)
class Made:
    """A tensor as it will be: its type, its shape in ggml's order, and its bytes."""

    name: str
    type_name: str
    ne: tuple[int, ...]
    data: Callable[[], bytes]

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        rows = int(np.prod(self.ne[1:])) if len(self.ne) > 1 else 1
        return rows * row_bytes(self.type_name, self.ne[0])


@dataclass
class LayerFold:
    """What is folded into a layer; ``None``: nothing."""

    layer: AttentionLayer
    given: LayerCalibration
    value: ValueFold | None = None
    keys: Exponents | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether K gets maps, which rotate it."""
        return self.given.k_map is not None or self.layer.heads.size_k <= LARGEST_MAP

    def left(self) -> LayerCalibration:
        """The calibration of the layer as it will be: without what is folded, and with the rotation of K in its maps."""
        given, heads = self.given, self.layer.heads
        scale = np.ldexp(1.0, self.keys) if self.keys is not None else np.ones((heads.n_kv, heads.size_k))
        k_scale, k_map, q_map = None if given.k_scale is None else _floats(given.k_scale / scale), None, None
        if self.is_mapped:
            stored, read = maps_of(given, heads.n_kv, heads.size_k)
            turn = mixing(heads.size_k)
            k_scale, k_map, q_map = None, _floats(turn @ (stored / scale[:, None])), _floats(turn @ (read * scale[:, None]))
        v_mean, v_scale = given.v_mean, given.v_scale
        if self.value is not None:
            v_scale = None
            if v_mean is not None:
                v_mean = _floats((v_mean * self.value.scale) @ mixing(heads.size_v).T) if self.value.mean is None else None
        k_mean = None if given.k_mean is None else _floats(given.k_mean * scale)
        return LayerCalibration(k_mean, k_scale, k_map, q_map, v_mean, v_scale)


def _floats(values: npt.NDArray[np.floating]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def maps_of(given: LayerCalibration, n_kv: int, size: int) -> tuple[Array, Array]:
    """Maps of K and of Q ``[n_head_kv, to, from]``: those of a calibration, its scales, or the identity."""
    if given.k_map is not None and given.q_map is not None:
        return given.k_map.astype(np.float64), given.q_map.astype(np.float64)
    scale = np.ones((n_kv, size)) if given.k_scale is None else given.k_scale.astype(np.float64)
    return scale[:, :, None] * np.eye(size), np.eye(size) / scale[:, :, None]


def attending(model: GgufFile, fallback: str | None) -> list[AttentionLayer]:
    """The layers of a model that have a KV cache, and what each of them can't have.

    Raises:
        UsageError: an architecture whose attention is not known here, or is latent.
    """
    shape = shape_of(model.fields, model.tensors)
    arch = shape.arch
    if shape.latent or arch not in known.KNOWN:
        why = "it has multi-head latent attention" if shape.latent else "what lies between its projections is not known here"
        raise UsageError(f"architecture {arch} can't be fused: {why}", "docs/guides/fuse.md names those that can")
    of_layer: dict[int, dict[str, Tensor]] = {}
    for tensor in model.tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        if tensor.name.startswith("blk.") and block.isdecimal():
            of_layer.setdefault(int(block), {})[rest] = tensor
    found = [
        look(kv.number, (kv.heads, kv.head_k, kv.head_v), of_layer.get(kv.number, {}), known.KNOWN[arch])
        for cache in shape.caches
        for kv in cache.layers
    ]
    for layer in found:
        refuse(layer, model.fields, fallback)
    return sorted(found, key=lambda layer: layer.number)


def fold(layer: AttentionLayer, given: LayerCalibration, fields: Fields) -> LayerFold:
    """Choose what is folded into a layer."""
    res, heads = LayerFold(layer, given), layer.heads
    if "V" not in layer.why_not:
        scale = np.ones((heads.n_kv, heads.size_v)) if given.v_scale is None else given.v_scale
        res.value = value_fold(scale, None if "means of V" in layer.why_not else given.v_mean)
    if "K" not in layer.why_not and (given.k_map is not None or given.k_scale is not None):
        n_rot = _roped(fields, heads.size_k)
        if n_rot is None:
            layer.why_not["K"] = "RoPE covers other parts of a head in other layers"
            return res
        shared = any(layer.tensors[name].ne == (heads.size_k,) for name in _norms(layer) if heads.n > 1)
        exponents = key_exponents(maps_of(given, heads.n_kv, heads.size_k)[0], layer.pairs(n_rot), shared=shared)
        try:
            for side in "kq":
                _try_scaling(layer, side, exponents)
        except NotExact as error:
            layer.why_not["K"] = str(error)
        else:
            res.keys = exponents
    return res


def _norms(layer: AttentionLayer) -> list[str]:
    return [name for name in NORMS if name in layer.tensors]


def _roped(fields: Fields, size: int) -> int | None:
    """Channels of a head that RoPE turns; ``None``: that differs between layers."""
    arch = fields["general.architecture"]
    found = fields.get(f"{arch}.rope.dimension_count", size)
    near = fields.get(f"{arch}.rope.dimension_count_swa", found)
    return int(found) if isinstance(found, int) and near == found else None


def _exponents(layer: AttentionLayer, side: str, keys: Exponents) -> Exponents:
    return keys if side == "k" else of_queries(keys, layer.heads.n)


def _try_scaling(layer: AttentionLayer, side: str, keys: Exponents) -> None:
    """Scale rows and forget them.

    Raises:
        NotExact: it would lose something.
    """
    if f"attn_{side}_norm.weight" not in layer.tensors:
        rows = Rows.of(layer.tensors[layer.weight_of(side)])
        rows.multiply(layer.rows_of(side), _exponents(layer, side, keys).reshape(-1))


# --- tensors ------------------------------------------------------------------------------------------------------------------


def changed(found: LayerFold, fallback: str | None) -> Iterator[Made]:
    """The tensors of a layer that are other ones afterwards, and those that it has not had."""
    layer = found.layer
    if found.value is None and found.keys is None:
        return
    weights = {layer.weight_of(side) for side in "qkv" if (found.value if side == "v" else found.keys) is not None}
    for name in sorted(weights | ({"attn_output.weight"} if found.value is not None else set())):
        tensor = layer.tensors[name]
        is_encoded = found.value is not None and name in (layer.weight_of("v"), "attn_output.weight")
        kind = fallback if fallback and is_encoded and tensor.type_name not in FINE else tensor.type_name
        yield Made(tensor.name, kind, tensor.ne, lambda name=name, kind=kind: _weight(found, name, kind))  # type: ignore[misc]
    yield from _vectors(found)


def _weight(found: LayerFold, name: str, kind: str) -> bytes:
    """A matrix as it will be.

    Raises:
        UsageError: a value is too large for its type.
    """
    layer = found.layer
    try:
        rows = Rows.of(layer.tensors[name]).converted(kind)
        if name == "attn_output.weight":
            assert found.value is not None
            rows.replace(slice(None), found.value.columns(rows.values()))
            return rows.data.tobytes()
        if found.value is not None and name == layer.weight_of("v"):
            part = layer.rows_of("v")
            rows.replace(part, found.value.rows(rows.values(part)))
        for side in "qk":
            if found.keys is not None and name == layer.weight_of(side) and f"attn_{side}_norm.weight" not in layer.tensors:
                rows.multiply(layer.rows_of(side), _exponents(layer, side, found.keys).reshape(-1))
    except NotExact as error:
        raise UsageError(f"{layer.name(name)}: {error}", "leave the calibration out, or begin with a model in f32 or bf16") from error
    return rows.data.tobytes()


class _Vectors:
    """Biases and weights of norms of a layer, and those that are other ones afterwards, by name."""

    def __init__(self, layer: AttentionLayer) -> None:
        self._layer = layer
        named = {name: tensor for name, tensor in layer.tensors.items() if name.startswith("attn_")}
        self.before = {name: _values(tensor) for name, tensor in named.items() if name.endswith(".bias") or name in NORMS}
        self.after: dict[str, Array] = {}

    def edit(self, side: str, name: str, act: Callable[[Array], Array]) -> None:
        """Replace the part of a bias that is Q's, K's or V's."""
        values = self.after.get(name, self.before[name]).copy()
        part = self._layer.rows_of(side) if name == "attn_qkv.bias" else slice(None)
        values[part] = act(values[part])
        self.after[name] = values

    def scale(self, side: str, exponents: Exponents) -> None:
        """Multiply the weight of a norm of Q or K and its bias, or else the bias of the projection."""
        norm = f"attn_{side}_norm"
        bias = self._layer.bias_of(side)
        if f"{norm}.weight" in self.before:
            chosen = [f"{norm}.weight", *([f"{norm}.bias"] if f"{norm}.bias" in self.before else [])]
        else:
            chosen = [bias] if bias else []
        for name in chosen:
            self.edit(side, name, lambda values: scaled(values, exponents))

    def values(self, value: ValueFold) -> None:
        """Center and map the bias of V, and add what the means become in the output."""
        layer = self._layer
        name = layer.bias_of("v")
        if value.mean is not None:
            name = name or ("attn_qkv.bias" if layer.is_merged else "attn_v.bias")
            n_rows = sum(layer.heads.rows.values()) if name == "attn_qkv.bias" else value.mean.size
            self.before.setdefault(name, np.zeros(n_rows))
            constant = value.constant(Rows.of(layer.tensors["attn_output.weight"]).values())
            factor = _values(layer.tensors["attn_output.scale"]) if "attn_output.scale" in layer.tensors else 1.0
            self.after["attn_output.bias"] = self.before.get("attn_output.bias", 0.0) + constant * factor
        if name:
            self.edit("v", name, value.bias)


def _vectors(found: LayerFold) -> Iterator[Made]:
    """Biases, and weights of norms."""
    layer, vectors = found.layer, _Vectors(found.layer)
    if found.keys is not None:
        for side in "qk":
            vectors.scale(side, _exponents(layer, side, found.keys))
    if found.value is not None:
        vectors.values(found.value)
    for name, values in vectors.after.items():
        ne = layer.tensors[name].ne if name in layer.tensors else (values.size,)
        yield Made(layer.name(name), "F32", ne, _floats(values).tobytes)


def _values(tensor: Tensor) -> Array:
    return tensor.values().astype(np.float64).reshape(-1)
