"""What the tests of a server's slots share: servers that are asked the same, and how far their answers are apart.

An answer's text is given, through a grammar, so that servers that round differently decode the same tokens. Tiny models have a token
for each character. So an answer is the log probabilities of the whole vocabulary before each character of its text, and the text
may be cut anywhere.

A window that covers the whole text makes an f16 cache of any other: rows that are lost or misplaced show at once. f16 is without flash
attention here: upstream's adds up in f16, and that is a noise ten times as large.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from server import Server, serve
from tiny_models import N_VOCAB

Array = npt.NDArray[np.float64]

EXACT = ("-fa", "off")
WINDOW = ("-ctk", "turbo3t", "-ctv", "turbo3t", "--cache-tail", "2000")
PACKED = ("-ctk", "turbo3t", "-ctv", "turbo3t")

NOISE = 0.01
"""Largest difference of a log probability that rounding makes: measured were .002 to .005."""

LOSS = 5 * NOISE
"""Least of a cache whose older rows are packed: measured were .16 to .85."""

IDLE_SECONDS = 20.0


@dataclass(frozen=True)
class Reply:
    """What a server answers to a prompt and the text behind it."""

    rows: Array = field(repr=False)  # [characters, N_VOCAB], log probabilities
    reused: int  # tokens of the prompt that were in the cache
    computed: int
    truncated: bool  # the context was shifted


class Client:
    """A server that answers."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder  # of slot files

    def read(self, prompt: str, then: str, slot: int = 0, **more: Any) -> Reply:
        """Decode the text behind a prompt."""
        return reply(self.server.call("/completion", request(prompt, then, slot) | more), then)

    def read_twice(self, prompt: str, then: str) -> list[Reply]:
        """The same in two slots, of which the second takes over the prompt of the first."""
        return [reply(found, then) for found in self.server.ask("/completion", request(prompt, then, 0) | {"n_cmpl": 2})]

    def save(self, slot: int = 0, name: str = "slot") -> int:
        """Number of tokens that are saved."""
        return int(self.server.call(f"/slots/{slot}?action=save", {"filename": name})["n_saved"])

    def restore(self, slot: int = 0, name: str = "slot") -> int:
        """Number of tokens that are restored."""
        return int(self.server.call(f"/slots/{slot}?action=restore", {"filename": name})["n_restored"])

    def erase(self, slot: int = 0) -> None:
        self.server.call(f"/slots/{slot}?action=erase", {})

    def swap(self, scale: float) -> bool:
        """Give the adapter another weight, for all requests to come."""
        return bool(self.server.ask("/lora-adapters", [{"id": 0, "scale": scale}])["success"])

    def embed(self, text: str) -> Array:
        found = self.server.call("/v1/embeddings", {"input": text})["data"]
        return np.array(found[0]["embedding"], np.float64)

    def rank(self, query: str, texts: list[str]) -> Array:
        """Log odds that each text answers the query."""
        found = self.server.call("/v1/rerank", {"query": query, "documents": texts})["results"]
        scores = np.array([text["relevance_score"] for text in sorted(found, key=lambda text: text["index"])], np.float64)
        return np.log(scores / (1 - scores))

    def cancel(self, prompt: str, then: str, events: int, slot: int = 0) -> None:
        """Begin to read, and go away after some events, of which a prompt has one for each batch, and the text one for each token."""
        self.server.leave(request(prompt, then, slot), events)
        self.wait()

    def wait(self) -> None:
        """Until no slot works."""
        deadline = time.monotonic() + IDLE_SECONDS
        while any(slot["is_processing"] for slot in self.slots()):
            assert time.monotonic() < deadline, "a slot does not end"
            time.sleep(0.02)

    def slots(self) -> list[dict[str, Any]]:
        return list(self.server.ask("/slots"))

    def said(self) -> str:
        """The log, once the server has ended."""
        return self.server.said()


Start = Callable[..., AbstractContextManager[Client]]
"""``start(*options)`` is a server for a block, with what a test compares in front of the options."""


def characters(path: Path) -> str:
    """Of a text file, one token each: tiny models have three for a space."""
    return "_".join(path.read_text("ascii").split())


def request(prompt: str, then: str, slot: int) -> dict[str, Any]:
    """Of a completion whose text is given."""
    return {
        **{"prompt": prompt, "id_slot": slot, "cache_prompt": True},
        **{"n_predict": len(then), "grammar": f"root ::= {json.dumps(then)}", "ignore_eos": True},
        **{"temperature": 0, "n_probs": N_VOCAB, "seed": 0},
    }


def reply(found: dict[str, Any], then: str) -> Reply:
    """What is in an answer."""
    assert found["tokens_predicted"] == len(then), found
    rows = np.full((len(then), N_VOCAB), np.nan)
    for row, step in zip(rows, found["completion_probabilities"], strict=True):
        for token in step["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    assert np.isfinite(rows).all()
    return Reply(rows, found["timings"]["cache_n"], found["timings"]["prompt_n"], found["truncated"])


def starter(native_bin: Path, model: Path, folder: Path, *settings: str) -> Start:
    """Servers of a model that differ from others in these settings. Slot files and logs are in a folder of their own."""
    folder.mkdir(exist_ok=True)

    @contextmanager
    def start(*options: str) -> Iterator[Client]:
        with serve(native_bin, model, folder, "-c", "1024", "--slot-save-path", str(folder), *settings, *options) as server:
            yield Client(server, folder)

    return start


def apart(a: Reply, b: Reply) -> float:
    """Largest difference of a log probability."""
    assert a.rows.shape == b.rows.shape
    return float(np.abs(a.rows - b.rows).max())


def farthest(a: list[Reply], b: list[Reply]) -> float:
    """That of all answers."""
    return max(apart(*pair) for pair in zip(a, b, strict=True))
