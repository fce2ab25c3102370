"""``turbo-gguf report``: what is said, where, and with which exit code. Risks: an empty store, a damaged one, a wrong folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from measuring import result, run_of, serve_row
from page_tree import text, tree

from turbo_gguf.cli import main
from turbo_gguf.measure.case import METRICS_VERSION
from turbo_gguf.measure.store import Store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def call(*args: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, args)])


def test_it_writes_one_file_and_prints_its_path(home: Path, tmp_path: Path) -> None:
    Store().append(run_of(turbo4=0.002))
    done = call()
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{home / 'report' / 'report.html'}\n", "")
    assert "turbo4" in text(tree((home / "report" / "report.html").read_text("utf-8")))
    other = tmp_path / "deep" / "page.html"
    assert (
        call("--store", home / "results", "-o", other).stdout == f"{other}\n"
        and other.read_bytes() == Path(done.stdout.strip()).read_bytes()
    )


def test_a_failed_verdict_is_no_failure_of_a_page(home: Path) -> None:
    Store().append(run_of(turbo4=0.5))
    assert call().exit_code == 0 and "fail: turbo4" in text(tree((home / "report" / "report.html").read_text("utf-8")))


def test_limits_may_be_others(home: Path, tmp_path: Path) -> None:
    Store().append(run_of(turbo4=0.002))
    gates = tmp_path / "gates.toml"
    gates.write_text('[type.turbo4]\nreference = "q4_0"\nmean_kld = 0.1\n')
    assert call("--gates", gates).exit_code == 0
    assert "fail: turbo4" in text(tree((home / "report" / "report.html").read_text("utf-8")))
    gates.write_text("[type.turbo4]\n")
    assert call("--gates", gates).exit_code == 2


def test_some_models_only(home: Path) -> None:
    other = [
        msgspec.structs.replace(r, key=f"{r.key}b", model="Other 1B", case=msgspec.structs.replace(r.case, model_sha256="b"))
        for r in run_of(turbo4=0.003)
    ]
    Store().append([*run_of(turbo4=0.002), *other])
    page = home / "report" / "report.html"
    assert call().exit_code == 0 and "on 2 models" in text(tree(page.read_text("utf-8")))
    assert call("--model", "other").exit_code == 0
    shown = text(tree(page.read_text("utf-8")))
    assert "on 1 model," in shown and "Other 1B" in shown
    wrong = call("--model", "other", "--model", "third")
    assert wrong.exit_code == 2 and "--model third: no result is of such a model" in wrong.stderr and "Other 1B" in wrong.stderr


def test_serving_alone_is_enough() -> None:
    Store().append([serve_row("f16")])
    assert call().exit_code == 0


def test_an_empty_store_is_2_and_nothing_is_written(home: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no such"):
        done = call("--store", folder)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: {folder}/results.jsonl: no results\n"
            "hint: measure with turbo-gguf ppl-gate, bench or bench-serve, or name a folder with --store\n"
        )
    assert not (home / "report").exists()


def test_the_folder_above_the_store_has_a_hint(home: Path) -> None:
    Store().append(run_of())
    done = call("--store", home)
    assert (done.exit_code, done.stderr) == (2, f"error: {home}: no results here\nhint: --store {home / 'results'}\n")


def test_a_broken_record_is_2_and_is_named(home: Path) -> None:
    store = Store()
    store.append(run_of())
    store.path.write_bytes(b'{"kind":"kld","schema_version":1}\n' + store.path.read_bytes())
    done = call()
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {store.path}:1: not a result: ") and "hint: move the line away" in done.stderr
    store.path.write_bytes(b'{"kind":"kld","schema_version":999}\n')
    done = call()
    assert done.exit_code == 2 and "schema version 999" in done.stderr and "hint: update turbo-gguf" in done.stderr


def test_a_torn_last_line_is_no_matter(home: Path) -> None:
    store = Store()
    store.append(run_of(turbo4=0.002))
    store.path.write_bytes(store.path.read_bytes() + b'{"kind":"kl')
    assert call().exit_code == 0


def test_results_of_other_metrics_are_left_out_and_counted(home: Path) -> None:
    one = result("q4_0", 0.003)
    old = msgspec.structs.replace(one, case=msgspec.structs.replace(one.case, metrics_version=METRICS_VERSION - 1))
    Store().append([old])
    done = call()
    assert done.exit_code == 2 and "all 1 results are of another version of the metrics" in done.stderr
    Store().append(run_of())
    assert call().exit_code == 0
    assert "1 result of another version of the metrics is left out." in text(tree((home / "report" / "report.html").read_text("utf-8")))


def test_a_place_that_cannot_be_written_to_is_3(tmp_path: Path) -> None:
    Store().append(run_of())
    (tmp_path / "file").write_text("x")
    done = call("-o", tmp_path / "file" / "page.html")
    assert done.exit_code == 3 and done.stderr.startswith(f"error: {tmp_path}/file: ")
