"""A proof with programs of our own making: time limits, interruptions, crashes, resuming, tools that are missing, and verdicts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_proof
import prove_machine
import prove_measures
import prove_run
import prove_stages
import prove_targets
import pytest
from prove_ops import EXACT, FULL, SMALL, VARIANTS, Case, cases, variant_cases

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A proof for CUDA0 on a machine with an H200 and its tools."""
    tools = fake_proof.make(tmp_path, "CUDA0")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setattr(prove_run, "find_libraries", lambda folder: ([str(folder / "bin")], []))
    return tmp_path


def prove(folder: Path, *arguments: str, seconds: float = 100) -> int:
    out = ["--folder", str(folder / "proof"), "--out", str(folder / "out"), "--seconds", str(seconds)]
    return prove_run.main([*arguments, *out, "--small"])


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def ends(folder: Path) -> dict[str, str]:
    return {row["name"]: row["status"] for row in rows(folder, "stage")}


def summary(folder: Path) -> str:
    return (folder / "out/summary.md").read_text()


def test_all_stages_pass_and_leave_rows_and_verdicts(gpu: Path) -> None:
    assert prove(gpu) == 0
    assert ends(gpu) == dict.fromkeys(prove_run.STAGES, "pass")
    wanted = set(cases(SMALL)) | {case for name in VARIANTS for case in variant_cases(SMALL, name)}
    assert {prove_measures.case_of(row) for row in rows(gpu, "op")} == wanted
    assert {row["verdict"] for row in rows(gpu, "verdict")} == {"met"}
    assert [row["name"] for row in rows(gpu, "counters")] == [counted.name for counted in prove_measures.COUNTED]
    text = summary(gpu)
    assert "NVIDIA H200, 9.0, 580.1; patches of a test" in text
    assert "| decode turbo3 at 512 keys, speed over f16 | ≥ 2.5 | 3.33 | head 64, GQA 1, 1 x 512 | 2 of 2 | met |" in text
    assert "| decode | 256 | 50.0 (1.00), 900 MiB | 75.0 (1.50), 500 MiB |" in text
    assert "| decode turbo3, GQA 8 | 74.5 us |" in text
    assert sorted(path.name for path in (gpu / "out").iterdir()) == ["log.txt", "results.jsonl", "summary.md"]


def test_what_ended_is_not_repeated(gpu: Path) -> None:
    prove(gpu, "perf", "ops")
    measured = (gpu / "measured").read_text()
    prove(gpu, "perf", "ops")
    assert (gpu / "measured").read_text() == measured
    assert len(rows(gpu, "stage")) == 2
    prove(gpu, "perf", "--again")
    assert len((gpu / "measured").read_text()) == 2 * len(measured)
    assert ends(gpu) == {"perf": "pass"}


def test_another_build_is_measured_anew(gpu: Path) -> None:
    prove(gpu, "perf")
    plan = gpu / "proof/plan.json"
    plan.write_text(plan.read_text().replace("abc", "def"))
    prove(gpu, "perf")
    assert len(rows(gpu, "op")) == 2 * len(list(cases(SMALL)))


def test_a_stage_ends_with_its_share_of_the_time_and_keeps_what_it_has(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP_AT", "turbo4t")
    started = time.monotonic()
    assert prove(gpu, "perf", "order", seconds=8) == 4
    assert time.monotonic() - started < 12
    assert ends(gpu) == {"perf": "partial", "order": "pass"}
    assert [row["types"] for row in rows(gpu, "op")] == ["f16", "q8_0", "q4_0", "turbo3"]
    assert "| perf | partial |" in summary(gpu)
    assert f"4 of {len(list(cases(SMALL)))} cases, then the time was over" in summary(gpu)
    monkeypatch.delenv("SLEEP_AT")
    prove(gpu, "perf")
    assert ends(gpu)["perf"] == "pass"
    assert len(rows(gpu, "op")) == len(list(cases(SMALL)))


def test_when_everything_hangs_each_stage_still_ends_and_the_total_is_kept(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_machine, "KILL_AFTER", 0.05)
    monkeypatch.setattr(prove_run, "LEAST", float("-inf"))  # a busy machine is late
    hang = "trap '' TERM; echo hangs; while :; do sleep 1; done\n"
    for name in ("test-backend-ops", "llama-bench", "llama-perplexity"):
        fake_proof.program(gpu / "proof/bin", name, hang)
    for name in ("ncu", "compute-sanitizer"):
        fake_proof.program(gpu / "tools", name, f'[ "$1" = --help ] && exit\n{hang}')
    monkeypatch.setenv("SLEEP_AT", "q8_0")
    started = time.monotonic()
    assert prove(gpu, seconds=8) == 4
    assert time.monotonic() - started < 25
    assert ends(gpu).keys() == prove_run.STAGES.keys()
    assert {status for name, status in ends(gpu).items() if name != "variants"} == {"partial"}, "variants have no q8_0"
    assert [row["types"] for row in rows(gpu, "op") if not row["variant"]] == ["f16"], "what came before it is kept"


def test_results_are_written_after_every_stage(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(proof: prove_stages.Proof) -> prove_stages.Words:
        seen.append((ends(gpu), "| slices | pass |" in summary(gpu)))
        raise RuntimeError("a fault of ours")

    monkeypatch.setitem(prove_run.STAGES, "order", (look, 40))
    assert prove(gpu, "slices", "order", "perf") == 4
    assert seen == [({"slices": "pass"}, True)]
    assert ends(gpu) == {"slices": "pass", "order": "error", "perf": "pass"}
    assert "RuntimeError: a fault of ours" in summary(gpu)


def test_cases_that_hang_leave_those_that_passed_and_time_for_others(gpu: Path) -> None:
    code = "echo '  CPY(a=1): OK'; case \"$*\" in *kv=300*) sleep 30 ;; esac\n"
    fake_proof.program(gpu / "proof/bin", "test-backend-ops", code)
    assert prove(gpu, "ops", seconds=4) == 4
    hanging, others = "1 passed, 0 failed, 0 not supported, then the time was over", "decode and prefill: 1 passed, 0 failed"
    assert f"queries: partial, {hanging}; {others}" in summary(gpu)


def test_a_program_that_does_not_want_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_machine, "KILL_AFTER", 0.2)
    with (tmp_path / "log").open("w") as log:
        done = prove_machine.run(["sh", "-c", "trap '' TERM; echo here; while :; do sleep 1; done"], seconds=0.5, log=log)
    assert done.late
    assert done.lines == ["here\n"]
    assert done.rc == -signal.SIGKILL


def test_a_long_output_is_cut_in_the_log_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_machine, "LOGGED", 100)
    with (tmp_path / "log").open("w") as log:
        done = prove_machine.run(["seq", "1", "1000"], seconds=10, log=log)
    assert len(done.lines) == 1000
    text = (tmp_path / "log").read_text()
    assert "\n10\n" in text and "\n500\n" not in text and "[...]" in text and "\n1000\n" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_loses_nothing(gpu: Path, number: signal.Signals) -> None:
    argv = [sys.executable, "-S", "-E", str(gpu / "proof/prove_run.py"), "perf", "order", "--out", str(gpu / "out"), "--small"]
    process = subprocess.Popen(argv, env={**os.environ, "SLEEP_AT": "turbo3"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    results = gpu / "out/results.jsonl"
    for _ in range(100):
        time.sleep(0.1)
        if results.exists() and results.read_text().count('"kind": "op"') == 3:
            break
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert [row["types"] for row in rows(gpu, "op")] == ["f16", "q8_0", "q4_0"]
    assert ends(gpu) == {"perf": "error"}
    assert "| perf | error |" in summary(gpu) and "interrupted" in summary(gpu)
    prove(gpu, "perf")
    assert ends(gpu) == {"perf": "pass"}
    assert len(rows(gpu, "op")) == len(list(cases(SMALL)))


def test_a_line_that_was_cut_is_left_out(gpu: Path) -> None:
    prove(gpu, "perf")
    results = gpu / "out/results.jsonl"
    results.write_text(results.read_text() + '{"kind": "op", "op": "fat')
    key = rows_key(gpu)
    assert len([row for row in prove_run.load(results, key) if row["kind"] == "op"]) == len(list(cases(SMALL)))


def rows_key(folder: Path) -> str:
    line = (folder / "out/results.jsonl").read_text().splitlines()[0]
    return str(json.loads(line)["key"])


def test_a_case_that_crashes_does_not_take_the_others_with_it(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASH_AT", "turbo4t")
    monkeypatch.setattr(prove_measures, "MAX_CRASHES", 100)
    assert prove(gpu, "perf") == 4
    assert ends(gpu) == {"perf": "error"}
    crashed = {row["types"] for row in rows(gpu, "op") if row["status"] == "crashed"}
    assert crashed == {"turbo4t"}
    assert len(rows(gpu, "op")) == len(list(cases(SMALL)))
    verdict = next(row for row in rows(gpu, "verdict") if row["target"].startswith("decode turbo4t at"))
    assert verdict["verdict"] == "not measured"
    assert "| 30.0 (3.33) | crashed | 30.0 (3.33) |" in summary(gpu)


def test_a_device_that_is_lost_ends_the_stage(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASH_AT", "turbo3")
    assert prove(gpu, "perf", "order") == 4
    assert ends(gpu) == {"perf": "error", "order": "pass"}
    assert "3 crashes, the last one at fattn turbo3" in summary(gpu)


def test_a_fault_in_one_stage_does_not_cost_the_others(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_proof.program(gpu / "proof/bin", "llama-perplexity", "exit 0\n")
    (gpu / "proof/bin/llama-perplexity").chmod(0o644)
    assert prove(gpu, "order", "perf") == 4
    assert ends(gpu) == {"order": "error", "perf": "pass"}
    assert "PermissionError" in summary(gpu)


def test_failed_cases_are_named(gpu: Path) -> None:
    code = "echo '[CPY] NMSE = 0.1 > 0.001   CPY(type=turbo3): FAIL'; echo '  CPY(a=1): OK'; exit 1\n"
    fake_proof.program(gpu / "proof/bin", "test-backend-ops", code)
    assert prove(gpu, "slices") == 1
    assert "slices: fail, 1 passed, 1 failed, 0 not supported; CPY(type=turbo3)" in summary(gpu)


@pytest.mark.parametrize("code", ["echo 'CUDA error' >&2; kill -ABRT $$\n", "echo '0/0 tests passed'\n"])
def test_a_crash_and_no_case_at_all_are_no_verdict(gpu: Path, code: str) -> None:
    fake_proof.program(gpu / "proof/bin", "test-backend-ops", code)
    assert prove(gpu, "slices") == 4
    assert ends(gpu) == {"slices": "error"}


def test_a_proof_without_its_model_takes_another_or_leaves_out_what_needs_it(gpu: Path, tmp_path: Path) -> None:
    (gpu / "proof/model.gguf").unlink()
    assert prove(gpu, "order") == 0
    assert ends(gpu) == {"order": "skip"}
    other = tmp_path / "eval-model.gguf"
    other.touch()
    assert prove(gpu, "order", "--again", "--model", str(other)) == 0
    assert ends(gpu) == {"order": "pass"}
    assert f"-m {other}" in (gpu / "out/log.txt").read_text()


def test_another_perplexity_without_graphs_is_a_failure(gpu: Path) -> None:
    code = '[ -n "$GGML_CUDA_DISABLE_GRAPHS" ] && p=53.1 || p=53.2; echo "Final estimate: PPL = $p"\n'
    fake_proof.program(gpu / "proof/bin", "llama-perplexity", code)
    assert prove(gpu, "order") == 1
    assert "turbo3 53.2 / 53.1 / 53.2 / 53.2 / 53.2" in summary(gpu)


def test_another_perplexity_on_the_cpu_is_a_failure(gpu: Path) -> None:
    code = 'case "$*" in *"-dev none"*) p=52.1 ;; *-ngl*) p=53.2 ;; esac; echo "Final estimate: PPL = $p"\n'
    fake_proof.program(gpu / "proof/bin", "llama-perplexity", code)
    assert prove(gpu, "order") == 1


def test_sanitizers_look_at_our_kernels_in_one_case_of_each_family(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove(gpu, "sanitizers") == 0
    said = (gpu / "sanitized").read_text().splitlines()
    assert [line.split()[1] for line in said] == list(prove_stages.SANITIZERS)
    assert all("--kernel-name kns=turbo --error-exitcode 9" in line for line in said)
    monkeypatch.setenv("ERRORS", "3")
    assert prove(gpu, "sanitizers", "--again") == 1
    assert "memcheck: fail, 62 passed, 0 failed, 1 not supported, ERROR SUMMARY: 3 errors" in summary(gpu)


def test_tools_that_cannot_work_here_are_skipped_with_their_words(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFIT", "1")
    assert prove(gpu, "sanitizers", "counters") == 0
    assert ends(gpu) == {"sanitizers": "skip", "counters": "skip"}
    assert "Device not supported" in summary(gpu) and "ERR_NVGPUCTRPERM" in summary(gpu)


def test_tools_that_are_missing_are_skipped(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_stages, "find_tool", lambda name: "")
    monkeypatch.setattr(prove_measures, "find_tool", lambda name: "")
    assert prove(gpu, "sanitizers", "counters") == 0
    assert "needs an NVIDIA GPU and compute-sanitizer" in summary(gpu) and "needs an NVIDIA GPU and ncu" in summary(gpu)


def test_a_kernel_without_counters_does_not_cost_the_others(gpu: Path) -> None:
    code = 'case "$*" in *quantize_few*) echo "no kernels were profiled"; exit 1 ;; esac\n'
    fake_proof.program(gpu / "tools", "ncu", code + fake_proof.NCU)
    assert prove(gpu, "counters") == 4
    assert len(rows(gpu, "counters")) == len(prove_measures.COUNTED) - 1
    assert "writing a row of turbo3t: return code 1: no kernels were profiled" in summary(gpu)


def test_without_the_device_it_ends_with_3(gpu: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gpu / "proof/plan.json"
    plan.write_text(plan.read_text().replace("CUDA0", "GONE"))
    monkeypatch.setattr(prove_run, "find_libraries", lambda folder: ([], ["libcublas.so.13"]))
    assert prove(gpu) == 3
    words = capsys.readouterr().err
    assert "GONE cannot be used: return code 1: no device GONE; there are: CPU; libraries not found: libcublas.so.13" in words


def test_a_device_that_takes_a_second_to_start_is_waited_for(gpu: Path) -> None:
    """As real ones do: the first program loads 170 MB of kernels before any stage has begun."""
    fake_proof.program(gpu / "proof/bin", "test-turbo-perf", f"sleep 1\n{fake_proof.PERF}")
    assert prove(gpu, "perf") == 0
    assert ends(gpu) == {"perf": "pass"}


def test_libraries_are_found_in_the_folders_of_python_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site/nvidia/cu13/lib"
    folder.mkdir(parents=True)
    (folder / "libcublas.so.13").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delenv("CUBLAS_ROOT", raising=False)
    assert prove_machine.library_folders(["libcublas.so.13", "libother.so.1"]) == [str(folder)]


def test_stages_without_time_are_left_for_another_call(gpu: Path) -> None:
    assert prove(gpu, "order", seconds=0) == 4
    assert "| order | not run yet |" in summary(gpu)


def test_an_unknown_stage_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        prove_run.main(["opps"])
    assert caught.value.code == 2


# --- verdicts -------------------------------------------------------------------------------------------------------------------


def timed(us: dict[str, float], keys: int = 65536, head: int = 128, gqa: int = 8) -> list[dict[str, Any]]:
    status = {types: "ok" if time else "not supported" for types, time in us.items()}
    found = [(Case("fattn", types, head, gqa, 1, keys), time) for types, time in us.items()]
    return [{"kind": "op", **case._asdict(), "us": time, "status": status[case.types]} for case, time in found]


def verdict(found: list[dict[str, Any]], target: str, gpu: str = "NVIDIA H200") -> prove_targets.Verdict:
    return next(each for each in prove_targets.verdicts(found, FULL, gpu) if each.target == target)


@pytest.mark.parametrize(
    ("us", "gpu", "expected"),
    [
        (40.0, "NVIDIA H200", "met as far as measured"),
        (40.0, "NVIDIA GeForce RTX 4090", "missed"),
        (33.0, "gfx1100", "met as far as measured"),
        (40.0, "gfx942", "met as far as measured"),
        (41.0, "AMD Instinct MI300X", "missed"),
        (0.0, "NVIDIA H200", "missed"),
    ],
)
def test_decode_is_held_against_f16_by_the_kind_of_card(us: float, gpu: str, expected: str) -> None:
    found = verdict(timed({"f16": 100.0, "turbo3": us}), "decode turbo3 at 65536 keys, speed over f16", gpu)
    assert (found.verdict, found.n, found.of) == (expected, 1, 6)


def test_the_worst_shape_is_the_verdict() -> None:
    found = []
    for head in FULL.heads:
        for gqa in FULL.gqas:
            found += timed({"f16": 100.0, "turbo3": 30.0 if (head, gqa) != (256, 16) else 50.0}, head=head, gqa=gqa)
    worst = verdict(found, "decode turbo3 at 65536 keys, speed over f16")
    assert (worst.measured, worst.worst, worst.verdict) == (2.0, "head 256, GQA 16, 1 x 65536", "missed")
    assert (worst.n, worst.of) == (6, 6)


def test_a_type_is_not_slower_than_the_faster_rival() -> None:
    target = "decode turbo4, speed over q8_0 and q4_0"
    assert verdict(timed({"q8_0": 60.0, "q4_0": 40.0, "turbo4": 50.0}), target).measured == 0.8
    assert verdict(timed({"q8_0": 60.0, "turbo4": 50.0}), target).verdict == "not measured"


def test_prefill_and_writes_have_the_most_that_they_may_take() -> None:
    shapes = {"f16": 1000.0, "turbo3": 1049.0, "turbo4t": 1051.0}
    found = [{"kind": "op", **Case("fattn", types, 128, 4, 512, 32768)._asdict(), "us": us, "status": "ok"} for types, us in shapes.items()]
    for types, one, many in (("turbo3", 1.0, 14.0), ("turbo3t", 1.3, 16.0)):
        for n, us in ((1, one), (512, many)):
            found.append({"kind": "op", **Case("set_rows", types, 128, 1, n, 8192)._asdict(), "us": us, "status": "ok"})
    by_target = {each.target: each.verdict for each in prove_targets.verdicts(found, FULL, "NVIDIA H200")}
    assert by_target["attention of a prompt over turbo3, time over f16"] == "met"
    assert by_target["attention of a prompt over turbo4t, time over f16"] == "missed"
    assert by_target["writing K and V of one token as turbo3, microseconds of a layer"] == "met"
    assert by_target["writing K and V of one token as turbo3t, microseconds of a layer"] == "missed"
    assert by_target["writing a prompt as turbo3, time over attention with f16"] == "met"
    assert by_target["writing a prompt as turbo3t, time over attention with f16"] == "missed"


def peaks(of: dict[tuple[str, int], tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"kind": "bench", "types": types, "depth": depth, "test": "decode", "tokens_per_s": 1.0, "peak_mib": peak, "cache_mib": cache}
        for (types, depth), (peak, cache) in of.items()
    ]


def test_memory_is_held_against_q8_0_at_every_depth() -> None:
    found = peaks({("q8_0", 4096): (900, 1), ("q8_0", 32768): (1300, 1), ("turbo3", 4096): (890, 1), ("turbo3", 32768): (1310, 1)})
    assert verdict(found, "peak memory of turbo3 over that of q8_0").worst == "depth 32768"
    assert verdict(found, "peak memory of turbo3 over that of q8_0").verdict == "missed"
    assert verdict(found[:3], "peak memory of turbo3 over that of q8_0").verdict == "met as far as measured"


def test_memory_beside_the_cache_is_flat_but_for_what_grows_with_f16_too() -> None:
    f16 = {("f16", 4096): (1000, 64), ("f16", 32768): (1480, 512)}
    target = "memory beside the cache of {}, MiB that it grows by depth more than of f16"
    for last, measured, words in ((1146, 16, "met"), (1147, 17, "missed"), (1130, 0, "met")):
        found = verdict(peaks({**f16, ("turbo3", 4096): (1000, 14), ("turbo3", 32768): (last, 112)}), target.format("turbo3"))
        assert (found.measured, found.row()["measured"], found.verdict) == (measured, measured, words)
    one_depth = peaks({("f16", 4096): (1000, 64), ("turbo3", 4096): (1000, 14)})
    assert verdict(one_depth, target.format("turbo3")).verdict == "not measured"
    assert verdict(peaks(f16), target.format("turbo3")).verdict == "not measured"


def test_every_target_says_that_it_was_not_measured() -> None:
    found = prove_targets.verdicts([], FULL, "")
    assert {each.verdict for each in found} == {"not measured"}
    assert len(found) == len({each.target for each in found}) > 25


def test_kernels_whose_counters_are_read_have_these_names() -> None:
    folder = REPOSITORY / "ggml-patches/overlay/ggml/src/ggml-cuda"
    text = "\n".join(path.read_text("utf-8") for path in sorted(folder.rglob("*.cu*")))
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    assert len(kernels) > 7
    for counted in prove_measures.COUNTED:
        assert counted.kernel == "flash_attn" or any(re.search(counted.kernel, kernel) for kernel in kernels), counted


def test_the_cases_are_those_of_the_targets_and_fit_into_the_time() -> None:
    found = list(cases(FULL))
    assert len(found) == len(set(found))
    for keys in (4096, 65536):
        for gqa in (4, 8, 16):
            assert {Case("fattn", types, head, gqa, 1, keys) for types in ("f16", "q8_0", "turbo3") for head in (128, 256)} <= set(found)
    assert Case("set_rows", "turbo3t", 128, 1, 1, 8192) in found
    assert {case.gqa for case in found if case.op == "fattn"} == {1, 2, 4, 8, 16}
    assert {case.types for case in found if case.exact} == {"turbo3", "turbo3t", "turbo4", "turbo4t"}
    assert Case("fattn", "turbo3t", 128, 8, 1, 65536, EXACT).line == "fattn turbo3t turbo3t 128 8 8 1 65536 1 96"
    assert {case.queries for case in found if case.op == "fattn"} == {1, 2, 4, 8, 16, 512}
    assert len(found) * (0.15 + 0.5) < prove_run.STAGES["perf"][1], "half a second to fill a cache is an estimate"
    more = [case for name in VARIANTS for case in variant_cases(FULL, name)]
    assert len(more) * (0.15 + 0.5) < prove_run.STAGES["variants"][1]
    assert any(case.exact for case in more)
    assert sum(share for _, share in prove_run.STAGES.values()) == 560
    assert len(prove_measures.COUNTED) == 8
