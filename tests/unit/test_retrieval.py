"""Codes hidden in a text: prompts, what counts as an answer, and what is kept. No server, no model."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from measuring import MODEL, fake_build, result

from turbo_gguf.inputs.models import TextFile
from turbo_gguf.measure import retrieval, server
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.store import Store


def words(text: str) -> int:
    """A token is a word."""
    return len(text.split())


DEPTHS = (0.0, 0.5, 1.0)


@pytest.mark.parametrize("ctx", [600, 2000])
def test_a_prompt_is_as_long_as_asked_for(ctx: int) -> None:
    made = retrieval.prompt(words, ctx, DEPTHS, seed=0)
    longest_sentence = 15
    assert ctx - retrieval.ROOM - longest_sentence <= words(made.text) <= ctx - retrieval.ROOM


def test_keys_are_at_their_depths_and_are_the_only_numbers() -> None:
    made = retrieval.prompt(words, 2000, DEPTHS, seed=0)
    assert re.findall(r"\d+", made.text) == [key for _, _, key in made.keys]
    for depth, place, key in made.keys:
        at = made.text.index(f"The pass code of the {place} is {key}.")
        assert at / len(made.text) == pytest.approx(depth, abs=0.03)


def test_seeds_differ_and_are_the_same_again() -> None:
    first, again, other = (retrieval.prompt(words, 600, DEPTHS, seed) for seed in (0, 0, 1))
    assert first == again
    assert {key for _, _, key in first.keys}.isdisjoint(key for _, _, key in other.keys)


def test_questions_of_a_prompt_share_all_of_the_text() -> None:
    text = retrieval.compose(retrieval.filler(random.Random(0), 5), [(0.5, "windmill", "12345")])
    one, two = (retrieval.question(text, place) for place in ("windmill", "harbour"))
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
    assert retrieval.is_right(answer, "48213") is right


class Finder:
    """Stands for a server: it reads the codes in the last question, and knows those that ``knows`` says."""

    def __init__(self, many: bool) -> None:
        self.many = many
        self.asked: list[str] = []

    def call(self, path: str, body: dict[str, object], seconds: float = 0.0) -> dict[str, object]:
        if path == "/tokenize":
            return {"tokens": str(body["content"]).split()}
        assert path == "/v1/chat/completions" and body["temperature"] == 0 and body["max_tokens"] == retrieval.ANSWER_TOKENS
        (message,) = body["messages"]  # type: ignore[misc]
        text = str(message["content"])
        self.asked.append(text)
        codes = dict(re.findall(r"The pass code of the ([a-z ]+) is (\d+)\.", text))
        place = re.search(r"What is the pass code of the ([a-z ]+)\?", text)
        assert place
        answer = codes[place[1]] if self.many or len(codes) == 1 else "I do not know."
        return {"choices": [{"message": {"content": answer}}]}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    text = TextFile(path=tmp_path / "t", sha256="t", name="t", size=1)
    return Job(build=fake_build(tmp_path, "llama-server", ""), model=MODEL, text=text, threads=2)


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[server.Shape, Finder]]]:
    started: list[tuple[server.Shape, Finder]] = []

    @contextmanager
    def start(shape: server.Shape, *_: object) -> Iterator[Finder]:
        started.append((shape, Finder(many=str(shape.types) == "f16")))
        yield started[-1][1]

    monkeypatch.setattr(server, "started", start)
    monkeypatch.setenv("TURBO_GGUF_HOME", "/nowhere")
    yield started


def test_each_code_is_asked_for_alone_and_among_others(finder: list[tuple[server.Shape, Finder]], job: Job, tmp_path: Path) -> None:
    store, said = Store(tmp_path / "results"), []
    cases = [result("f32", 0.0, batch=256, ctx=600), result("f16", 0.001, ctx=600), result("q4_0", 0.003, ctx=600)]
    made = retrieval.measure(cases, job, store, said.append)
    assert [r.stats.found for r in made] == [
        None,
        Metric(100.0, pytest.approx(10.607, abs=0.001)),
        Metric(50.0, pytest.approx(17.678, abs=0.001)),
    ]
    assert said == ["    f16 at context 600: 8 of 8 codes found", "    q4_0 at context 600: 4 of 8 codes found"]
    (shape, one), (_, other) = finder
    assert (shape.slots, shape.ctx, shape.batch) == (1, 768, 512) and one.asked == other.asked, "all types get the same prompts"
    assert len({question.split("What is")[0] for question in one.asked}) == len(retrieval.DEPTHS) + 1


def test_what_was_found_is_kept_and_not_asked_again(finder: list[tuple[server.Shape, Finder]], job: Job, tmp_path: Path) -> None:
    store, case = Store(tmp_path / "results"), result("q4_0", 0.003)
    store.append([case])
    retrieval.measure(store.results(), job, store, lambda _: None)
    (kept,) = store.results()
    assert kept.stats.found and msgspec.structs.replace(kept, stats=msgspec.structs.replace(kept.stats, found=None)) == case
    assert retrieval.measure([kept], job, store, lambda _: None) == [kept] and len(finder) == 1


def test_a_context_without_room_is_left_out(finder: list[tuple[server.Shape, Finder]], job: Job, tmp_path: Path) -> None:
    case = result("q4_0", 0.003, ctx=256)
    assert retrieval.measure([case], job, Store(tmp_path), lambda _: None) == [case] and not finder
