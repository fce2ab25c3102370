"""Writes a small random Llama as GGUF: enough for metadata tests and for making golden logs of real tools."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write(
    path: Path,
    *,
    head: int = 128,
    n_layer: int = 2,
    n_head: int = 2,
    n_head_kv: int = 1,
    ctx: int = 1024,
    seed: int = 0,
    split: int = 0,
    small_first: bool = False,
) -> Path:
    """Write a byte-level model. Its output is noise, but its cache is a real one.

    Returns the (first) file. ``split``: at most so many tensors in a file; ``small_first``: none in the first one.
    """
    rng = np.random.default_rng(seed)
    n_embd, n_ff, vocab = head * n_head, 2 * head * n_head, 259
    w = gguf.GGUFWriter(path, "llama", split_max_tensors=split, small_first_shard=small_first)
    w.add_name("tiny")
    w.add_context_length(ctx)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(head)
    w.add_vocab_size(vocab)
    w.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * vocab)
    w.add_token_types([gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)

    def tensor(name: str, *shape: int, gain: float = 1.0) -> None:
        w.add_tensor(name, (rng.standard_normal(shape) * gain / np.sqrt(shape[-1])).astype(np.float32))

    tensor("token_embd.weight", vocab, n_embd, gain=np.sqrt(n_embd))
    tensor("output.weight", vocab, n_embd, gain=2.0)
    w.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    for i in range(n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(n_embd, np.float32))
        tensor(f"blk.{i}.attn_q.weight", n_embd, n_embd, gain=1.5)
        tensor(f"blk.{i}.attn_k.weight", head * n_head_kv, n_embd, gain=1.5)
        tensor(f"blk.{i}.attn_v.weight", head * n_head_kv, n_embd, gain=2.0)
        tensor(f"blk.{i}.attn_output.weight", n_embd, n_embd)
        tensor(f"blk.{i}.ffn_gate.weight", n_ff, n_embd)
        tensor(f"blk.{i}.ffn_up.weight", n_ff, n_embd)
        tensor(f"blk.{i}.ffn_down.weight", n_embd, n_ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf")))) if split else path
