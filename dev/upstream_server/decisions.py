"""Small models that answer questions with given options: an encoder (laya), and a hybrid of attention and convolutions (openjev).

Both are untrained. The decoder is an LFM 2 here, and a Qwen 3.5 upstream: what matters is a recurrent state beside a KV cache, and that
questions share the beginning of a prompt. Images come through the projector of :mod:`upstream_server.vision`.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from upstream_server import encoders
from upstream_server.gguf_file import Array, describe, finish, ones
from upstream_server.vision import CONTROL, N_EMBD
from upstream_server.vocabulary import Vocabulary

HEAD, N_HEAD, N_HEAD_KV, N_FF, N_CTX, N_CONV = 64, 4, 2, 256, 4096, 3
ATTENDS = (1, 2, 4)
N_LAYER = 6
CHAT_CONTROL = ("<|im_start|>", "<|im_end|>")

STATE = "{% if state is string %}{{ state }}{% else %}{{ state | tojson }}{% endif %}"
OPTION = "{{ o.key }}{% if o.description %}: {{ o.description }}{% endif %}"
LETTERS = (
    "{% set letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ' %}<|im_start|>user\n{% for image in images %}{{ image }}{% endfor %}" + STATE
    + "\n{{ instructions }}\n{% for o in options %}[{{ letters[loop.index0] }}] " + OPTION + "\n{% endfor %}"
    + "<|im_end|>\n<|im_start|>assistant\n"
)  # fmt: skip
MARKERS = "[CLS]{{ type }} question: {{ instructions }}[SEP]{% for o in options %}[MASK] " + OPTION + "{% endfor %}[SEP]" + STATE + "[SEP]"


def write_encoder(path: Path) -> Path:
    """Write the encoder: a score at the marker of each option, one channel per kind of question."""
    rng = np.random.default_rng(8)
    writer = encoders.writer(path, "tiny decision encoder", layers=1, pooling=gguf.PoolingType.NONE)
    writer.add_uint32("tokenizer.ggml.mask_token_id", encoders.SPECIAL.index("[MASK]"))
    writer.add_string("bert.decision.type", "laya")
    writer.add_uint32("bert.decision.max_head_tokens", 256)
    writer.add_chat_template([{"name": "systemone", "template": MARKERS}])
    return finish(writer, encoders.embeddings(rng) | encoders.layer(0, rng), path)


def write_decoder(path: Path) -> Path:
    """Write the hybrid: the logits of one letter per option, after the prompt."""
    vocabulary = Vocabulary((), merges=(), space_prefix=False, control=(*CONTROL, *CHAT_CONTROL))
    writer = gguf.GGUFWriter(path, "lfm2")
    kv_heads = [N_HEAD_KV if il in ATTENDS else 0 for il in range(N_LAYER)]
    describe(writer, "tiny decision hybrid", ctx=N_CTX, layers=N_LAYER, embd=N_EMBD, ff=N_FF, head=HEAD, heads=N_HEAD, kv_heads=kv_heads)
    writer.add_shortconv_l_cache(N_CONV)
    writer.add_string("lfm2.decision.type", "openjev")
    vocabulary.write(writer)
    writer.add_chat_template([{"name": "systemone", "template": LETTERS}])
    return finish(writer, _tensors(len(vocabulary)), path)


def _tensors(n_vocab: int) -> dict[str, Array]:
    rng = np.random.default_rng(9)

    def matrix(rows: int, cols: int) -> Array:
        return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)

    found = {
        "token_embd.weight": rng.standard_normal((n_vocab, N_EMBD)).astype(np.float32),
        "token_embd_norm.weight": ones(N_EMBD),
        "output.weight": matrix(n_vocab, N_EMBD),
    }
    for il in range(N_LAYER):
        if il in ATTENDS:
            layer = {"attn_q": matrix(N_HEAD * HEAD, N_EMBD), "attn_k": matrix(N_HEAD_KV * HEAD, N_EMBD)}
            layer |= {"attn_v": matrix(N_HEAD_KV * HEAD, N_EMBD), "attn_output": matrix(N_EMBD, N_HEAD * HEAD)}
            layer |= {"attn_q_norm": ones(HEAD), "attn_k_norm": ones(HEAD)}
        else:
            layer = {"shortconv.conv": matrix(N_EMBD, N_CONV), "shortconv.in_proj": matrix(3 * N_EMBD, N_EMBD)}
            layer["shortconv.out_proj"] = matrix(N_EMBD, N_EMBD)
        layer |= {"attn_norm": ones(N_EMBD), "ffn_norm": ones(N_EMBD)}
        layer |= {"ffn_gate": matrix(N_FF, N_EMBD), "ffn_up": matrix(N_FF, N_EMBD), "ffn_down": matrix(N_EMBD, N_FF)}
        found |= {f"blk.{il}.{name}.weight": values for name, values in layer.items()}
    return found
