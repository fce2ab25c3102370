"""The harness of upstream's server tests: its table of skips, its vocabulary, its hub, and whose failure is whose."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from upstream_server import skips, table
from upstream_server.hub import Hub, fill_cache
from upstream_server.outcome import Outcome, last_line
from upstream_server.vocabulary import Vocabulary

CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [  # as upstream's tests state them, without <s>
        ("I believe the meaning of life is", 17),
        ("Write a joke about AI from a very long prompt which will not be truncated", 45),
        ("This is not a chat template, it is", 22),
        ("What is the capital of France?", 20),
        (" Hello 1" * 40, 201),
        (CHAT.format("Book", "Hey"), 68),
        (CHAT.format("Book", "What is the best book"), 76),
        (CHAT.format("You are a coding assistant.", "Write the fibonacci function in c++."), 103),
    ],
)
def test_the_vocabulary_cuts_as_many_tokens_as_the_tests_expect(text: str, tokens: int) -> None:
    assert len(Vocabulary(()).cut(text)) == tokens


def test_words_are_never_cut_out_of_a_prompt() -> None:
    vocabulary = Vocabulary(("girl", "Whiskers"))
    assert vocabulary.cut("girl Whiskers") != ["\u2581girl", "\u2581Whiskers"]
    assert vocabulary.word("Whiskers") == vocabulary.word("girl") + 1


def test_every_skip_has_a_reason_and_names_a_test() -> None:
    table = skips.load()
    for skip in (*table.skip, *table.known):
        assert len(skip.reason) > 10
        assert all(".py::" in test for test in skip.tests)


@pytest.mark.parametrize(
    ("test", "pattern", "expected"),
    [
        ("unit/test_a.py::test_b[x-1]", "test_a.py::test_b[x-1]", True),
        ("unit/test_a.py::test_b[x-1]", "test_a.py::*", True),
        ("unit/test_a.py::test_b[x-1]", "test_a.py::test_b[[]x-1]", False),
        ("unit/test_a.py::test_bc", "test_a.py::test_b", False),
    ],
)
def test_patterns_of_skips(test: str, pattern: str, expected: bool) -> None:
    assert skips.matches(test, pattern) is expected


def outcome(test: str, ended: str, detail: str = "") -> dict[str, Outcome]:
    return {test: Outcome(test, ended, 1.0, detail)}


def test_a_failure_that_f16_has_is_upstreams() -> None:
    outcomes = {
        "f16": outcome("unit/test_a.py::test_a", "failed", "x") | outcome("unit/test_a.py::test_b", "passed"),
        "turbo3t": outcome("unit/test_a.py::test_a", "failed", "y") | outcome("unit/test_a.py::test_b", "failed", "z"),
    }
    assert table.ours(outcomes) == {"unit/test_a.py::test_b": ["turbo3t"]}
    text = table.write(outcomes, {"turbo3t": 3})
    assert "| `unit/test_a.py::test_a` | f16, turbo3t | upstream's: f16 fails, too | x |" in text
    assert "| `unit/test_a.py::test_b` | turbo3t | ours | z |" in text
    assert "| a: b | 1 | **0 of 1** |" in text


def test_a_known_failure_is_listed_and_no_error() -> None:
    test = "unit/test_completion.py::test_completion_with_tokens_input"
    outcomes = {"f16": outcome(test, "passed"), "turbo3t": outcome(test, "failed", "x")}
    assert table.ours(outcomes) == {}
    assert "| turbo3t | ours: the answer to a prompt is asked for again" in table.write(outcomes, {})
    assert table.ours({"f16": outcome(test, "passed"), "q8_0": outcome(test, "failed", "x")}) == {test: ["q8_0"]}


def test_a_second_try_is_counted() -> None:
    text = table.write({"f16": outcome("unit/test_a.py::test_a[1]", "passed", "too late")}, {})
    assert "| f16 | 1 | 1 | 0 | 0 | 0 | 1 |" in text


def test_the_line_of_an_error() -> None:
    assert last_line("x\n>   assert a\nE   assert 404 == 200\nE    +  where\n") == "assert 404 == 200"


def test_the_hub_has_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    repositories = {"org/name": {"sub/model-F16.gguf": file}}
    with Hub(repositories) as hub:
        with urllib.request.urlopen(hub.url + "org/name/resolve/main/sub/model-F16.gguf") as answer:
            assert answer.read() == b"GGUF"
            assert answer.headers["ETag"]
        commit = json.load(urllib.request.urlopen(hub.url + "api/models/org/name/refs"))["branches"][0]["targetCommit"]
        listed = json.load(urllib.request.urlopen(f"{hub.url}api/models/org/name/tree/{commit}?recursive=true"))
        assert [item["path"] for item in listed] == ["sub/model-F16.gguf"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(hub.url + "org/other/resolve/main/x.gguf")
    fill_cache(repositories, tmp_path / "cache")
    assert (tmp_path / f"cache/models--org--name/snapshots/{commit}/sub/model-F16.gguf").read_bytes() == b"GGUF"
    assert (tmp_path / "cache/models--org--name/refs/main").read_text() == commit
