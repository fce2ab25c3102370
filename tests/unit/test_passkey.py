"""scripts/bench/passkey.py: prompts and what counts as an answer. No server, no model."""

from __future__ import annotations

import random
import re

import passkey
import pytest


class Words:
    """Stands for a server: a token is a word."""

    def tokens(self, text: str) -> list[int]:
        return list(range(len(text.split())))


DEPTHS = (0.0, 0.5, 1.0)


@pytest.mark.parametrize("ctx", [600, 2000])
def test_a_prompt_is_as_long_as_asked_for(ctx: int) -> None:
    made = passkey.prompt(Words(), ctx, DEPTHS, seed=0)
    longest_sentence = 15
    assert ctx - passkey.ROOM - longest_sentence <= len(Words().tokens(made.text)) <= ctx - passkey.ROOM


def test_keys_are_at_their_depths_and_are_the_only_numbers() -> None:
    made = passkey.prompt(Words(), 2000, DEPTHS, seed=0)
    assert re.findall(r"\d+", made.text) == [key for _, _, key in made.keys]
    for depth, place, key in made.keys:
        at = made.text.index(f"The pass code of the {place} is {key}.")
        assert at / len(made.text) == pytest.approx(depth, abs=0.03)


def test_seeds_differ_and_are_the_same_again() -> None:
    first, again, other = (passkey.prompt(Words(), 600, DEPTHS, seed) for seed in (0, 0, 1))
    assert first == again
    assert {key for _, _, key in first.keys}.isdisjoint(key for _, _, key in other.keys)


def test_questions_of_a_prompt_share_all_of_the_text() -> None:
    text = passkey.compose(passkey.filler(random.Random(0), 5), [(0.5, "windmill", "12345")])
    one, two = (passkey.question(text, place) for place in ("windmill", "harbour"))
    shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert shared > one.index(text) + len(text)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("48213", True),
        ("The pass code of the windmill is 48213.", True),
        ("48213, not 11111", True),
        ("11111, not 48213", False),
        ("4821", False),
        ("482130", False),
        ("48,213", False),
        ("", False),
        ("numbers numbers", False),
    ],
)
def test_only_the_whole_key_counts(answer: str, right: bool) -> None:
    assert passkey.is_right(answer, "48213") is right


@pytest.mark.parametrize(
    "arguments", [["--depths", "1.5"], ["--depths", "0.5", "0.5"], ["--ctx", "100"], ["--trials", "0"], ["--types", "turbo9"]]
)
def test_wrong_arguments_are_said_before_anything_is_built(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passkey, "ensure_build", lambda *_, **__: pytest.fail("it builds"))
    assert passkey.main(arguments) == 2
