"""Tiny untrained models as GGUF: one per shape of a KV cache that llama.cpp has to get right.

Their text is noise, but their caches are real ones: queries and keys are large enough that attention is peaked, so the logits
depend on what is cached and where; and a few channels of K and V are much larger than the others (as in trained models),
so a cache that quantizes without rotation is measurably worse.

The same arguments give the same bytes. ``python tests/llama/tiny_models.py FOLDER`` writes all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

N_VOCAB = 259  # <unk>, <s>, </s> and the 256 bytes
N_CTX = 1024
N_FF = 256
N_HEAD = 4
N_HEAD_KV = 2
N_CONV = 3  # tokens that a convolution sees
QK_GAIN = 1.25  # standard deviation of the values of Q and K: scores then have 1.25^2
OUTLIER = 6.0  # how much larger the outlier channels of K and V are
OUTLIER_EVERY = 64  # one pair of outlier channels in so many

Array = npt.NDArray[np.float32]
Matrix = Callable[..., Array]


@dataclass(frozen=True)
class Shape:
    """What distinguishes the cache of one model from another's."""

    arch: str
    head_k: int
    head_v: int
    n_rot: int
    n_layer: int = 2
    n_embd: int = 128
    window: int = 0  # sliding window; layers alternate
    attention: tuple[int, ...] = ()  # layers with attention, if not all: the others are convolutions
    bias: float = 0.0  # of K in the slowest RoPE pairs; those of Q and V are small
    sinks: bool = False  # scores that are compared with those of the tokens
    ranks: bool = False  # texts, by what is behind the last layer
    heads: tuple[tuple[int, int], ...] = ()  # of Q and of KV by layer, if not N_HEAD and N_HEAD_KV

    @property
    def neox(self) -> bool:
        """Whether RoPE pairs channel i with i + n_rot/2, instead of 2i with 2i + 1."""
        return self.arch not in ("llama", "deci")

    def attends(self, il: int) -> bool:
        """Whether a layer has a KV cache."""
        return not self.attention or il in self.attention

    def n_heads(self, il: int) -> tuple[int, int]:
        """Heads of Q and of KV in a layer."""
        return self.heads[il] if self.heads else (N_HEAD, N_HEAD_KV if self.attends(il) else 0)


def _llama(head: int) -> Shape:
    return Shape("llama", head, head, head)


def _partial_rope(head: int, n_rot: int) -> Shape:
    return Shape("stablelm", head, head, n_rot, n_embd=N_HEAD * head)


SHAPES = {
    **{f"head{head}": _llama(head) for head in (64, 80, 96, 112, 128, 192, 256)},
    "head192-128": Shape("mimo2", 192, 128, 64, window=32),
    "partial64": _partial_rope(64, 32),
    "partial96": _partial_rope(96, 48),
    "partial128": _partial_rope(128, 32),
    "swa": Shape("gemma2", 128, 128, 128, window=32),
    "layers4": Shape("llama", 64, 64, 64, n_layer=4, n_embd=64),
    "layers12": Shape("llama", 64, 64, 64, n_layer=12, n_embd=64),
    "layers28": Shape("llama", 64, 64, 64, n_layer=28, n_embd=64),
    "swa6": Shape("gemma2", 64, 64, 64, n_layer=6, window=32),
    "bias": Shape("qwen2", 64, 64, 64, n_embd=N_HEAD * 64, bias=20.0),
    "qk-norm": Shape("qwen3", 128, 128, 128),
    "ranks": Shape("qwen3", 64, 64, 64, ranks=True),
    "sinks": Shape("mimo2", 64, 64, 32, window=32, sinks=True),
    "hybrid": Shape("lfm2", 64, 64, 64, n_layer=6, n_embd=N_HEAD * 64, attention=(1, 2, 4)),
    "one-kv-head": Shape("llama", 64, 64, 64, heads=((4, 1),) * 2),
    "heads-differ": Shape("deci", 64, 64, 64, n_layer=3, heads=((4, 2), (2, 1), (8, 4))),
    "many-heads": Shape("llama", 256, 256, 256, n_layer=1, heads=((16, 8),)),
}
"""By name: head sizes of a plain Llama; K and V heads of different sizes; RoPE on a part of the head; sliding windows; more layers; biases;
norms of Q and K; the same with a head that ranks texts; attention sinks; layers without a KV cache; one KV head; other numbers of heads
in each layer; more channels of V than a calibration projects one by one.
"""


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model ``name`` of :data:`SHAPES` into a folder and return its path."""
    shape = SHAPES[name]
    path = folder / f"tiny-{name}.gguf"
    writer = gguf.GGUFWriter(path, shape.arch)
    _metadata(writer, name, shape)
    _vocabulary(writer)
    for tensor, values in _tensors(shape, np.random.default_rng(seed)).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def truncated(model: Path, folder: Path, keep: float = 0.6) -> Path:
    """Write a copy that lacks its end, as an interrupted download does."""
    data = model.read_bytes()
    path = folder / f"truncated-{model.name}"
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def _metadata(w: gguf.GGUFWriter, name: str, shape: Shape) -> None:
    w.add_name(f"tiny {name}")
    w.add_context_length(N_CTX)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(shape.n_layer)
    w.add_feed_forward_length(N_FF)
    n_head, n_head_kv = zip(*(shape.n_heads(il) for il in range(shape.n_layer)), strict=True)
    w.add_head_count(n_head[0] if len(set(n_head)) == 1 else list(n_head))
    w.add_head_count_kv(n_head_kv[0] if len(set(n_head_kv)) == 1 else list(n_head_kv))
    w.add_key_length(shape.head_k)
    w.add_value_length(shape.head_v)
    w.add_rope_dimension_count(shape.n_rot)
    w.add_rope_freq_base(10000.0)
    if shape.arch == "stablelm":
        w.add_layer_norm_eps(1e-5)
    else:
        w.add_layer_norm_rms_eps(1e-6)
    if shape.window:
        w.add_sliding_window(shape.window)
    if shape.ranks:
        w.add_classifier_output_labels(["yes", "no"])
    if shape.arch == "lfm2":
        w.add_shortconv_l_cache(N_CONV)
    if shape.arch == "mimo2":
        w.add_sliding_window_pattern([il % 2 == 1 for il in range(shape.n_layer)])
        w.add_expert_feed_forward_length(N_FF)


def _vocabulary(w: gguf.GGUFWriter) -> None:
    kinds = gguf.TokenType
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    w.add_token_scores([0.0] * N_VOCAB)
    w.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    w.add_vocab_size(N_VOCAB)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)


def _tensors(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    """Every matrix keeps the size of its input's values, so that no layer drowns the others."""
    n_embd, n_ff = shape.n_embd, N_FF

    def matrix(rows: int, cols: int, gain: float = 1.0) -> Array:
        return (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float32)

    embedding = matrix(N_VOCAB, n_embd, gain=1.0 if shape.arch == "gemma2" else float(np.sqrt(n_embd)))
    tensors = {"token_embd.weight": embedding, **_norm("token_embd_norm" if shape.arch == "lfm2" else "output_norm", shape)}
    if shape.arch != "gemma2":  # which uses the embedding again
        tensors["output.weight"] = matrix(N_VOCAB, n_embd, gain=2.0)
    if shape.ranks:
        tensors["cls.output.weight"] = matrix(2, n_embd, gain=2.0)
    for il in range(shape.n_layer):
        block = f"blk.{il}"
        tensors |= _norm(f"{block}.attn_norm", shape) | _norm(f"{block}.ffn_norm", shape)
        if shape.arch == "gemma2":
            tensors |= _norm(f"{block}.post_attention_norm", shape) | _norm(f"{block}.post_ffw_norm", shape)
        tensors |= _attention(il, shape, matrix) if shape.attends(il) else _convolution(block, shape, matrix)
        tensors[f"{block}.ffn_gate.weight"] = matrix(n_ff, n_embd)
        tensors[f"{block}.ffn_up.weight"] = matrix(n_ff, n_embd)
        tensors[f"{block}.ffn_down.weight"] = matrix(n_embd, n_ff)
    return tensors


def _attention(il: int, shape: Shape, matrix: Matrix) -> dict[str, Array]:
    """Queries, keys, values and the output projection of one layer."""
    block, n_embd, (scale_k, scale_v) = f"blk.{il}", shape.n_embd, _outliers(shape)
    n_head, n_head_kv = shape.n_heads(il)
    normed = shape.arch in ("lfm2", "qwen3")  # Q and K get their size from a norm behind the matrix
    gain, scale = (1.0, np.ones_like(scale_k)) if normed else (QK_GAIN, scale_k)
    tensors = {
        "attn_q": matrix(n_head * shape.head_k, n_embd, gain) / np.tile(scale, n_head)[:, None],
        "attn_k": matrix(n_head_kv * shape.head_k, n_embd, gain) * np.tile(scale, n_head_kv)[:, None],
        "attn_v": matrix(n_head_kv * shape.head_v, n_embd, 2.0) * np.tile(scale_v, n_head_kv)[:, None],
        "attn_output": matrix(n_embd, n_head * shape.head_v) / np.tile(scale_v, n_head)[None, :],
    }
    if normed:
        tensors |= {"attn_q_norm": QK_GAIN / scale_k, "attn_k_norm": QK_GAIN * scale_k}
    found = {f"{block}.{name}.weight": values for name, values in tensors.items()}
    if shape.bias:
        found |= {f"{block}.{name}.bias": values for name, values in _biases(shape, matrix).items()}
    if shape.sinks:
        found[f"{block}.attn_sinks.weight"] = matrix(1, N_HEAD)[0]
    return found


def _biases(shape: Shape, matrix: Matrix) -> dict[str, Array]:
    k = matrix(N_HEAD_KV, shape.head_k)
    half = shape.n_rot // 2
    k[:, [half - 2, half - 1, 2 * half - 2, 2 * half - 1]] += shape.bias
    return {"attn_q": matrix(1, N_HEAD * shape.head_k)[0], "attn_k": k.reshape(-1), "attn_v": matrix(1, N_HEAD_KV * shape.head_v)[0]}


def _convolution(block: str, shape: Shape, matrix: Matrix) -> dict[str, Array]:
    """A layer that looks back a few tokens and needs no KV cache for it."""
    n_embd = shape.n_embd
    return {
        f"{block}.shortconv.conv.weight": matrix(n_embd, N_CONV),
        f"{block}.shortconv.in_proj.weight": matrix(3 * n_embd, n_embd),
        f"{block}.shortconv.out_proj.weight": matrix(n_embd, n_embd),
    }


def _norm(name: str, shape: Shape) -> dict[str, Array]:
    tensors = {f"{name}.weight": np.ones(shape.n_embd, np.float32)}
    if shape.arch == "stablelm":
        tensors[f"{name}.bias"] = np.zeros(shape.n_embd, np.float32)
    return tensors


def _outliers(shape: Shape) -> tuple[Array, Array]:
    """Factors of the channels of a K and of a V head; Q and the output projection are divided by them, so no score changes.

    Both channels of a RoPE pair get the same factor, as RoPE mixes them.
    """
    k, v = np.ones(shape.head_k, np.float32), np.ones(shape.head_v, np.float32)
    half = shape.n_rot // 2
    for start in range(3, half, OUTLIER_EVERY // 2):
        k[[start, start + half] if shape.neox else [2 * start, 2 * start + 1]] = OUTLIER
    v[5 :: OUTLIER_EVERY // 2] = OUTLIER
    return k, v


def main() -> None:
    """Write all models into the folder that is named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHAPES:
        print(write(name, folder))


if __name__ == "__main__":
    main()
