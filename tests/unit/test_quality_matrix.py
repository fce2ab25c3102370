"""What the matrix over several models is asked to do, and what it makes of its results."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import quality_matrix
from gguf import GGUFReader
from measuring import result
from quality_matrix import Plan, Target

from turbo_gguf import assets
from turbo_gguf.cache.settings import OFF
from turbo_gguf.cache.spec import COMPETITORS, parse_types
from turbo_gguf.errors import EXIT_ENVIRONMENT, EnvironmentMissing, UsageError
from turbo_gguf.inputs import models
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result


@pytest.fixture
def plan() -> Plan:
    return quality_matrix.load()


def written(tmp_path: Path, change: tuple[str, str]) -> Path:
    text = (assets.eval_dir() / "matrix" / "matrix.toml").read_text("utf-8")
    assert change[0] in text
    path = tmp_path / "matrix.toml"
    path.write_text(text.replace(*change), "utf-8")
    return path


def some(scale: float = 1.0, **more: float) -> list[Result]:
    """turbo4t at .11 of q4_0's loss, and turbo3t at a quarter."""
    means = {"q8_0": 0.0004, "q5_0": 0.002, "q4_0": 0.008, "q4_0 sink=4 tail=64": 0.002, "turbo4t": 0.00088, "turbo3t": 0.002}
    means |= {"turbo2t": 0.008, "turbo4": 0.001, "turbo3": 0.003} | more
    return [result(types, scale * mean, 0.00001) for types, mean in means.items()]


# --- the list of models, types and targets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('lists = ["typed"] ', 'lists = ["typd"] '), "no list typd"),
        (('others = "qwen2.5-coder"', 'others = "qwen"'), "no model qwen"),
        (("head64 = 0.65", "head65 = 0.65"), "no model head65"),
        (("k_bias = 30.0", 'k_bias = "x"'), "k_bias"),
        (("outliers = true", "outlier = true"), "outlier"),
        (('"turbo4t/turbo3t"', '"turbo4t/turbo9"'), "turbo9"),
        (("chunks = 8", "chunks = 0"), "chunks = 0"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        quality_matrix.load(written(tmp_path, change))


def test_a_list_may_give_settings_to_its_types(plan: Plan) -> None:
    lists = {row.name: [str(spec) for spec in row.specs()] for row in plan.list}
    assert f"turbo4t {OFF}" in lists["plain"] and "turbo4t" in lists["typed"]
    assert "q4_0" in lists["typed"], "what is not ours stays plain"


def test_the_runs_measure_what_the_targets_name(plan: Plan) -> None:
    always = set(map(str, COMPETITORS))
    asked = {entry.name: {types for run in plan.sweep_of(entry).run for types in run.types} | always for entry in plan.model}
    for target in plan.target:
        for name in target.at_most:
            assert {str(parse_types(target.types)), str(parse_types(target.reference))} <= asked[name], (target, name)


def test_every_list_is_measured_with_some_model(plan: Plan) -> None:
    assert {row.name for row in plan.list} == {name for entry in plan.model for run in entry.run for name in run.lists}


def test_models_and_where_they_come_from(plan: Plan) -> None:
    def names(*arguments: str, sources: tuple[str, ...] = (), small: bool = False) -> list[tuple[str, str]]:
        return [(entry.name, entry.source) for entry in quality_matrix.chosen(plan, arguments, sources, small)]

    assert [name for name, _ in names()] == [entry.name for entry in plan.model]
    assert names("bias", "smollm2") == [("bias", "embedded"), ("smollm2", "smollm2")]
    assert names("smollm2", sources=("smollm2=/a/b=c.gguf",)) == [("smollm2", "/a/b=c.gguf")]
    assert names(sources=("mine=org/name",))[-1] == ("mine", "org/name")
    with pytest.raises(UsageError, match="no model nobody"):
        names("nobody")
    with pytest.raises(UsageError, match="no name"):
        names(sources=("model.gguf",))


def test_one_more_model_is_measured_like_a_real_one(plan: Plan) -> None:
    mine = quality_matrix.chosen(plan, ["mine"], ["mine=m.gguf"], False)[0]
    like = next(entry for entry in plan.model if entry.name == plan.others)
    assert (mine.run, mine.python, mine.k_bias, mine.outliers) == (like.run, False, None, False)


def test_small_has_all_lists_at_one_context(plan: Plan) -> None:
    for entry, whole in zip(quality_matrix.chosen(plan, [], [], True), plan.model, strict=True):
        assert [(run.ctx, run.chunks) for run in entry.run] == [(quality_matrix.SMALL, 1)]
        assert set(entry.run[0].lists) == {name for run in whole.run for name in run.lists}


# --- measuring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "plant"), [("outliers", "blk.0.attn_k.weight"), ("bias", "blk.0.attn_k.bias")])
def test_planted_models_are_the_same_bytes_every_time(
    plan: Plan, name: str, plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    entry = next(entry for entry in plan.model if entry.name == name)
    first = quality_matrix.prepare(entry, tmp_path / "a")
    assert quality_matrix.prepare(entry, tmp_path / "b").sha256 == first.sha256
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(first.path).tensors}
    source = {tensor.name: tensor.data for tensor in GGUFReader(assets.embedded_model()).tensors}
    assert plant not in source or not np.array_equal(tensors[plant], source[plant])
    assert first.name != models.embedded().name, "or it would be given the calibration of its source"


def test_models_are_found_below_eval_by_name_and_by_path(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    head64 = next(entry for entry in plan.model if entry.name == "head64")
    assert quality_matrix.prepare(head64, tmp_path).path == assets.eval_dir() / "models" / "head64.gguf"
    elsewhere = msgspec.structs.replace(head64, source=str(assets.embedded_model()))
    assert quality_matrix.prepare(elsewhere, tmp_path).path == assets.embedded_model()


def test_a_model_that_cannot_be_had_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    texts = {}

    class Build:
        class tree:  # noqa: N801
            digest = "d" * 64

    def measure(plan: Plan, entry: quality_matrix.Entry, build: object, text: quality_matrix.TextFile, threads: int) -> list[Result]:
        texts[entry.name] = text.name
        if entry.name == "smollm2":
            raise EnvironmentMissing("no network", "plug it in")
        return some()

    monkeypatch.setattr(quality_matrix, "ensure_build", lambda *_, **__: Build)
    monkeypatch.setattr(quality_matrix, "measure", measure)
    (tmp_path / "prose.txt").write_text("words")
    asked = argparse.Namespace(
        models=["smollm2", "qwen2.5-coder", "embedded"], source=[], small=False, text=tmp_path / "prose.txt", preset="cpu", threads=1
    )
    assert quality_matrix.run(argparse.Namespace(**vars(asked), out=tmp_path / "out")) == EXIT_ENVIRONMENT
    assert "error: smollm2: no network" in capsys.readouterr().err
    assert texts == {"smollm2": "prose.txt", "qwen2.5-coder": "prose.txt", "embedded": "held-out-stdlib.txt"}
    made = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "## qwen2.5-coder" in made and "## embedded" in made and "smollm2" not in made.partition("## What we aimed at")[0]


# --- the document ---------------------------------------------------------------------------------------------------------


def test_targets_say_what_was_reached() -> None:
    targets = [Target("turbo4t", "q4_0", {"a": 0.2, "b": 0.05}), Target("turbo3t", "q4_0 sink=4 tail=64", {"a": 1.0, "c": 1.0})]
    rows = {(row[0], row[1]): row[3:] for row in quality_matrix.target_rows(targets, {"a": some(), "b": some()})}
    assert rows == {
        ("turbo4t / q4_0", "a"): ["0.1100 ± 0.0013", "0.2", "met"],
        ("turbo4t / q4_0", "b"): ["0.1100 ± 0.0013", "0.05", "**missed**"],
        ("turbo3t / `q4_0 sink=4 tail=64`", "a"): ["1.0000 ± 0.0071", "1", "met, within the error"],
    }, "what was not measured has no row"


def test_close_to_a_target() -> None:
    assert quality_matrix.met(Metric(0.69, 0.02), 0.7) == "met, within the error"
    assert quality_matrix.met(Metric(0.71, 0.02), 0.7) == "**missed**, within the error"


def test_settings_that_make_it_worse_are_named() -> None:
    plain = {f"turbo3t {OFF}": 0.001, "q4_0 cal=auto": 0.009, "q4_0 cal=auto sink=4 tail=64": 0.0019}
    assert quality_matrix.worse_with_more({"a": some(**plain)}) == [
        "a, context 512: `q4_0 cal=auto` 0.00900 ± 0.00001, and `q4_0` 0.00800 ± 0.00001",
    ], "one setting, or both kinds of exact tokens: turbo3t differs from its plain type in all three"
    steps = {"turbo3t tail=0": 0.0019, "turbo3t cal=none": 0.0018, "turbo3t sink=0 tail=0": 0.0017}
    assert [line.partition(": ")[2] for line in quality_matrix.worse_with_more({"a": some(**steps)})] == [
        "`turbo3t` 0.00200 ± 0.00001, and `turbo3t cal=none` 0.00180 ± 0.00001",
        "`turbo3t` 0.00200 ± 0.00001, and `turbo3t tail=0` 0.00190 ± 0.00001",
        "`turbo3t` 0.00200 ± 0.00001, and `turbo3t sink=0 tail=0` 0.00170 ± 0.00001",
        "`turbo3t tail=0` 0.00190 ± 0.00001, and `turbo3t sink=0 tail=0` 0.00170 ± 0.00001",
    ]


def test_the_document_has_every_table_and_every_model(plan: Plan) -> None:
    found = {"smollm2": some(), "bias": some(2, turbo2=0.02, **{f"turbo2t {OFF}": 0.1})}
    text = quality_matrix.document(plan, plan.model, found)
    assert re.search(r"\| cache K/V +\| bits \| +smollm2, 512 \| +bias, 512 \|", text)
    assert re.search(r"\| turbo4t +\| +4.25(?: \| +0.110 ± 0.001 \(0.110, 0.110\)){2} \|", text)
    assert re.search(r"\| turbo2 +\| +2.5 \| +\| +2.500 ± ", text), "what one model lacks is blank"
    assert "turbo4t/turbo3t" not in text, "what no model was measured with"
    assert "## What each of the defaults does" not in text, "a table that no model was measured for"
    assert text.index("## As typed") < text.index("## What we aimed at") < text.index("\n## smollm2\n") < text.index("\n## bias\n")
    assert "[smollm2](#smollm2) | SmolLM2" in text and "| `1a2b3c4d` |" in text
    assert "Nothing is worse" in text
