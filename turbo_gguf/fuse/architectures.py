"""How architectures attend, as far as a fold has to know: what lies between the projections. Others are refused.

It follows ``llama_model_rope_type`` in upstream's ``src/llama-model.cpp`` and the graphs of ``src/models/`` (b11549).
``tests/llama/test_fused_logits.py`` folds a model of each architecture that upstream's ``test-llama-archs`` makes, and compares logits.
"""

from __future__ import annotations

import msgspec

NORM, NEOX, NONE, EITHER = "norm", "neox", "none", "either"
"""Which channels RoPE turns into each other: neighbours, those half of the roped part apart, none, or one of both by the header."""


class Attention(msgspec.Struct, frozen=True):
    """What is known of an architecture."""

    rope: str
    output_bias: bool = False  # llama.cpp reads and adds biases of V and of the output projection, where a file has them
    keys: bool = True  # K and Q are linear in their projections, or in the weights of their norms


_NORM = """
    arcee arctic baichuan bailingmoe chatglm command-r cohere2 cohere2moe deepseek ernie4_5 ernie4_5-moe internlm2 maincoder olmo
    smollm3 xverse
"""
_NEOX = """
    bailingmoe2 dots1 exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 glm4moe grok grovemoe hunyuan-dense hunyuan-moe hy_v3
    lfm2 lfm2moe mellum mimo2 minimax-m2 olmo2 olmoe openelm orion phi3 plamo plamo2 plamo3 qwen qwen2 qwen2moe qwen2vl qwen3
    qwen3moe qwen3vl qwen3vlmoe seed_oss smallthinker stablelm talkie
"""
_NORM_BIAS = "deci granite granitehybrid granitemoe granite_swa llama minicpm mistral3 starcoder"
_NEOX_BIAS = "codeshell gpt-oss gptneox jais2 nemotron paddleocr pangu-embedded phi2 phimoe starcoder2"

KNOWN = {
    **{name: Attention(NORM) for name in _NORM.split()},
    **{name: Attention(NEOX) for name in _NEOX.split()},
    **{name: Attention(NORM, output_bias=True) for name in _NORM_BIAS.split()},
    **{name: Attention(NEOX, output_bias=True) for name in _NEOX_BIAS.split()},
    **{name: Attention(NONE, output_bias=True) for name in ("bloom", "gpt2", "jais", "mpt", "nemotron_h", "nemotron_h_moe")},
    "glm4": Attention(EITHER),
    "jamba": Attention(NONE),
    "refact": Attention(NONE),
    "llama4": Attention(NORM, keys=False),  # which norms K and Q without weights
}

CLAMPED = frozenset(("mpt", "olmo"))
"""Cut large values of Q, K and V off, where the header says so."""
