"""The benchmark of single ops: its cases, its targets, and what a program that crashes leaves."""

from __future__ import annotations

import json
from pathlib import Path

import bench_gpu
import pytest
from bench_gpu import Case, Row

from turbo_gguf.errors import ToolFailed

PROGRAM = """\
import json, sys
for n, line in enumerate(sys.stdin):
    if "CRASH" in sys.argv and n == 2:
        print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
        sys.exit(134)
    op, k, v, *numbers = line.split()
    status = "not supported" if k == "q4_0" else "ok"
    us = 0.0 if status != "ok" else {"f16": 100.0, "q8_0": 60.0}.get(k, 50.0)
    print(json.dumps({"us": us, "us_min": us, "us_max": us, "bytes": 1e6, "status": status}), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "test-turbo-perf"
    path.write_text(f"#!/usr/bin/env python3\n{PROGRAM}")
    path.chmod(0o755)
    return path


def row(case: Case, us: float, status: str = "ok") -> Row:
    return Row(case, us, us, us, 1e6, status, "CUDA0", "b")


def decode(types: str, keys: int = 65536) -> Case:
    return Case("fattn", types, 128, 4, 1, keys)


def test_the_cases_are_those_of_the_targets() -> None:
    found = list(bench_gpu.cases())
    assert len(found) == len(set(found))
    for types in bench_gpu.TURBO:
        for keys in bench_gpu.DECODE_TARGETS:
            for head in (128, 256):
                for gqa in (4, 8):
                    assert Case("fattn", types, head, gqa, 1, keys) in found
    assert Case("fattn", "f16", 128, 4, 512, 32768) in found
    assert Case("set_rows", "turbo3", 256, 8, 512, 8192) in found
    assert len(list(bench_gpu.cases(small=True))) < 60


def test_a_case_is_a_line() -> None:
    assert decode("turbo4/turbo3").line == "fattn turbo4 turbo3 128 8 4 1 65536 1"
    assert decode("f16").line == "fattn f16 f16 128 8 4 1 65536 1"


def test_rows_are_kept_and_not_measured_again(program: Path, tmp_path: Path) -> None:
    argv = ["--program", str(program), "--device", "CPU", "--small", "--out", str(tmp_path / "out")]
    assert bench_gpu.main(argv) == 0
    lines = (tmp_path / "out/ops.jsonl").read_text().splitlines()
    assert len(lines) == len(list(bench_gpu.cases(small=True)))
    assert json.loads(lines[0])["case"]["types"] == "f16"
    assert bench_gpu.main(argv) == 0
    assert (tmp_path / "out/ops.jsonl").read_text().splitlines() == lines
    text = (tmp_path / "out/ops.md").read_text()
    assert "| 64 | 2 | 1 | 256 | 100.0 (1.00), 10 | 60.0 (1.67), 17 | not supported | 50.0 (2.00), 20 |" in text


def test_rows_of_another_build_are_measured_again(program: Path, tmp_path: Path) -> None:
    argv = ["--program", str(program), "--device", "CPU", "--small", "--out", str(tmp_path / "out")]
    bench_gpu.main(argv)
    program.write_text(program.read_text() + "# changed\n")
    bench_gpu.main(argv)
    assert len((tmp_path / "out/ops.jsonl").read_text().splitlines()) == 2 * len(list(bench_gpu.cases(small=True)))


def test_a_crash_names_the_case_and_keeps_what_was_measured(program: Path) -> None:
    wanted = [decode("f16"), decode("turbo4"), decode("turbo3"), decode("turbo2")]
    rows = []
    with pytest.raises(ToolFailed, match=r"ended with 134 at: fattn turbo3 .*\nCUDA error"):
        rows += bench_gpu.measure(program, "CRASH", wanted[:2], 0.1)
        for found in bench_gpu.measure(program, "CRASH", wanted, 0.1):
            rows.append(found)
    assert [found.case for found in rows] == wanted[:2] * 2


def test_a_program_that_ends_at_once_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "test-turbo-perf"
    path.write_text("#!/bin/sh\necho 'no device CUDA0; there are: CPU' >&2\nexit 1\n")
    path.chmod(0o755)
    with pytest.raises(ToolFailed, match="no device CUDA0; there are: CPU"):
        list(bench_gpu.measure(path, "CUDA0", list(bench_gpu.cases()), 0.1))


@pytest.mark.parametrize(("keys", "us", "ok"), [(4096, 100.0, True), (4096, 101.0, False), (65536, 50.0, True), (262144, 41.0, False)])
def test_decode_is_held_against_f16(keys: int, us: float, ok: bool) -> None:
    found = bench_gpu.checks([row(decode("f16", keys), 100.0), row(decode("turbo3", keys), us)])
    assert [(check.limit, check.ok) for check in found] == [(bench_gpu.DECODE_TARGETS[keys], ok)]


def test_decode_is_never_slower_than_a_rival() -> None:
    found = bench_gpu.checks([row(decode("q8_0"), 60.0), row(decode("q4_0"), 40.0), row(decode("turbo4/turbo3"), 50.0)])
    assert [(check.what.split()[-1], check.ok) for check in found] == [("q8_0", True), ("q4_0", False)]


def test_what_is_not_supported_misses_its_targets() -> None:
    found = bench_gpu.checks([row(decode("f16"), 100.0), row(decode("q4_0"), 60.0), row(decode("turbo3"), 0.0, "not supported")])
    assert [(check.value, check.ok) for check in found] == [(0.0, False), (0.0, False)]


def test_prefill_and_writes_have_targets() -> None:
    prefill = [Case("fattn", types, 128, 4, *bench_gpu.PREFILL) for types in ("f16", "turbo3")]
    write = [Case(op, "turbo3", 128, 4, *bench_gpu.WRITE) for op in ("fattn", "set_rows")]
    found = bench_gpu.checks([row(prefill[0], 100.0), row(prefill[1], 104.0), row(write[0], 1000.0), row(write[1], 11.0)])
    assert [(round(check.value, 3), check.ok) for check in found] == [(1.04, True), (0.022, False)]


def test_missed_targets_come_first_and_end_with_1_when_asked(program: Path, tmp_path: Path) -> None:
    argv = ["--program", str(program), "--device", "CPU", "--small", "--out", str(tmp_path / "out"), "--check"]
    assert bench_gpu.main(argv) == 1, "writing takes more than 2 % of the time that attention takes here"
    text = (tmp_path / "out/ops.md").read_text()
    assert text.index("**fail**") < text.index("| pass |")
