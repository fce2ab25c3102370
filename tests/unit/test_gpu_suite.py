"""The GPU suite with tools of our own making: verdicts, resuming, time, and what is read from output."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_stages
import gpu_suite
import pytest
from gpu_stages import Suite

from turbo_gguf.errors import ToolFailed
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import cuda, rocm
from turbo_gguf.patchset.tree import Tree


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A suite on CUDA0 whose build is a folder of scripts."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    options = argparse.Namespace(preset="cuda", device="CUDA0", small=False, out=tmp_path / "out", seconds=100.0)
    made = Suite(options)
    (tmp_path / "build/bin").mkdir(parents=True)
    made.build = Build(id="b", path=tmp_path / "build", preset="cuda", tree=Tree(tmp_path, "u", "c", "d"), compiler="cc")
    monkeypatch.setattr(gpu_stages, "ensure_build", lambda *a, **k: made.build)
    return made


def tool(suite: Suite, name: str, code: str) -> None:
    assert suite.build is not None
    path = suite.build.path / "bin" / name
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def test_ops_pass_when_all_cases_do(suite: Suite) -> None:
    tool(suite, "test-backend-ops", 'echo "$@" >&2; echo "  40/40 tests passed"; echo "  2/2 tests passed"')
    assert gpu_stages.ops(suite) == ("pass", "42 of 42 cases, 0 not supported")
    assert "test -b CUDA0 -o SET_ROWS,GET_ROWS,CPY" in (suite.out / "logs/ops.err").read_text()


def test_slices_are_short_enough_that_there_are_several(suite: Suite) -> None:
    tool(suite, "test-backend-ops", 'echo "$GGML_TURBO_CUDA_SLICE $@" >&2; echo "  33/33 tests passed"')
    assert gpu_stages.slices(suite) == ("pass", "33 of 33 cases, 0 not supported")
    assert "512 test -b CUDA0 -o FLASH_ATTN_EXT -p kv=(1536|1700)" in (suite.out / "logs/slices.err").read_text()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("echo '  CPY(type_src=f32): FAIL'; echo '  39/40 tests passed'; exit 1", "fail"),
        ("echo 'CUDA error' >&2; kill -ABRT $$", "error"),
        ("echo '0/0 tests passed'", "error"),
    ],
)
def test_ops_that_fail_are_told_from_a_crash(suite: Suite, code: str, status: str) -> None:
    tool(suite, "test-backend-ops", code)
    found = gpu_stages.ops(suite)
    assert found[0] == status
    assert status != "fail" or found[1].endswith("CPY(type_src=f32)")


def test_the_sanitizer_checks_our_kernels_only(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(suite, "test-backend-ops", "echo '  4/4 tests passed'")
    program = tmp_path / "bin/compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ $1 = --help ] && { echo "  --kernel-name arg"; exit; }\necho "$@" >&2\n'
        'while [ "${1##*/}" != test-backend-ops ]; do shift; done\n"$@"; echo "= ERROR SUMMARY: ${ERRORS:-0} errors"; exit ${RC:-0}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    status, note = gpu_stages.memcheck(suite)
    assert status == "pass"
    assert note.count("4 of 4 cases") == len(gpu_stages.SANITIZER_CASES)
    log = (suite.out / "logs/memcheck-flash_attn_ext.err").read_text()
    assert "--tool memcheck --kernel-name kns=turbo --error-exitcode 9" in log
    monkeypatch.setenv("RC", "9")
    monkeypatch.setenv("ERRORS", "3")
    status, note = gpu_stages.racecheck(suite)
    assert status == "fail"
    assert "3 errors" in note


def test_without_a_sanitizer_the_stage_is_skipped(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    suite.device = "ROCm0"
    assert gpu_stages.memcheck(suite) == ("skip", "needs an NVIDIA GPU and compute-sanitizer")


def test_another_perplexity_without_graphs_is_a_failure(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(suite, "llama-perplexity", 'echo "Final estimate: PPL = 53.1"')
    assert gpu_stages.order(suite)[0] == "pass"
    tool(suite, "llama-perplexity", '[ -n "$GGML_CUDA_DISABLE_GRAPHS" ] && p=53.1 || p=53.2; echo "Final estimate: PPL = $p"')
    status, note = gpu_stages.order(suite)
    assert status == "fail"
    assert note.endswith("turbo4 53.2 / 53.1 / 53.2")
    tool(suite, "llama-perplexity", "exit 1")
    assert gpu_stages.order(suite)[0] == "error"


@pytest.mark.parametrize(("device", "options"), [("CUDA0", ["-ngl 999"]), ("ROCm0", ["-ngl 999"]), ("CPU", [])])
def test_all_layers_are_on_the_device(suite: Suite, monkeypatch: pytest.MonkeyPatch, device: str, options: list[str]) -> None:
    suite.device = device
    monkeypatch.setattr(gpu_stages, "_model", lambda suite: Path("x"))
    tool(suite, "llama-perplexity", 'echo "$@" >&2; echo "Final estimate: PPL = 53.1"')
    tool(suite, "llama-bench", 'echo "$@" >&2')
    gpu_stages.order(suite)
    gpu_stages._llama_bench(suite, "turbo3", [], "bench-turbo3")
    for log in ("order-turbo3-serial", "bench-turbo3"):
        assert re.findall(r"-ngl \S+", (suite.out / f"logs/{log}.err").read_text()) == options


def test_memory_is_held_against_the_rivals(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = dict(zip(gpu_stages.CACHE_TYPES, (900, 500, 400, 350, 340, 300, 290, 250, 240), strict=True))
    now = {"used": 1000}
    suite.out.mkdir()

    def run(made: Suite, types: str, arguments: object, log: str) -> list[dict[str, object]]:
        now["used"] = 1000 + peaks[types]
        gpu_stages.time.sleep(0.06)
        now["used"] = 1000
        return []

    monkeypatch.setattr(gpu_stages, "_llama_bench", run)
    monkeypatch.setattr(gpu_stages, "read_memory", lambda device: now["used"])
    assert gpu_stages.memory(suite)[0] == "pass"
    assert json.loads((suite.out / "memory.json").read_text()) == peaks
    peaks["q4_0"] = 299
    assert gpu_stages.memory(suite)[0] == "fail"
    monkeypatch.setattr(gpu_stages, "read_memory", lambda device: None)
    assert gpu_stages.memory(suite)[0] == "skip"


def test_the_model_is_written_once_and_is_one(suite: Suite) -> None:
    suite.small = True
    path = gpu_stages._model(suite)
    assert path.read_bytes()[:4] == b"GGUF"
    written = path.stat().st_mtime_ns
    assert gpu_stages._model(suite).stat().st_mtime_ns == written


def options(tmp_path: Path, *more: str) -> list[str]:
    return ["--device", "CPU", "--out", str(tmp_path / "out"), *more]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, gpu_stages.Words]:
    """Two stages whose ends a test chooses; "runs" counts."""
    ends: dict[str, gpu_stages.Words] = {"build": ("pass", "done"), "ops": ("pass", "42 of 42 cases")}
    runs: list[str] = []

    def made(name: str) -> object:
        def stage(suite: Suite) -> gpu_stages.Words:
            runs.append(name)
            if ends[name][0] == "error":
                raise ToolFailed(f"{suite.out}/logs/ops.err: no end after 3 s\nkilled")
            return ends[name]

        return stage

    monkeypatch.setattr(gpu_suite, "STAGES", {name: (made(name), 10.0) for name in ends})
    ends["runs"] = runs  # type: ignore[assignment]
    return ends


def test_stages_that_ended_are_not_repeated(tmp_path: Path, stages: dict[str, gpu_stages.Words]) -> None:
    assert gpu_suite.main(options(tmp_path)) == 0
    assert gpu_suite.main(options(tmp_path)) == 0
    assert stages["runs"] == ["build", "ops"]
    assert gpu_suite.main(options(tmp_path, "ops", "--again")) == 0
    assert stages["runs"] == ["build", "ops", "ops"]
    text = (tmp_path / "out/summary.md").read_text()
    assert "| ops | pass |" in text


def test_an_error_is_tried_again_and_names_no_path(tmp_path: Path, stages: dict[str, gpu_stages.Words]) -> None:
    stages["ops"] = ("error", "")
    assert gpu_suite.main(options(tmp_path)) == 4
    text = (tmp_path / "out/summary.md").read_text()
    assert "logs/ops.err: no end after 3 s; killed" in text
    assert str(tmp_path) not in text
    stages["ops"] = ("fail", "41 of 42 cases")
    assert gpu_suite.main(options(tmp_path)) == 1
    assert stages["runs"] == ["build", "ops", "ops"]


def test_what_does_not_fit_into_the_time_is_left(tmp_path: Path, stages: dict[str, gpu_stages.Words]) -> None:
    assert gpu_suite.main(options(tmp_path, "--seconds", "5")) == 0
    assert stages["runs"] == []
    assert "| ops | not run yet |" in (tmp_path / "out/summary.md").read_text()


def test_a_machine_without_a_gpu_ends_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "gpus", lambda: [])
    monkeypatch.setattr(rocm, "gpus", lambda: [])
    assert gpu_suite.main(["--out", str(tmp_path)]) == 3
    assert "error: no GPU found" in capsys.readouterr().err
    monkeypatch.setattr(rocm, "gpus", lambda: ["gfx1100"])
    assert gpu_suite.find_device() == ("rocm", "ROCm0")


def test_an_unknown_stage_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_suite.main(["opps"])
    assert caught.value.code == 2


def test_the_bench_table_has_ratios_to_f16() -> None:
    rows = [
        {"n_depth": depth, "n_prompt": prompt, "type_k": types, "avg_ts": speed}
        for depth, prompt, types, speed in (
            (0, 512, "f16", 200.0),
            (0, 512, "turbo3", 190.0),
            (4096, 0, "f16", 50.0),
            (4096, 0, "turbo3", 100),
        )
    ]
    assert gpu_suite.bench_table(rows) == [
        "| test | depth | f16 | turbo3 |",
        "|---|---|---|---|",
        "| decode | 4096 | 50.0 (1.00) | 100.0 (2.00) |",
        "| prefill | 0 | 200.0 (1.00) | 190.0 (0.95) |",
    ]


# The shell script around it

SCRIPT = Path(__file__).parents[2] / "scripts/gpu/gpu_suite.sh"


def shell(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a Python that has no packages, and no kit."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "TURBO_GGUF_HOME": str(tmp_path / "home")}
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)


def test_missing_modules_end_with_3_and_the_command(tmp_path: Path) -> None:
    done = shell(tmp_path, "build")
    assert done.returncode == 3
    assert "lacks click filelock gguf huggingface_hub matplotlib msgspec numpy unidiff" in done.stderr
    assert "hint: scripts/gpu/gpu_suite.sh prepare on a machine with a network" in done.stderr


def test_prepare_knows_its_options(tmp_path: Path) -> None:
    done = shell(tmp_path, "prepare", "--pyton", "3.12")
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
