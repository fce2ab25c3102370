"""Checkpoint -> GGUF (q8_0 matrices, f32 norms), and the measured quality of that GGUF."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from .model import Config, Llama
from .tokens import BOS, EOS
from .training import nll_per_token, read_stream, with_bos

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The bare text: llama-cli and llama-server wrap messages in a template, and this model only continues files."""


def _add_tokenizer(writer: GGUFWriter, model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces, scores, types = [], [], []
    for i in range(processor.vocab_size()):
        kind = TokenType.NORMAL
        if processor.is_unknown(i):
            kind = TokenType.UNKNOWN
        elif processor.is_control(i):
            kind = TokenType.CONTROL
        elif processor.is_byte(i):
            kind = TokenType.BYTE
        pieces.append(processor.id_to_piece(i).encode("utf-8"))
        scores.append(processor.get_score(i))
        types.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_sizes(writer: GGUFWriter, config: Config, name: str) -> None:
    writer.add_name(name)
    writer.add_description("Small Llama trained on the Python standard library; measures KV-cache types")
    writer.add_license("MIT")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_vocab_size(config.vocab)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(2)


def export(work: Path, out: Path, name: str) -> None:
    """Write the checkpoint and the tokenizer in ``work`` to the GGUF file ``out``, under the name ``name``."""
    blob = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(str(out), "llama")
    _add_sizes(writer, Config(**blob["config"]), name)
    _add_tokenizer(writer, (work / "tokenizer.model").read_bytes())
    for tensor, weight in blob["weights"].items():
        data = weight.float().numpy()
        if data.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor, quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(reader: GGUFReader) -> Config:
    """The inverse of :func:`_add_sizes`."""

    def get(name: str) -> Any:
        field = reader.get_field(f"llama.{name}")
        assert field is not None
        return field.contents()

    return Config(
        vocab=get("vocab_size"),
        width=get("embedding_length"),
        layers=get("block_count"),
        heads=get("attention.head_count"),
        kv_heads=get("attention.head_count_kv"),
        head_size=get("attention.key_length"),
        ff=get("feed_forward_length"),
        rope_base=get("rope.freq_base"),
        eps=get("attention.layer_norm_rms_epsilon"),
        context=get("context_length"),
    )


def load(path: Path) -> Llama:
    """Return the model in the GGUF file ``path`` with its weights dequantized, ready to run."""
    reader = GGUFReader(str(path))
    weights = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)) for t in reader.tensors}
    model = Llama(_sizes(reader))
    model.load_state_dict(weights)
    return model.eval()


def unigram_nll(train: NDArray[np.uint16], held_out: NDArray[np.uint16], vocab: int) -> float:
    """Return nats per token of add-one token frequencies of ``train`` on ``held_out``."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def evaluate(work: Path, path: Path, lengths: tuple[int, ...], chunks: int | None) -> list[str]:
    """Return lines with the held-out perplexity of the GGUF ``path`` at several chunk lengths."""
    held_out = read_stream(work, "heldout")
    model = load(path)
    base = unigram_nll(read_stream(work, "library"), held_out, model.config.vocab)
    lines = [f"unigram: {base:.4f} nats per token, perplexity {math.exp(base):.1f}"]
    for length in lengths:
        nll = nll_per_token(model, with_bos(held_out), length, chunks)
        lines.append(f"{length}: {nll:.4f} nats per token, perplexity {math.exp(nll):.4f}")
    return lines
