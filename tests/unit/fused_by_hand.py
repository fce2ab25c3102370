"""Attention layers in numpy, from the tensors of a file, and files of all kinds of them: what a fold must not change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import tiny_gguf

from turbo_gguf.cache.calibration import LayerCalibration
from turbo_gguf.inputs.gguf_file import GgufFile

N_EMBD, N_HEAD, N_KV, SIZE = 256, 4, 2, 64

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """K, V ``[token, n_head_kv, channel]`` before RoPE, and the output ``[token, n_embd]``."""

    k: Array
    v: Array
    out: Array


def attention(model: GgufFile, number: int, x: Array) -> Seen:
    """What a layer makes of inputs ``[token, n_embd]``."""
    arch = model.fields["general.architecture"]
    has = {
        t.name.removeprefix(f"blk.{number}."): t.values().astype(np.float64) for t in model.tensors if t.name.startswith(f"blk.{number}.")
    }
    n, n_kv = (int(model.fields[f"{arch}.attention.{key}"]) for key in ("head_count", "head_count_kv"))
    size = has["attn_output.weight"].shape[1] // n
    rows = {"q": n * size, "k": n_kv * size, "v": n_kv * size}
    start, sides = 0, {}
    for side, count in rows.items():
        part = slice(start, start + count)
        start += count
        merged = "attn_qkv.weight" in has
        y = x @ (has["attn_qkv.weight"][part] if merged else has[f"attn_{side}.weight"]).T
        if "attn_qkv.bias" in has:
            y = y + has["attn_qkv.bias"][part]
        heads = (y + has.get(f"attn_{side}.bias", 0.0)).reshape(len(x), -1, size)
        if f"attn_{side}_norm.weight" in has:
            heads = heads / np.sqrt(np.square(heads).mean(-1, keepdims=True)) * has[f"attn_{side}_norm.weight"]
        sides[side] = heads
    found = scores(sides["q"], sides["k"], "norm" if arch == "llama" else "neox", size) / np.sqrt(size)
    found = np.where(np.tri(len(x), dtype=bool), found, -np.inf)
    weights = np.exp(found - found.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khc->qhc", weights, np.repeat(sides["v"], n // n_kv, axis=1)).reshape(len(x), -1)
    return Seen(sides["k"], sides["v"], mixed @ has["attn_output.weight"].T + has.get("attn_output.bias", 0.0))


def scores(q: Array, k: Array, layout: str | None, n_rot: int) -> Array:
    """Of queries ``[token, n_head, channel]`` and keys ``[token, n_head_kv, channel]`` behind RoPE: ``[head, query, key]``."""
    turned_q, turned_k = (turned(x, layout, n_rot) for x in (q, k))
    return np.einsum("qhc,khc->hqk", turned_q, np.repeat(turned_k, q.shape[1] // k.shape[1], axis=1))


def turned(x: Array, layout: str | None, n_rot: int) -> Array:
    """RoPE by the position of a token."""
    if layout is None:
        return x
    pair = np.arange(n_rot // 2)
    a, b = (pair, pair + n_rot // 2) if layout == "neox" else (2 * pair, 2 * pair + 1)
    turns = np.exp(1j * np.outer(np.arange(len(x)), 100.0 ** (-pair / max(len(pair), 1))))[:, None]
    both = (x[..., a] + 1j * x[..., b]) * turns
    res = x.copy()
    res[..., a], res[..., b] = both.real, both.imag
    return res


def stored_k(k: Array, layer: LayerCalibration) -> Array:
    """As llama.cpp stores it, of keys without RoPE."""
    centered = k if layer.k_mean is None else k - layer.k_mean
    if layer.k_map is not None:
        return np.einsum("hij,thj->thi", layer.k_map, centered)
    return centered if layer.k_scale is None else centered * layer.k_scale


def random_layer(rng: np.random.Generator, n_kv: int, size_k: int, size_v: int, *, maps: bool) -> LayerCalibration:
    """Any numbers are right."""
    scale = np.exp(rng.normal(size=(n_kv, size_k)))
    stored = scale[:, :, None] * (np.eye(size_k) + rng.normal(size=(n_kv, size_k, size_k)) / (4 * np.sqrt(size_k)))
    v_scale = np.exp(rng.normal(size=(n_kv, size_v)) / 2)
    return LayerCalibration(
        k_mean=_f32(rng.normal(size=(n_kv, size_k))),
        k_scale=None if maps else _f32(scale),
        k_map=_f32(stored) if maps else None,
        q_map=_f32(np.linalg.inv(stored).swapaxes(1, 2)) if maps else None,
        v_mean=_f32(rng.normal(size=(n_kv, size_v))),
        v_scale=_f32(v_scale),
    )


def _f32(values: Array) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def write(path: Path, kind: str, *, arch: str = "llama", type_name: str = "F32", clamp: float = 0.0) -> Path:
    """A model of two layers: ``plain``, with ``biases``, with ``merged`` QKV, with ``norms`` of Q and K, ``split``, or ``gated``."""
    if kind == "split":
        return tiny_gguf.write(path, head=SIZE, n_head=N_HEAD, n_head_kv=N_KV, split=7)
    rng = np.random.default_rng(3)
    n_embd = N_EMBD
    w = gguf.GGUFWriter(path, arch)
    w.add_name("made")
    for key, value in {
        "context_length": 128,
        "embedding_length": n_embd,
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_KV,
        "attention.key_length": SIZE,
        "attention.value_length": SIZE,
        **({"attention.kv_lora_rank": 8} if arch == "deepseek2" else {}),
    }.items():
        w.add_uint32(f"{arch}.{key}", value)
    if clamp:
        w.add_float32(f"{arch}.attention.clamp_kqv", clamp)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.normal(size=(rows, columns)) / np.sqrt(columns)
        _add(w, f"{name}.weight", values.astype(np.float32), type_name)

    w.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    for i in range(2):
        block, rows = f"blk.{i}.attn", {"q": N_HEAD * SIZE, "k": N_KV * SIZE, "v": N_KV * SIZE}
        if kind == "merged":
            matrix(f"{block}_qkv", sum(rows.values()), n_embd)
            w.add_tensor(f"{block}_qkv.bias", rng.normal(size=sum(rows.values())).astype(np.float32))
        for side, count in () if kind == "merged" else rows.items():
            matrix(f"{block}_{side}", count * (2 if kind == "gated" and side == "q" else 1), n_embd)
            if kind == "biases":
                w.add_tensor(f"{block}_{side}.bias", rng.normal(size=count).astype(np.float32))
            if kind == "norms" and side != "v":
                w.add_tensor(f"{block}_{side}_norm.weight", rng.uniform(0.5, 1, SIZE).astype(np.float32))
        matrix(f"{block}_output", n_embd, N_HEAD * SIZE)
        w.add_tensor(f"{block}_norm.weight", np.ones(n_embd, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _add(w: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32], type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in ("F32", "F16"):
        w.add_tensor(name, values.astype(np.float16 if type_name == "F16" else np.float32))
    elif type_name == "Q4_K":  # which gguf does not write
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(len(name)).integers(0, 256, (len(values), values.shape[1] // block, size), np.uint8)
        data[..., :4] = np.array([0.01, 0.02], "<f2").view(np.uint8)
        w.add_tensor(name, data.reshape(len(values), -1), raw_dtype=kind)
    else:
        w.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
