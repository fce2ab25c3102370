"""The tokenizer: SentencePiece BPE that llama.cpp loads, and the token streams it makes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from turbo_gguf.inputs.eval_text import held_out_text

from .corpus import training_texts

VOCAB = 4096
BOS = 1
EOS = 2


def _paragraphs(texts: list[str], lines: int = 20) -> Iterator[str]:
    for text in texts:
        rows = text.splitlines(keepends=True)
        for start in range(0, len(rows), lines):
            yield "".join(rows[start : start + lines])


def train_tokenizer(texts: list[str]) -> bytes:
    """Train the SentencePiece BPE tokenizer and return its serialized model.

    Every character survives a round trip: identity normalisation, no dummy prefix, runs of
    spaces kept, bytes for what the vocabulary lacks. Pieces may mix letters, punctuation and
    line ends (``self.``, ``):\\n``), which saves 6 % of the held-out tokens; they never
    cross from a word into the following space.
    """
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_paragraphs(texts),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB,
        character_coverage=0.9998,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return out.getvalue()


def encode(model: bytes, texts: list[str]) -> NDArray[np.uint16]:
    """Return the token ids of all ``texts``, one after the other: shape (tokens,)."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return np.concatenate([np.asarray(processor.encode(t), dtype=np.uint16) for t in texts])


def check_round_trip(model: bytes) -> None:
    """Raise ``ValueError`` unless the held-out text survives encoding and decoding exactly."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = held_out_text()
    if processor.decode(processor.encode(text)) != text:
        raise ValueError("the tokenizer does not give the held-out text back")


def prepare(roots: list[Path], work: Path) -> str:
    """Write ``tokenizer.model`` and the token streams to ``work``; return a line about sizes.

    The streams are flat uint16 files: ``library.bin`` and ``tests.bin`` to train on,
    ``heldout.bin`` to validate on. The tokenizer is trained on the first root's library code.
    """
    work.mkdir(parents=True, exist_ok=True)
    model = train_tokenizer(training_texts(roots[:1])[0])
    check_round_trip(model)
    (work / "tokenizer.model").write_bytes(model)
    library, tests = training_texts(roots)
    held_out = held_out_text()
    sizes = []
    for name, texts in (("library", library), ("tests", tests), ("heldout", [held_out])):
        ids = encode(model, texts)
        ids.tofile(work / f"{name}.bin")
        size = sum(len(text.encode("utf-8")) for text in texts)
        sizes.append(f"{name} {len(texts)} texts {size} bytes {len(ids)} tokens")
    return "; ".join(sizes)
