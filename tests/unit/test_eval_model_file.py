"""The shipped evaluation model: size, metadata, tensors and tokenizer, read with gguf-py."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize

import turbo_gguf

FOLDER = Path(turbo_gguf.__file__).parent / "data" / "model"
MODEL = FOLDER / "eval-model.gguf"


@cache
def reader() -> GGUFReader:
    return GGUFReader(str(MODEL))


def value(key: str) -> object:
    field = reader().get_field(key)
    assert field is not None, key
    return field.contents()


def test_file_is_small() -> None:
    assert MODEL.stat().st_size <= 12_000_000


def test_model_card_names_this_file() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() in card


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("general.architecture", "llama"),
        ("general.license", "MIT"),
        ("llama.block_count", 4),
        ("llama.context_length", 4096),
        ("llama.embedding_length", 384),
        ("llama.feed_forward_length", 1024),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 128),
        ("llama.attention.value_length", 128),
        ("llama.rope.dimension_count", 128),
        ("llama.vocab_size", 4096),
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_space_prefix", False),
        ("tokenizer.chat_template", "{% for message in messages %}{{ message['content'] }}{% endfor %}"),
    ],
)
def test_metadata(key: str, expected: object) -> None:
    assert value(key) == expected


def test_vocabulary() -> None:
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(set(tokens)) == len(types) == 4096
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.BYTE] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_tensors() -> None:
    shapes = {t.name: (tuple(int(n) for n in t.shape), t.tensor_type) for t in reader().tensors}
    q8_0, f32 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
    assert len(shapes) == 2 + 4 * 9
    assert "output.weight" not in shapes  # tied to token_embd
    assert shapes["token_embd.weight"] == ((384, 4096), q8_0)
    assert shapes["output_norm.weight"] == ((384,), f32)
    assert shapes["blk.3.attn_q.weight"] == ((384, 512), q8_0)
    assert shapes["blk.3.attn_k.weight"] == ((384, 256), q8_0)
    assert shapes["blk.3.attn_output.weight"] == ((512, 384), q8_0)
    assert shapes["blk.3.ffn_down.weight"] == ((1024, 384), q8_0)


def test_weights_are_finite_and_trained() -> None:
    for tensor in reader().tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weight).all(), tensor.name
        assert 0.0 < np.abs(weight).max() < 100.0, tensor.name
