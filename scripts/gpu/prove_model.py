"""A GGUF model of random weights in the shape of an 8B one, with few layers: for speed and memory at depth. Standard library only."""

from __future__ import annotations

import random
import struct
from pathlib import Path

HEAD = 128
N_VOCAB = 259  # <unk>, <s>, </s> and the 256 bytes
ALIGNMENT = 32
_U32, _I32, _F32, _STRING, _ARRAY = 4, 5, 6, 8, 9  # of GGUF's values
_TENSOR_F32, _TENSOR_F16 = 0, 1
_PERIOD = 65537  # values after which weights repeat; not a multiple of any row, so that rows differ


def write(path: Path, *, layers: int, kv_heads: int, gqa: int, feed_forward: int) -> None:
    """Write the model; the same numbers give the same bytes. 4 layers, 8 KV heads, GQA 4 and 14336 are 1.8 GB."""
    width, kv_width = HEAD * kv_heads * gqa, HEAD * kv_heads
    tensors: list[tuple[str, tuple[int, ...]]] = [("token_embd", (width, N_VOCAB)), ("output", (width, N_VOCAB)), ("output_norm", (width,))]
    for layer in range(layers):
        shapes = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width, kv_width),
            "attn_v": (width, kv_width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (width, feed_forward),
            "ffn_up": (width, feed_forward),
            "ffn_down": (feed_forward, width),
        }
        tensors += [(f"blk.{layer}.{name}", shape) for name, shape in shapes.items()]
    values = _metadata(layers=layers, kv_heads=kv_heads, gqa=gqa, width=width, feed_forward=feed_forward)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)) + b"".join(values)
    offset = 0
    for name, shape in tensors:
        kind = _TENSOR_F32 if len(shape) == 1 else _TENSOR_F16
        head += _string(f"{name}.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += _padded(_bytes(shape))
    source = random.Random(0)
    normal = [source.gauss(0.0, 1.0) for _ in range(_PERIOD)]
    repeated = {columns: _repeated(normal, columns) for columns in (width, feed_forward)}
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for _, shape in tensors:
            if len(shape) == 1:
                file.write((struct.pack("<f", 1.0) * shape[0]).ljust(_padded(_bytes(shape)), b"\0"))
                continue
            block, left = repeated[shape[0]], _bytes(shape)
            while left > 0:
                file.write(block[:left])
                left -= len(block)
            file.write(b"\0" * (_padded(_bytes(shape)) - _bytes(shape)))


def _repeated(normal: list[float], columns: int) -> bytes:
    scale = columns**-0.5
    return struct.pack(f"<{len(normal)}e", *(scale * x for x in normal)) * 64


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * shape[0] if len(shape) == 1 else 2 * shape[0] * shape[1]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _metadata(*, layers: int, kv_heads: int, gqa: int, width: int, feed_forward: int) -> list[bytes]:
    numbers = {
        "llama.context_length": 1 << 20,
        "llama.embedding_length": width,
        "llama.block_count": layers,
        "llama.feed_forward_length": feed_forward,
        "llama.attention.head_count": kv_heads * gqa,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": HEAD,
        "llama.attention.value_length": HEAD,
        "llama.rope.dimension_count": HEAD,
        "llama.vocab_size": N_VOCAB,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    words = {"general.architecture": "llama", "general.name": f"random weights, {layers} layers", "tokenizer.ggml.model": "llama"}
    reals = {"llama.rope.freq_base": 500000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3, *[6] * 256]  # unknown, control, byte
    return [
        *(_string(key) + struct.pack("<I", _STRING) + _string(value) for key, value in words.items()),
        *(_string(key) + struct.pack("<II", _U32, value) for key, value in numbers.items()),
        *(_string(key) + struct.pack("<If", _F32, value) for key, value in reals.items()),
        _array("tokenizer.ggml.tokens", _STRING, b"".join(map(_string, tokens))),
        _array("tokenizer.ggml.scores", _F32, struct.pack(f"<{N_VOCAB}f", *[0.0] * N_VOCAB)),
        _array("tokenizer.ggml.token_type", _I32, struct.pack(f"<{N_VOCAB}i", *kinds)),
    ]


def _array(key: str, kind: int, data: bytes) -> bytes:
    return _string(key) + struct.pack("<IIQ", _ARRAY, kind, N_VOCAB) + data
