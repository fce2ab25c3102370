"""``ppl-gate --drift`` and ``--retrieval``: what is built, what is measured, and what the table says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from measuring import fake_build, result

from turbo_gguf.cli import gate as command
from turbo_gguf.cli import main
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result

MEANS = {"f32": 0.0, "f16": 0.000003, "q8_0": 0.00003, "q5_0": 0.0007, "q4_0": 0.0028, "turbo4t": 0.0004}


def measured(cases: Sequence[Case], *_: object) -> list[Result]:
    made = [result(str(case.types), MEANS.get(str(case.types), 0.0005)) for case in cases]
    return [msgspec.structs.replace(r, case=case, key=case.key) for r, case in zip(made, cases, strict=True)]


def with_stats(results: Sequence[Result], **stats: Metric) -> list[Result]:
    return [msgspec.structs.replace(r, stats=msgspec.structs.replace(r.stats, **stats)) for r in results]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    seen: dict[str, Any] = {}

    def build(*_: object, **options: Any) -> object:
        seen["targets"] = options["targets"]
        return fake_build(tmp_path, "llama-perplexity", "")

    def along(types: Sequence[str], job: object, setup: Any, *_: object) -> list[Result]:
        seen["drift"] = (types, setup.build_id)
        return [msgspec.structs.replace(r, text="greedy answers") for r in with_stats([result("turbo4t", 0.001)], agreed=Metric(99.5, 7.0))]

    def asked(results: Sequence[Result], *_: object) -> list[Result]:
        seen["retrieval"] = True
        return with_stats(results, found=Metric(87.5, 11.7))

    monkeypatch.setattr(command, "ensure_build", build)
    monkeypatch.setattr(command.kld, "measure", measured)
    monkeypatch.setattr(command.drift, "measure", along)
    monkeypatch.setattr(command.retrieval, "measure", asked)
    return seen


def run(tmp_path: Path, *options: str) -> tuple[int, str]:
    argv = ["ppl-gate", "--types", "turbo4t", "--ctx", "512", "--out", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(main, argv)
    return done.exit_code, done.stdout


def test_neither_is_measured_without_being_asked_for(tmp_path: Path, calls: dict[str, Any]) -> None:
    code, out = run(tmp_path)
    assert code == 0 and "same tokens" not in out and "codes found" not in out
    assert calls == {"targets": ("llama-perplexity",)}


def test_drift_is_a_table_of_its_own(tmp_path: Path, calls: dict[str, Any]) -> None:
    code, out = run(tmp_path, "--drift")
    assert code == 0 and calls == {"targets": ("llama-perplexity", "llama-server"), "drift": (("turbo4t",), "fake")}
    first, _, last = out.rpartition("### ")
    assert "99.5 ± 7.0" in last and "greedy answers" in last and "same tokens" not in first
    assert "99.5 ± 7.0" in (tmp_path / "out" / "table.md").read_text()


def test_retrieval_is_a_column(tmp_path: Path, calls: dict[str, Any]) -> None:
    code, out = run(tmp_path, "--retrieval")
    assert code == 0 and calls == {"targets": ("llama-perplexity", "llama-server"), "retrieval": True}
    rows = [line for line in out.splitlines() if line.startswith("| turbo4t ")]
    assert "codes found %" in out and "87.5 ± 11.7" in rows[0]
