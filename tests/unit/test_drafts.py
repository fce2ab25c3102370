"""scripts/bench/drafts.py: gains, and how servers are started. No server, no model."""

from __future__ import annotations

import argparse
from pathlib import Path

import drafts
import pytest

from turbo_gguf.cache.spec import parse_types
from turbo_gguf.inputs import models
from turbo_gguf.make.build import Build
from turbo_gguf.patchset.tree import Tree

ARGS = argparse.Namespace(n_max=6, n=96, rounds=3, threads=2)


def speed(*rates: float, drafted: int = 0, accepted: int = 0) -> drafts.Speed:
    found = drafts.Speed()
    for rate in rates:
        found.add({"predicted_per_second": rate, "draft_n": drafted, "draft_n_accepted": accepted})
    return found


def test_gains_are_of_medians_and_beside_those_of_f16_at_the_same_depth(tmp_path: Path) -> None:
    pairs = [
        drafts.Pair(parse_types("f16"), 512, speed(10, 11, 90), speed(22, 1, 23, drafted=7, accepted=5)),
        drafts.Pair(parse_types("turbo3t"), 512, speed(20, 20, 20), speed(30, 30, 30)),
        drafts.Pair(parse_types("turbo3t"), 2048, speed(20), speed(30)),
    ]
    build = Build(id="", path=tmp_path, preset="cpu", tree=Tree(path=tmp_path, upstream="", commit="c", digest="d"), compiler="")
    text = drafts.table(models.embedded(), build, pairs, ARGS, "by a draft")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    assert rows[0] == ["512", "f16", "11.0", "22.0", "2.00", "1.00", "15 of 21"]
    assert rows[1] == ["512", "turbo3t", "20.0", "30.0", "1.50", "0.75", "0 of 0"]
    assert rows[2][5] == ""  # f16 was not measured there


def test_a_draft_has_the_types_of_its_target() -> None:
    options = drafts.drafting(ARGS, models.embedded(), parse_types("turbo4t/turbo3t tail=8"))
    assert options[options.index("-ctkd") + 1 :][:3] == ["turbo4t", "-ctvd", "turbo3t"]
    assert "--cache-tail" not in options
    assert drafts.drafting(ARGS, None, parse_types("f16")) == ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", "6"]


@pytest.mark.parametrize(
    "options",
    [("--depths", "0"), ("--rounds", "0"), ("--types", "turbo9"), ("--model", "missing.gguf"), ("--draft", "missing.gguf")],
    ids=str,
)
def test_bad_input(options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text", "utf-8")
    monkeypatch.setattr(drafts, "ensure_build", lambda *_, **__: pytest.fail("it builds"))
    assert drafts.main(["--text", str(text), *options]) == 2


def test_a_text_that_is_not_there(tmp_path: Path) -> None:
    assert drafts.main(["--text", str(tmp_path / "missing.txt")]) == 2
