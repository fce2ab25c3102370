"""A model of random weights in the shape of an 8B one, with few layers: for speed and memory at depth, where quality does not matter.

python scripts/bench/bench_model.py MODEL.gguf --layers 4       # 1.8 GB: 32 heads, 8 KV heads, head size 128
python scripts/bench/bench_model.py MODEL.gguf --layers 28 --gqa 2 --n-embd 1024 --feed-forward 3072 --weights q4_0    # a 0.6B one, 250 MB
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

N_VOCAB = 259  # <unk>, <s>, </s> and the 256 bytes
HEAD = 128
GQA = 4

WEIGHTS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}

Array = npt.NDArray[np.float16]


def write(
    path: Path, *, layers: int, kv_heads: int = 8, gqa: int = GQA, n_embd: int = 0, feed_forward: int = 14336, weights: str = "f16"
) -> None:
    """Write the model; the same arguments give the same bytes. ``n_embd`` 0: that of all heads; ``weights``: a key of ``WEIGHTS``."""
    q_size, kv_size = HEAD * kv_heads * gqa, HEAD * kv_heads
    n_embd = n_embd or q_size
    kind, file_type = WEIGHTS[weights]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random weights, {layers} layers" + (f", {weights.upper()}" if weights != "f16" else ""))
    _metadata(writer, layers=layers, kv_heads=kv_heads, gqa=gqa, n_embd=n_embd, feed_forward=feed_forward)
    if weights != "f16":
        writer.add_file_type(file_type)
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float16)

    def matrix(name: str, rows: int, cols: int) -> None:
        block = (values * np.float16(1 / np.sqrt(cols))).astype(np.float16)
        if weights == "f16":
            writer.add_tensor(f"{name}.weight", np.resize(block, (rows, cols)))  # repeats the values
        else:
            data = gguf.quants.quantize(block.astype(np.float32), kind)
            shape = gguf.quants.quant_shape_to_byte_shape((rows, cols), kind)
            writer.add_tensor(f"{name}.weight", np.resize(data, shape), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))

    matrix("token_embd", N_VOCAB, n_embd)
    matrix("output", N_VOCAB, n_embd)
    norm("output_norm")
    for il in range(layers):
        block = f"blk.{il}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", q_size, n_embd)
        matrix(f"{block}.attn_k", kv_size, n_embd)
        matrix(f"{block}.attn_v", kv_size, n_embd)
        matrix(f"{block}.attn_output", n_embd, q_size)
        matrix(f"{block}.ffn_gate", feed_forward, n_embd)
        matrix(f"{block}.ffn_up", feed_forward, n_embd)
        matrix(f"{block}.ffn_down", n_embd, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: gguf.GGUFWriter, *, layers: int, kv_heads: int, gqa: int, n_embd: int, feed_forward: int) -> None:
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(kv_heads * gqa)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_vocab_size(N_VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--gqa", type=int, default=GQA, help="query heads of each KV head")
    parser.add_argument("--n-embd", type=int, default=0, help="0: that of all heads")
    parser.add_argument("--feed-forward", type=int, default=14336)
    parser.add_argument("--weights", choices=WEIGHTS, default="f16")
    write(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
