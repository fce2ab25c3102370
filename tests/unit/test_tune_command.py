"""``tune``, and ``--cache-preset`` of the commands that take one. Risks: work before a mistake is named, a preset that is not what runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_gguf
from click.testing import CliRunner, Result
from fake_meter import FakeMeter
from measuring import fake_build

from turbo_gguf.cache.settings import AUTO
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.cli import bench, gate, main, serve
from turbo_gguf.cli import tune as command
from turbo_gguf.inputs import headers, models
from turbo_gguf.measure import unpacked
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.result import Result as Measured
from turbo_gguf.measure.store import Store
from turbo_gguf.plan.memory import Memory
from turbo_gguf.tune import meter, preset
from turbo_gguf.tune.preset import Made, Preset

TYPES = parse_types("turbo4t/turbo3t k=0:q8_0 cal=auto sink=4 tail=64")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", ctx=4096)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text\n" for i in range(500)))
    return path


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def written(path: Path, model: Path, types: CacheSpec = TYPES) -> Path:
    header = headers.read(str(model))
    return preset.write(path, Preset(types, Made.of(header.name, header.fields)))


@pytest.mark.parametrize("goals", [(), ("--bits", "3", "--max-kld", "1"), ("--bits", "3", "--memory", "1GiB")])
def test_one_goal(model: Path, goals: Sequence[str]):
    done = cli("tune", model, *goals)
    assert done.exit_code == 2
    assert "one of --bits, --memory and --max-kld" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("none.gguf", "--bits", "3"), "no such file"),
        (("{model}", "none.txt", "--bits", "3"), "none.txt: No such file"),
        (("{model}", "--bits", "0"), "Invalid value for '--bits'"),
        (("{model}", "--memory", "much"), "no amount of memory"),
        (("{model}", "--bits", "3", "--chunks", "0"), "Invalid value for '--chunks'"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(model: Path, monkeypatch: pytest.MonkeyPatch, args: Sequence[str], words: str):
    monkeypatch.setattr(command, "ensure_build", lambda *a, **k: pytest.fail("built"))
    done = cli("tune", *(arg.format(model=model) for arg in args))
    assert done.exit_code == 2, done.stderr
    assert words in done.stderr


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """A machine on which the model has known losses; the cases that were measured."""
    cases: list[Case] = []
    known = FakeMeter(2, (0.02, 0.002, 0.0004, 0.0008))

    def measure(asked: Sequence[Case], *_: object) -> list[Measured]:
        cases.extend(asked)
        return known.results([case.types for case in asked])

    monkeypatch.setattr(meter.kld, "measure", measure)
    monkeypatch.setattr(command, "ensure_build", lambda *a, **k: fake_build(tmp_path, "llama-perplexity", ""))
    monkeypatch.setattr(command, "_calibration", lambda *a: AUTO)
    monkeypatch.setattr(unpacked, "is_unpacked", lambda found: True)
    return cases


def test_a_search_ends_in_a_file_a_table_and_a_command(model: Path, text: Path, measured: list[Case], tmp_path: Path):
    done = cli("tune", model, text, "--bits", "3.5")
    assert done.exit_code == 0, done.output
    found = preset.for_model(tmp_path / "tiny.cache.toml", Made.of("tiny", headers.read(str(model)).fields))
    assert found.types.by_layer
    assert shlex.split(done.stdout)[:3] == ["llama-server", "-m", str(model)]
    assert found.types.k in shlex.split(done.stdout)
    assert "less than" in done.stderr
    assert "--cache-preset" in done.stderr
    rows: list[dict[str, Any]] = found.evidence["row"]
    assert [row["about"] for row in rows][0 :: len(rows) - 1] == ["tuned", "f16"]
    assert found.evidence["bits"] <= 3.5
    assert len({case.text_sha256 for case in measured}) == 2, "prices and the end result are of texts of their own"


def test_a_memory_that_holds_no_cache(model: Path, text: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command.Planner, "__init__", lambda self, *a, **k: None)
    monkeypatch.setattr(command.Planner, "memory", lambda self, *a: Memory(kv=10_000, copies=1000))
    monkeypatch.setattr(command.Planner, "charged", lambda self, *a: 20_000)
    done = cli("tune", model, text, "--memory", "0B")
    assert done.exit_code == 2, done.output
    assert "no allocation takes 0.000 bits per value" in done.stderr
    assert not measured


def test_the_winner_is_measured_on_text_that_the_search_never_saw(model: Path, text: Path, measured: list[Case], tmp_path: Path):
    cli("tune", model, text, "--bits", "3.5")
    winner = preset.read(tmp_path / "tiny.cache.toml").types
    unseen = measured[-1].text_sha256
    seen = [case for case in measured if case.text_sha256 == unseen]
    assert winner in [case.types for case in seen]
    assert len(seen) < 8


def test_losses_come_from_a_cluster(model: Path, text: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch):
    jobs: list[Job] = []
    asked: list[object] = []
    known = meter.kld.measure

    @contextmanager
    def joined(address: str, **how: object) -> Iterator[str]:
        asked.append((address, how))
        yield "far"

    def measure(cases: Sequence[Case], job: Job, store: Store) -> list[Measured]:
        jobs.append(job)
        return known(cases, job, store)

    monkeypatch.setattr(meter.kld, "measure", measure)
    monkeypatch.setattr(command.runner, "joined", joined)
    monkeypatch.setattr(unpacked, "is_unpacked", lambda found: False)
    monkeypatch.setattr(unpacked, "unpack", lambda build, found, threads: msgspec.structs.replace(found, sha256="wide"))
    done = cli("tune", model, text, "--bits", "3.5", "--ray", "10.0.0.1:6379")
    assert done.exit_code == 0, done.output
    assert asked == [("10.0.0.1:6379", {"upstream": None, "model": str(model)})]
    assert {job.elsewhere for job in jobs} == {"far"}
    own = models.read(model).sha256
    assert {(job.model.sha256, job.packed.sha256 if job.packed else None) for job in jobs} == {("wide", own), (own, None)}


def test_ppl_gate_and_bench_take_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path / "own.cache.toml", model)
    seen: list[CacheSpec] = []

    class EnoughError(Exception):
        pass

    def cases(asked: Sequence[Case], *_: object) -> None:
        seen.extend(case.types for case in asked)
        raise EnoughError

    def plan(asked: Any, *_: object) -> None:
        seen.extend(asked.types)
        raise EnoughError

    monkeypatch.setattr(gate.kld, "check_fit", cases)
    monkeypatch.setattr(bench.bench, "check_fit", plan)
    for args in (("ppl-gate", "--ctx", "512"), ("bench",)):
        seen.clear()
        assert cli(*args, "--model", model, "--cache-preset", path).exit_code == 4
        assert TYPES in seen
        assert CacheSpec("turbo3t", "turbo3t") not in seen


def test_serve_takes_it(model: Path, tmp_path: Path):
    path = written(tmp_path / "own.cache.toml", model)
    done = cli("serve", model, "--dry-run", "--memory", "8GiB", "--cache-preset", path)
    assert done.exit_code == 0, done.output
    words = shlex.split(done.stdout)
    assert words[words.index("-ctk") + 1] == "turbo4t"
    assert words[words.index("--cache-type-k-layers") + 1] == "0:q8_0"
    both = cli("serve", model, "--dry-run", "--cache-preset", path, "--type", "f16")
    assert both.exit_code == 2
    assert "leave one of them out" in both.stderr
    behind = cli("serve", model, "--dry-run", "--", "--cache-preset", path)
    assert behind.exit_code == 2


@pytest.mark.parametrize(("option", "value"), [("--type", "turbo9"), ("--cache-preset", "none.toml"), ("--cache-preset", "{other}")])
def test_serve_names_a_wrong_cache_before_it_builds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str):
    other = preset.write(tmp_path / "other.cache.toml", Preset(TYPES, Made("other", "", "qwen2", 24, 896)))
    monkeypatch.setattr(serve.build, "ensure_build", lambda *a, **k: pytest.fail("built"))
    done = cli("serve", model, "--memory", "8GiB", option, value.format(other=other), "--", "--port", "0")
    assert done.exit_code == 2, done.output
    assert value.format(other="qwen2") in done.stderr


@pytest.mark.parametrize("args", [("serve", "{model}", "--dry-run"), ("ppl-gate", "--model", "{model}"), ("bench", "--model", "{model}")])
def test_a_preset_for_another_model_is_refused(model: Path, tmp_path: Path, args: Sequence[str]):
    path = preset.write(tmp_path / "other.cache.toml", Preset(TYPES, Made("other", "", "qwen2", 24, 896)))
    done = cli(*(arg.format(model=model) for arg in args), "--cache-preset", path)
    assert done.exit_code == 2, done.output
    assert "it is for other (qwen2 with 24 layers of width 896)" in done.stderr
    assert "hint: search one for this model" in done.stderr
