"""What llama.cpp knows of an architecture and a header does not say: windows, recurrent layers, caches of another kind.

It follows ``load_arch_hparams`` in upstream's ``src/models/`` and ``create_memory`` in ``src/llama-model.cpp`` (b11549). An architecture
without a rule has a cache for all tokens in every layer. ``eval/results/plan.md`` compares all of this with llama.cpp.
"""

from __future__ import annotations

import msgspec


class Windows(msgspec.Struct, frozen=True):
    """Which layers attend a sliding window only. Keys of the header win over what is here."""

    period: int = 0  # one layer of so many attends everything; 0: the header has an array
    tokens: int = 0  # of the window, where the header does not say; 0: then there is none
    fixed: bool = False  # the number of tokens is not that of the header, where it names one
    dense_first: bool = False  # the first of a period attends everything, else the last
    n_layer: int = 0  # only in the model with so many layers


WINDOWS = {
    "afmoe": Windows(4),
    "cohere2": Windows(4),
    "cohere2moe": Windows(4, dense_first=True),
    "exaone-moe": Windows(4, tokens=128),
    "exaone4": Windows(4, tokens=4096, n_layer=64),
    "gemma2": Windows(2, tokens=4096),
    "gemma3": Windows(6),
    "gemma3n": Windows(5),
    "gpt-oss": Windows(2),
    "laguna": Windows(4, dense_first=True),
    "llama4": Windows(4, tokens=8192, fixed=True),
    "mellum": Windows(4),
    "muse-glimmer": Windows(4),
    "olmo2": Windows(4),
    "plamo3": Windows(8),
    "smallthinker": Windows(4, tokens=4096, fixed=True, dense_first=True),
    **dict.fromkeys(("dots3note", "gemma4", "granite_swa", "maple", "mimo2", "spark2_5", "step35"), Windows()),
}
"""Interleaved sliding windows. Upstream switches that of Phi-3 off. LFM2 and DeepSeek-V4 have rules in ``shape``."""

WINDOW_ON_REQUEST = frozenset(("smallthinker",))
"""Have the window of the table only where the header names any."""

RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
"""No layer has a KV cache."""

HYBRID = frozenset(
    ("bailingmoe3", "glm5-next", "granitehybrid", "jamba", "kimi-k3", "kimi-linear", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe")
) | {"plamo2"}
"""Layers without KV heads are recurrent."""

NEMOTRON = frozenset(("nemotron_h", "nemotron_h_moe"))
"""Hybrids whose layers with a feed-forward network have neither."""

INTERVALS = {"minimax-01": 8, "qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4}
"""Hybrids in which one layer of so many attends, where the header has no list."""

BOTH = frozenset(("falcon-h1",))
"""Every layer attends and is recurrent."""

LATENT = frozenset(
    ("bailingmoe3", "deepseek2", "deepseek32", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "kimi-k3", "kimi-linear", "mistral4")
)
"""Keep a latent vector in place of K and V, if the header has head sizes of it."""

ENCODERS = frozenset(
    ("bert", "clef", "eurobert", "gemma-embedding", "gemma-embedding2", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert")
) | {"nomic-bert", "nomic-bert-moe"}
DIFFUSION = frozenset(("dream", "llada", "llada-moe", "rnd1"))
NO_CACHE = ENCODERS | DIFFUSION
"""Read the whole text at once."""

OWN_ATTENTION = frozenset(("minimax-m3", "qwen4exp"))
"""Attend in a way of their own, so a turbo type has no calibration and no exact tokens."""

NO_FLASH_ATTENTION = frozenset(("grok",))

PLAIN = frozenset(
    """
    apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chameleon chatglm codeshell cogvlm command-r dbrx deci deepseek
    deepseek2-ocr dots1 ernie4_5 ernie4_5-moe exaone falcon gemma glm4 glm4moe gpt2 gptj gptneox granite granitemoe graniteswitch grok
    grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 k2-horizon llama llama-embed maincoder minicpm
    minicpm3 minimax-m2 minimax-m3 mistral3 mpt nanbeige nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo
    plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm starcoder
    starcoder2 talkie xverse
    """.split()  # noqa: SIM905 - ninety lines otherwise
)
"""Every layer keeps K and V of all tokens, or what the header says otherwise."""

KNOWN = PLAIN | WINDOWS.keys() | RECURRENT | HYBRID | INTERVALS.keys() | BOTH | LATENT | NO_CACHE | {"deepseek4"}
"""Others are refused: a formula that does not know how a model attends may be several times off."""
