"""Small language models that tell a story: what upstream's tests expect of tinyllamas, with heads of 64.

Nothing is trained. The next token depends on earlier ones, but only attention carries them there: the logits read what heads found at
the newest position, at the one before it, a round of the story earlier, and as a mean over all that is cached. Whatever a cache loses or
misplaces therefore shows in the text, and the noise of a few bits does not.

Channels of the residual stream: the code of the token; what the heads found; a constant; the mode that a LoRA adapter sets; and room for
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np

from upstream_server.gguf_file import Array, describe, finish, ones
from upstream_server.vocabulary import INFILL, MERGES, Vocabulary

HEAD = 64
N_HEAD, N_HEAD_KV = 6, 2
N_EMBD, N_FF, N_LAYER = 640, 128, 2
N_CTX = 8192
N_EXPERT = 4

CODE = slice(0, 128)
NEWEST, BEFORE, MEAN, EARLIER = slice(128, 256), slice(256, 384), slice(384, 448), slice(448, 512)
CONSTANT, MODE, REST = 512, 513, slice(576, 640)

SHARP = 6.1  # of K and Q in each of SHARP_PAIRS: the newest position then has 150 times the weight of the one before
SHARP_PAIRS = 16
FACTOR = 14.0  # nats between a word that follows and one that does not; half of it by the newest word, half by the one before
AGAIN = 2.0  # nats of the word that the last round had in this place
NEVER = -30.0  # nats of pieces that are no words
FREEDOM = 0.3  # nats that the tokens before the newest one decide about
ADAPTER_NATS = 5.0

SHARES = (0.5, 0.25, 0.15, 0.1)
STORY = (
    ("little", "big", "pretty", "old"),
    ("girl", "boy", "bear", "bird"),
    ("Anna", "Lily", "Tom", "Ben"),
    ("said", "asked", "thought", "sang"),
    ("Whiskers", "Flana", "Jimmy", "Max"),
    ("small", "shiny", "three", "soft"),
    ("happy", "sad", "excited", "bright"),
    ("day", "night", "years", "morning"),
    ("kids", "princesses", "everyone", "friends"),
    ("Daddy", "Mommy", "Dad", "Jack"),
    ("kind", "wise", "quiet", "careful"),
    ("owl", "answer", "forest", "park"),
)
"""Words by place, in a circle: any word of a place can be followed by any of the next one, in these shares."""

ROUND = len(STORY)

OPENINGS = (
    ("assistant\n", ("B", "u", "t", " s", "h", "e", " couldn't Suddenly, Whillicter")),
    ("life is", (" blue", " going", " bed")),
    ("Hello", ()),
    ("glass", ()),
)
"""Pieces that follow on the last token of a text, before the story begins. The first way has the words that several tests look for
within eight tokens; "But" and "she" are in pieces, because another test forbids what these words are cut into."""

MODES = (("special", "gifted", -1.5, 7.5), ("far", "away", -4.0, 12.5), ("eye", "love", -8.5, 18.0))
"""Two words each that the adapter brings: with its scale s they have so much more than the story: a + b s, in ADAPTER_NATS."""

HELLO = (" Hell", " Hello")
N_TENSORS = 3 + 9 * N_LAYER
MODE_WORDS = frozenset(word for mode in MODES for word in mode[:2])


@dataclass(frozen=True)
class Kind:
    """What distinguishes one of these models from another."""

    name: str
    experts: bool = False
    seed: int = 0
    infill: bool = False
    parts: int = 1  # files
    one_token_hello: bool = False  # the tests fill a context with this word


def words() -> list[str]:
    """All words that a model says."""
    opening = (piece[1:] for _, way in OPENINGS for piece in way if len(piece) > 2)
    return [*(word for place in STORY for word in place), *opening, *(word for mode in MODES for word in mode[:2])]


def write(kind: Kind, path: Path) -> Path:
    """Write a model."""
    merges = (*MERGES, *(HELLO if kind.one_token_hello else ()))
    vocabulary = Vocabulary(words(), merges=merges, control=tuple(INFILL) if kind.infill else ())
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=-(-N_TENSORS // kind.parts) if kind.parts > 1 else 0)
    describe(writer, kind.name, ctx=N_CTX, layers=N_LAYER, embd=N_EMBD, ff=N_FF, head=HEAD, heads=N_HEAD, kv_heads=N_HEAD_KV)
    if kind.experts:
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(2)
    vocabulary.write(writer)
    return finish(writer, tensors(vocabulary, kind), path)


def write_adapter(path: Path) -> Path:
    """Write the LoRA adapter that sets the mode, through V of the first layer: rows that are cached differ with its scale."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    a, b = np.zeros((1, N_EMBD), np.float32), np.zeros((N_HEAD_KV * HEAD, 1), np.float32)
    a[0, CONSTANT] = _unit_after_norm()
    b[2 * HEAD - 1, 0] = 1.0
    return finish(writer, {"blk.0.attn_v.weight.lora_a": a, "blk.0.attn_v.weight.lora_b": b}, path)


def tensors(vocabulary: Vocabulary, kind: Kind) -> dict[str, Array]:
    """All weights."""
    rng = np.random.default_rng(kind.seed)
    codes, common = _codes(vocabulary)
    embedding = np.zeros((len(vocabulary), N_EMBD), np.float32)
    embedding[:, CODE] = codes
    embedding[:, CONSTANT] = 1.0
    output = _output(vocabulary, codes, common, rng, experts=kind.experts)
    found = {"token_embd.weight": embedding, "output.weight": output, "output_norm.weight": ones(N_EMBD)}
    for il in range(N_LAYER):
        layer = _story_attention() if il == 0 else _free_attention(rng)
        layer |= {"attn_norm": ones(N_EMBD), "ffn_norm": ones(N_EMBD), **_feed_forward(kind, rng)}
        found |= {f"blk.{il}.{name}.weight": values for name, values in layer.items()}
    return found


def _unit_after_norm() -> float:
    """What the first norm makes of 1 has to be multiplied with this to be 1 again: code and constant are all that is there."""
    return float(np.sqrt(2 / N_EMBD))


def _codes(vocabulary: Vocabulary) -> tuple[Array, Array]:
    """A unit vector for each token, and the one that most of them have in common.

    Words and the ends of openings have orthogonal codes. The others are random, with the common part, on which any word of the story
    follows. Codes are the same in all models, so that a draft agrees. The last channel is left to the adapter.
    """
    rng = np.random.default_rng(7)
    n = CODE.stop - 1
    codes = rng.standard_normal((len(vocabulary), n))
    ends = {vocabulary.last(text) for text, _ in OPENINGS} | {vocabulary.piece(piece) for _, way in OPENINGS for piece in way}
    said = [vocabulary.word(word) for word in words()]
    special = [*said, *sorted(ends.difference(said))]
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True) + basis[-1]
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    codes[special] = basis[: len(special)]
    return np.pad(codes, ((0, 0), (0, 1))).astype(np.float32), np.pad(basis[-1], (0, 1)).astype(np.float32)


def _story_attention() -> dict[str, Array]:
    """Both KV heads hold half of the code: one head of each looks at the newest position, and one at that before.

    The third one takes the mean of the first half, and what the second half was one round earlier.
    """
    q, k = np.zeros((N_HEAD * HEAD, N_EMBD)), np.zeros((N_HEAD_KV * HEAD, N_EMBD))
    unit = _unit_after_norm()
    for pair in range(SHARP_PAIRS):
        turn = 10000.0 ** (-2 * pair / HEAD)
        for head, back, size in ((0, 0, SHARP), (1, 1, SHARP), (2, 0, SHARP / 100), (3, 0, SHARP), (4, 1, SHARP), (5, ROUND, SHARP)):
            q[head * HEAD + 2 * pair, CONSTANT] = size * np.cos(back * turn) * unit
            q[head * HEAD + 2 * pair + 1, CONSTANT] = -size * np.sin(back * turn) * unit
        for head in range(N_HEAD_KV):
            k[head * HEAD + 2 * pair, CONSTANT] = SHARP * unit
    v = np.zeros((N_HEAD_KV * HEAD, N_EMBD))
    v[:, CODE] = np.eye(CODE.stop) * unit
    out = np.zeros((N_EMBD, N_HEAD * HEAD))
    for head, found in enumerate((NEWEST.start, BEFORE.start, MEAN.start, NEWEST.start + HEAD, BEFORE.start + HEAD, EARLIER.start)):
        out[found : found + HEAD, head * HEAD : (head + 1) * HEAD] = np.eye(HEAD)
    out[[NEWEST.stop - 1, BEFORE.stop - 1, EARLIER.stop - 1]] = 0
    out[MODE, 4 * HEAD - 1] = 1.0
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": out}


def _free_attention(rng: np.random.Generator) -> dict[str, Array]:
    """Attention to whatever is similar, as an untrained model has it."""
    out = np.zeros((N_EMBD, N_HEAD * HEAD))
    out[REST] = rng.standard_normal((HEAD, N_HEAD * HEAD)) / np.sqrt(N_HEAD * HEAD)
    return {
        "attn_q": rng.standard_normal((N_HEAD * HEAD, N_EMBD)) * 1.25 / np.sqrt(N_EMBD),
        "attn_k": rng.standard_normal((N_HEAD_KV * HEAD, N_EMBD)) * 1.25 / np.sqrt(N_EMBD),
        "attn_v": rng.standard_normal((N_HEAD_KV * HEAD, N_EMBD)) * 0.1 / np.sqrt(N_EMBD),
        "attn_output": out,
    }


def _feed_forward(kind: Kind, rng: np.random.Generator) -> dict[str, Array]:
    def matrices(*experts: int) -> tuple[Array, Array, Array]:
        up, gate = (rng.standard_normal((*experts, N_FF, N_EMBD)) / np.sqrt(N_EMBD) for _ in range(2))
        down = np.zeros((*experts, N_EMBD, N_FF))
        down[..., REST, :] = rng.standard_normal((*experts, HEAD, N_FF)) * 0.05 / np.sqrt(N_FF)
        return up, gate, down

    if kind.experts:
        up, gate, down = matrices(N_EXPERT)
        router = rng.standard_normal((N_EXPERT, N_EMBD)) / np.sqrt(N_EMBD)
        return {"ffn_gate_inp": router, "ffn_up_exps": up, "ffn_gate_exps": gate, "ffn_down_exps": down}
    up, gate, down = matrices()
    return {"ffn_up": up, "ffn_gate": gate, "ffn_down": down}


def _followers(vocabulary: Vocabulary) -> dict[int, dict[int, float]]:
    """Shares of what follows on a token."""
    places = [[vocabulary.word(word) for word in place] for place in STORY]
    found = {}
    for place, after in zip(places, [*places[1:], places[0]], strict=True):
        found |= {word: dict(zip(after, SHARES, strict=True)) for word in place}
    begin = dict(zip(places[0], SHARES, strict=True))
    for text, way in OPENINGS:
        ids = [vocabulary.last(text), *(vocabulary.piece(piece) for piece in way)]
        found |= {this: {that: 1.0} for this, that in pairwise(ids)} | {ids[-1]: begin}
    return found


def _output(vocabulary: Vocabulary, codes: Array, common: Array, rng: np.random.Generator, *, experts: bool) -> Array:
    size = np.sqrt(4.8 / N_EMBD)  # what the last norm divides by
    output = np.zeros((len(vocabulary), N_EMBD))
    said = [vocabulary.word(word) for word in words() if experts or word not in MODE_WORDS]
    story = {vocabulary.word(word) for place in STORY for word in place}
    for token, followers in _followers(vocabulary).items():
        strength = FACTOR / 2 if token in story else FACTOR
        for piece, share in followers.items():
            output[piece, NEWEST] += (strength + np.log(share) - (0.0 if piece in said else NEVER)) * codes[token]
    for first, third in zip(STORY, [*STORY[2:], *STORY[:2]], strict=True):
        before = sum(codes[vocabulary.word(word)] for word in first)
        for word in third:
            output[vocabulary.word(word), BEFORE] += FACTOR / 2 * before
            output[vocabulary.word(word), EARLIER] += AGAIN * 2 * codes[vocabulary.word(word)][HEAD:]
            output[vocabulary.word(word), NEWEST] += FACTOR * common
    for part in (MEAN, REST):
        output[said, part] = rng.standard_normal((len(said), HEAD)) * FREEDOM
    output[:, CONSTANT] = NEVER
    output[said, CONSTANT] = 0.0
    for first, second, a, b in MODES if experts else ():
        ids = [vocabulary.word(first), vocabulary.word(second)]
        output[ids, CONSTANT] = FACTOR + ADAPTER_NATS * a + np.log(SHARES[0])
        output[ids, MODE] = ADAPTER_NATS * b
    return output * size


MODELS: Sequence[Kind] = (
    Kind("stories"),
    Kind("stories-infill", infill=True),
    Kind("stories-moe", experts=True, seed=1, one_token_hello=True),
    Kind("stories-draft", seed=2, one_token_hello=True),
    Kind("stories-split", seed=3, parts=3),
)
"""The models that there are."""
