"""Drift along the answers of f16. Risks: a text that is read as other tokens, a path of another build, answers that are lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from measuring import MODEL, fake_build, result
from page_tree import rows, section, tree

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import ToolFailed, UsageError
from turbo_gguf.inputs.models import TextFile
from turbo_gguf.judge import gate, page, report
from turbo_gguf.measure import drift, kld
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.measure.sweep import Setup

BOS = 999
SETUP = Setup(build_id="fake", model_sha256="m", text_sha256="t", backend="CPU")


class Speller:
    """Stands for a server: a token is a letter, and it writes the alphabet on from the last letter of a prompt.

    ``slips``: which token of an answer it has wrong. ``bad``: an answer to a prompt that ends so is not read as its own tokens.
    """

    def __init__(self, *, begins: bool = False, slips: int | None = None, bad: Sequence[int] = (), cut: bool = False) -> None:
        self.begins, self.slips, self.bad, self.cut = begins, slips, bad, cut
        self.prompts: list[list[int]] = []
        self.service = type("Service", (), {"stderr": "log"})

    def call(self, path: str, body: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        if path == "/tokenize":
            assert body["parse_special"] is False
            text = body["content"].replace("!", "ab")  # what was one token comes back as two
            return {"tokens": [*([BOS] if self.begins and body["add_special"] else []), *(ord(letter) - 97 for letter in text)]}
        if path == "/detokenize":
            return {"content": "".join("!" if token == 50 else chr(token + 97) for token in body["tokens"])}
        assert path == "/completion" and body["temperature"] == 0 and body["ignore_eos"] and not body["cache_prompt"]
        self.prompts.append(body["prompt"])
        last = body["prompt"][-1]
        answer = [(last + 1 + i) % 26 for i in range(body["n_predict"])]
        if self.slips is not None:
            answer[self.slips] = 30
        if len(self.prompts) - 1 in self.bad:
            answer[3] = 50
        return {"tokens": answer[:-1] if self.cut else answer}


def text_of(folder: Path, letters: int = 40_000) -> TextFile:
    path = folder / "prose.txt"
    path.write_text("".join(chr(97 + i * i % 23) for i in range(letters)))
    return TextFile(path=path, sha256="t", name="prose.txt", size=letters)


def chunks(found: drift.Answers, speller: Speller) -> list[list[int]]:
    """What llama-perplexity computes on: it begins each chunk with the token that begins a text."""
    tokens = speller.call("/tokenize", {"content": found.text, "add_special": True, "parse_special": False})["tokens"]
    cut = [tokens[i : i + drift.CTX] for i in range(0, len(tokens), drift.CTX)]
    return [[BOS, *chunk[1:]] if speller.begins else chunk for chunk in cut]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("bad", [(), (0, 2)])
def test_the_second_half_of_each_chunk_is_an_answer(tmp_path: Path, begins: bool, bad: Sequence[int]) -> None:
    speller = Speller(begins=begins, bad=bad)
    found = drift.make(speller, text_of(tmp_path))  # type: ignore[arg-type]
    assert len(found.prompts) == drift.PROMPTS and len(speller.prompts) == drift.PROMPTS + len(bad)
    assert chunks(found, speller) == [[*prompt, *answer] for prompt, answer in zip(found.prompts, found.answers, strict=True)]
    assert all(len(prompt) == drift.ANSWER == len(answer) for prompt, answer in zip(found.prompts, found.answers, strict=True))
    assert len(set(found.prompts)) == drift.PROMPTS


def test_a_tokenizer_that_gives_other_tokens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only 0 answers give their tokens again"):
        drift.make(Speller(bad=range(100)), text_of(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="only 2 answers"):
        drift.make(Speller(), text_of(tmp_path, letters=1000))  # type: ignore[arg-type]


def test_an_answer_that_is_short_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="256 were asked for; log: log"):
        drift.make(Speller(cut=True), text_of(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(("a", "b", "count"), [("abc", "abc", 3), ("abc", "abd", 2), ("abc", "xbc", 0), ("abc", "ab", 2)])
def test_tokens_before_the_first_that_differs(a: str, b: str, count: int) -> None:
    assert drift.same([*map(ord, a)], [*map(ord, b)]) == count


def test_mean_has_the_error_of_its_prompts() -> None:
    assert drift.mean([10, 20, 30, 40]) == Metric(25.0, pytest.approx(6.455, abs=0.001))
    assert drift.mean([7, 7]) == Metric(7.0, 0.0) and math.isinf(drift.mean([7]).error)


class Rig:
    """Servers and llama-perplexity that are none: which were started, and with which text."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.texts: list[str] = []
        self.words: list[str] = []
        self.store = Store(folder / "results")
        self.job = Job(build=fake_build(folder, "llama-server", ""), model=MODEL, text=text_of(folder), threads=2)
        patch.setenv("TURBO_GGUF_HOME", str(folder / "home"))
        patch.setattr(drift, "_server", self.server)
        patch.setattr(kld, "measure", self.perplexity)

    @contextmanager
    def server(self, types: CacheSpec, *_: object) -> Iterator[Speller]:
        self.started.append(str(types))
        yield Speller(slips={"q4_0": 10, "turbo4": 200}.get(str(types)))

    def perplexity(self, cases: Sequence[Case], job: Job, store: Store) -> list[Result]:
        self.texts.append(job.text.path.read_text())
        done = {r.key: r for r in store.results()}
        for case in cases:
            if case.key not in done:
                made = result(str(case.types), 0.001 if str(case.types) != "f32" else 0.0)
                done[case.key] = msgspec.structs.replace(made, case=case, key=case.key, text=job.text.name)
                store.append([done[case.key]])
        return [done[case.key] for case in cases]

    def run(self, *types: str) -> dict[str, Result]:
        found = drift.measure(types, self.job, SETUP, self.store, self.words.append)
        return {str(r.case.types): r for r in found if not r.case.is_noise_floor}


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def test_each_type_is_compared_with_f16_along_one_path(rig: Rig) -> None:
    found = rig.run("turbo4")
    assert {name: r.stats.agreed.value for name, r in found.items() if r.stats.agreed} == {
        "f16": 256.0, "q8_0": 256.0, "q5_0": 256.0, "q4_0": 10.0, "q4_0 sink=4 tail=64": 256.0, "turbo4": 200.0
    }  # fmt: skip
    assert rig.started.count("f16") == 1, "it made the path, which it need not walk again"
    case = found["turbo4"].case
    assert (case.ctx, case.chunks, case.batch, case.base_batch) == (512, 4, 16, 16) and case.text_sha256 != "t"
    assert "answers of f16 have 26, 26, 26, 26 different tokens of 256: few are a loop" in rig.words
    assert "    q4_0: the first token that differs is 11, 11, 11, 11" in rig.words
    assert found["turbo4"].text == "greedy answers to prose.txt" and len(rig.texts[0]) == 4 * 512


def test_what_is_there_is_not_measured_again(rig: Rig) -> None:
    first = rig.run("turbo4")
    rig.started.clear()
    assert rig.run("turbo4") == first and rig.started == []
    assert set(rig.run("turbo4", "turbo3")) - set(first) == {"turbo3"} and rig.started == ["turbo3"]
    assert rig.texts[0] == rig.texts[-1], "the same path"


def test_an_interrupted_walk_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-perplexity had its say, and the server did not."""
    with monkeypatch.context() as patch:
        patch.setattr(drift, "same", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rig.run("turbo4")
    assert rig.run("turbo4")["turbo4"].stats.agreed == Metric(200.0, 0.0)


def test_another_build_walks_another_path(rig: Rig) -> None:
    rig.run("turbo4")
    rig.job = msgspec.structs.replace(rig.job, build=msgspec.structs.replace(rig.job.build, id="other"))
    rig.started.clear()
    rig.run("turbo4")
    assert rig.started[0] == "f16"


def test_a_table_has_the_column_and_others_do_not(rig: Rig) -> None:
    found = list(rig.run("turbo4").values())
    assert "200.0 ± 0.0" in report.quality(found) and "same tokens" in report.quality(found)
    assert "same tokens" not in report.quality([result("q4_0", 0.003)])


def test_the_page_has_a_section_without_verdicts(rig: Rig) -> None:
    rig.run("turbo4")
    gates = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.1)})
    rig.store.append([result("q4_0", 0.003)])
    root = tree(page.document(page.Records(rig.store.results(), [], []), gates))
    (table,) = section(root, "drift").iter("table")
    assert rows(table)["turbo4"]["same tokens"] == "200.0 ± 0.0" and "verdict" not in rows(table)["turbo4"]
    assert len(list(section(root, "quality").iter("table"))) == 1 and len(list(section(root, "verdicts").iter("tr"))) == 2
