"""Questions whose answers must not depend on what a server has been through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slots import Client

from soak.traffic import N_CTX, N_SLOTS

LENGTHS = (5, 70, 300, N_CTX - 20)
"""Tokens of the prompts: within the exact tokens of a turbo type, beyond them, and as long as a slot."""

STEPS = 6
"""Tokens that follow one by one, as decoded ones do."""

N_PROBS = 300
"""Tokens that a server tells the log probabilities of: all of a tiny model."""

N_COMPARED = 50
"""The most likely ones, which are compared."""

GRAMMAR = "root ::= [a-z]+"
"""Of what is generated: a token that is a part of a character has no log probabilities yet."""

Row = dict[int, float]
"""Log probabilities by token."""


@dataclass(frozen=True)
class Answers:
    """By number of the question: the row of each step."""

    rows: dict[int, tuple[Row, ...]]

    def noise(self, other: Answers) -> float:
        """Largest difference of a log probability in what the other one was asked; infinite where one has no such token."""
        pairs = [pair for number, theirs in other.rows.items() for pair in zip(self.rows[number], theirs, strict=True)]
        return max(abs(value - theirs.get(token, float("inf"))) for ours, theirs in pairs for token, value in _likely(ours))


def _likely(row: Row) -> list[tuple[int, float]]:
    return sorted(row.items(), key=lambda item: -item[1])[:N_COMPARED]


def ask(client: Client, tokens: Sequence[int]) -> Answers:
    """Ask everything of a server that does nothing else, whose slots are empty. Each prompt has a slot of its own while there are some."""
    return Answers({number: _ask(client, tokens, number) for number in range(len(LENGTHS))})


def _ask(client: Client, tokens: Sequence[int], number: int, *, reused: int = 0) -> tuple[Row, ...]:
    """Of one question: how likely each token is behind the prompt, and behind each token that follows.

    The text is backwards, so that nothing of a prompt comes from the traffic.
    """
    tokens = tokens[::-1]
    prompt, rows = tokens[number : number + LENGTHS[number]], []
    for step in range(STEPS):
        known = prompt if step == 0 else [*prompt, *tokens[:step]]
        found = client.server.complete(list(known), 1, id_slot=number % N_SLOTS, n_probs=N_PROBS, grammar=GRAMMAR)
        top = found["completion_probabilities"][0]["top_logprobs"]
        rows.append({token["id"]: token["logprob"] for token in top})
        assert found["timings"]["cache_n"] >= (len(known) - 1 if step else reused), "what was asked just now is not in the slot"
    return tuple(rows)


def save(client: Client, tokens: Sequence[int]) -> None:
    """Leave a file of each slot, with the last questions that were asked of it."""
    ask(client, tokens)
    for slot in range(N_SLOTS):
        client.save(slot, f"probe-{slot}")


def ask_restored(client: Client, tokens: Sequence[int]) -> Answers:
    """Ask what :func:`save` has left. Of a slot that was asked twice the last question is in the file."""
    last = {number % N_SLOTS: number for number in range(len(LENGTHS))}
    for slot in last:
        client.restore(slot, f"probe-{slot}")
    return Answers({number: _ask(client, tokens, number, reused=LENGTHS[number] - 1) for number in last.values()})
