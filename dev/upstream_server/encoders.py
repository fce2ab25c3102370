"""Small BERT models: one for embeddings, untrained, and one that ranks texts by the words that are in them. They have no KV cache."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from upstream_server.gguf_file import Array, finish, ones

SPACE = "\u2581"
N_EMBD, N_HEAD, N_FF, N_CTX = 128, 2, 256, 512
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[]_`{|}~"
TELLING = ("machine", "learn", "artificial", "intelligence", "algorithms")
"""Words that make a text relevant to the reranker."""

WORDS = (
    "i",
    "believe",
    "the",
    "meaning",
    "of",
    "life",
    "is",
    "this",
    "a",
    "test",
    "hello",
    "which",
    "city",
    "capital",
    "de",
    "la",
    *TELLING,
)
ENDINGS = ("ing",)
RELEVANT = (0, 1)  # channels: what is added to one is taken from the other, as a layer norm wants it


def write_embedder(path: Path) -> Path:
    """Write the model for embeddings."""
    rng = np.random.default_rng(3)
    tensors = embeddings(rng) | layer(0, rng) | layer(1, rng)
    return finish(writer(path, "tiny embedder", layers=2, pooling=gguf.PoolingType.CLS), tensors, path)


def write_reranker(path: Path) -> Path:
    """Write the reranker: attention takes the mean over a text, and its first token is asked how many telling words there are."""
    rng = np.random.default_rng(4)
    tensors = embeddings(rng)
    tensors["token_embd.weight"][:, RELEVANT] = 0
    for word in TELLING:
        tensors["token_embd.weight"][_pieces().index(SPACE + word), RELEVANT] = (8, -8)
    block = layer(0, rng)
    relevance = np.zeros((N_EMBD, N_EMBD), np.float32)
    relevance[RELEVANT, RELEVANT] = 1
    block |= {"blk.0.attn_q.weight": relevance * 0, "blk.0.attn_v.weight": relevance * 4, "blk.0.attn_output.weight": relevance * 4}
    head = {"cls.weight": relevance * 0.1, "cls.bias": np.zeros(N_EMBD, np.float32)}
    out = np.zeros((1, N_EMBD), np.float32)
    out[0, RELEVANT] = (1, -1)
    head |= {"cls.output.weight": out, "cls.output.bias": np.zeros(1, np.float32)}
    return finish(writer(path, "tiny reranker", layers=1, pooling=gguf.PoolingType.RANK), tensors | block | head, path)


def _pieces() -> list[str]:
    """The vocabulary: SPACE stands before what begins a word."""
    return [*SPECIAL, *(SPACE + word for word in WORDS if len(word) > 1), *(SPACE + c for c in CHARACTERS), *CHARACTERS, *ENDINGS]


def writer(path: Path, name: str, *, layers: int, pooling: gguf.PoolingType) -> gguf.GGUFWriter:
    """Begin a model, with its tokenizer."""
    new = gguf.GGUFWriter(path, "bert")
    new.add_name(name)
    new.add_context_length(N_CTX)
    new.add_embedding_length(N_EMBD)
    new.add_block_count(layers)
    new.add_feed_forward_length(N_FF)
    new.add_head_count(N_HEAD)
    new.add_layer_norm_eps(1e-12)
    new.add_causal_attention(False)
    new.add_pooling_type(pooling)
    pieces = _pieces()
    new.add_tokenizer_model("bert")
    new.add_token_list(pieces)
    new.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(pieces) - len(SPECIAL)))
    new.add_token_type_count(2)
    new.add_vocab_size(len(pieces))
    for kind, piece in (("padding", "[PAD]"), ("unknown", "[UNK]"), ("bos", "[CLS]"), ("eos", "[SEP]"), ("seperator", "[SEP]")):
        new.add_uint32(f"tokenizer.ggml.{kind}_token_id", SPECIAL.index(piece))
    new.add_add_bos_token(True)
    new.add_add_eos_token(True)
    new.add_bool("tokenizer.ggml.add_sep_token", False)
    return new


def embeddings(rng: np.random.Generator) -> dict[str, Array]:
    """What stands before the layers."""
    return {
        "token_embd.weight": rng.standard_normal((len(_pieces()), N_EMBD)).astype(np.float32),
        "token_types.weight": np.zeros((2, N_EMBD), np.float32),
        "position_embd.weight": (rng.standard_normal((N_CTX, N_EMBD)) * 0.3).astype(np.float32),
        "token_embd_norm.weight": ones(N_EMBD),
        "token_embd_norm.bias": np.zeros(N_EMBD, np.float32),
    }


def layer(il: int, rng: np.random.Generator) -> dict[str, Array]:
    """One layer, untrained."""

    def matrix(rows: int, cols: int) -> Array:
        return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)

    found = {f"{name}.weight": matrix(N_EMBD, N_EMBD) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    found |= {f"{name}.bias": np.zeros(N_EMBD, np.float32) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")}
    found |= {
        "ffn_up.weight": matrix(N_FF, N_EMBD),
        "ffn_up.bias": np.zeros(N_FF, np.float32),
        "ffn_down.weight": matrix(N_EMBD, N_FF) * 0.3,
    }
    for norm in ("attn_output_norm", "layer_output_norm"):
        found |= {f"{norm}.weight": ones(N_EMBD), f"{norm}.bias": np.zeros(N_EMBD, np.float32)}
    return {f"blk.{il}.{name}": values for name, values in found.items()}
