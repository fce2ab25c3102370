"""What lies where in a slot file of llama-server: of a model with one KV cache, whose V is not transposed.

What upstream (b11549) does wrong, with f16, too:

- It takes a file that has tokens and no cells, and aborts at the next prompt.
- It ends where the number of cells in a checkpoint of recurrent layers is another one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SIZES, CALIBRATED, EXACT = b"TSIZ", b"TCAL", b"TXEC"


@dataclass(frozen=True)
class Word:
    """A number, or a run of rows, which are no number."""

    name: str
    begin: int
    end: int
    is_rows: bool = False


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.words: list[Word] = []

    def take(self, name: str, n_bytes: int = 4, *, is_rows: bool = False) -> int:
        begin, self.at = self.at, self.at + n_bytes
        assert self.at <= len(self.data)
        self.words.append(Word(name, begin, self.at, is_rows))
        return 0 if is_rows else int.from_bytes(self.data[begin : self.at], "little")

    def take_mark(self, mark: bytes) -> bool:
        is_there = self.data[self.at : self.at + 4] == mark
        if is_there:
            self.take(mark.decode())
        return is_there


def words(data: bytes) -> list[Word]:
    """All of a file, in order, without a gap. Checkpoints of a context are not among them."""
    r = _Reader(data)
    r.take("magic")
    r.take("version")
    for i in range(r.take("n_tokens")):
        r.take(f"token {i}")
    r.take("n_stream")
    n_cells = r.take("n_cells")
    for i in range(n_cells):
        for name in ("position", "n_seq", "sequence"):
            r.take(f"{name} {i}")
    r.take_mark(SIZES)
    if r.take_mark(CALIBRATED):
        r.take("digest")
    if r.take_mark(EXACT):
        n_copies = r.take("n_copies")
        n_bytes = r.take("n_bytes", 8)
        for i in range(n_copies):
            r.take(f"copy {i}")
        r.take("copies", n_copies * n_bytes, is_rows=True)
    r.take("v_trans")
    n_layers = r.take("n_layers")
    r.take("n_rot_k")
    r.take("n_rot_v")
    for side in ("K", "V"):
        for i in range(n_layers):
            r.take(f"type of {side} {i}")
            r.take(f"{side} {i}", n_cells * r.take(f"row of {side} {i}", 8), is_rows=True)
    assert r.at == len(data), (r.at, len(data))
    return r.words


def flipped(data: bytes, word: Word, bit: int) -> bytes:
    """With another value of a bit."""
    at = word.begin + bit // 8
    assert at < word.end
    return data[:at] + struct.pack("B", data[at] ^ 1 << bit % 8) + data[at + 1 :]
