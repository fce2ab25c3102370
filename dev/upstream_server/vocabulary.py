"""A vocabulary for SentencePiece's pair merging that cuts the texts of upstream's tests into as many tokens as they expect.

The tests state how many tokens a prompt has. ``MERGES`` was searched for these numbers: sets of pieces that pair merging of English
brings up, until all of them were right. Words are pieces that no merging reaches, so they occur in answers and never in a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import gguf

SPACE = "\u2581"
BYTES = 3  # ids below are <unk>, <s> and </s>
CHARACTERS = "\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
INFILL = {"<PRE>": "fim_pre", "<SUF>": "fim_suf", "<MID>": "fim_mid"}

MERGES = """
el _H _Hel st _w _b it he _a _t _i re _s nd at _the _c er an _h ng end _l om ok _o _n _d ook as _v _in _f ut em ap
_no us ing _of _not _do yst rom pt ou on id ed _y _you _bel _beli _belie _believ qu ru Book _la _con _are _al _ad ur
nc ion et elit ate _velit _tru _trunc _sed _qu _nu _iru _irure _inc _G ass assi Te Test
""".replace("_", SPACE).split()
"""Pieces of more than one character, the ones that are merged first at the front."""


class Vocabulary:
    """Pieces with their ids."""

    def __init__(
        self, words: Sequence[str], *, merges: Sequence[str] = MERGES, space_prefix: bool = True, control: Sequence[str] = ()
    ) -> None:
        self._merges = [piece.replace(" ", SPACE) for piece in merges]
        self._space_prefix = space_prefix
        self._pieces = [*self._merges, *(c.replace(" ", SPACE) for c in CHARACTERS), *((" " + word).replace(" ", SPACE) for word in words)]
        self._control = tuple(control)
        self._ids = {piece: BYTES + 256 + i for i, piece in enumerate(self._pieces)}

    def __len__(self) -> int:
        return BYTES + 256 + len(self._pieces) + len(self._control)

    def word(self, word: str) -> int:
        """Id of a word with the space before it."""
        return self.piece(" " + word)

    def piece(self, piece: str) -> int:
        """Id of a piece, with a plain space in it."""
        return self._ids[piece.replace(" ", SPACE)]

    def last(self, text: str) -> int:
        """Id of the last token of a text."""
        return self._ids[self.cut(text)[-1]]

    def cut(self, text: str) -> list[str]:
        """Pieces of a text, as llama.cpp cuts it: the best pair is merged first, of equal ones the leftmost."""
        rank = {piece: i for i, piece in enumerate(self._merges)}
        parts = list((SPACE if self._space_prefix else "") + text.replace(" ", SPACE))
        while True:
            pairs = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
            if not pairs:
                return parts
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer to a model."""
        kinds = gguf.TokenType
        n, extra = len(self._pieces), list(self._control)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *self._pieces, *extra])
        writer.add_token_scores([0.0] * (BYTES + 256) + [-float(i) for i in range(n)] + [0.0] * len(extra))
        special = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
        writer.add_token_types([*special, *[kinds.NORMAL] * n, *[kinds.CONTROL] * len(extra)])
        writer.add_vocab_size(len(self))
        writer.add_add_space_prefix(self._space_prefix)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for name, key in INFILL.items():
            if name in extra:
                writer.add_uint32(f"tokenizer.ggml.{key}_token_id", len(self) - len(extra) + extra.index(name))
