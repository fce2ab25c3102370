"""The program that times single ops, as benchmarks drive it: what one that crashes leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_ops import Case, keep, load, measure

from turbo_gguf.errors import ToolFailed

PROGRAM = """\
import json, sys
for n, line in enumerate(sys.stdin):
    if "CRASH" in sys.argv and n == 2:
        print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
        sys.exit(134)
    print(json.dumps({"us": 50.0, "us_min": 49.0, "us_max": 51.0, "bytes": 1e6, "status": "ok"}), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "test-turbo-perf"
    path.write_text(f"#!/usr/bin/env python3\n{PROGRAM}")
    path.chmod(0o755)
    return path


def decode(types: str) -> Case:
    return Case("fattn", types, 128, 4, 1, 65536)


def test_a_case_is_a_line() -> None:
    assert decode("turbo4/turbo3").line == "fattn turbo4 turbo3 128 8 4 1 65536 1"
    assert decode("f16").line == "fattn f16 f16 128 8 4 1 65536 1"


def test_a_crash_names_the_case_and_keeps_what_was_measured(program: Path, tmp_path: Path) -> None:
    wanted = [decode("f16"), decode("turbo4"), decode("turbo3"), decode("turbo2")]
    with pytest.raises(ToolFailed, match=r"ended with 134 at: fattn turbo3 .*\nCUDA error"):
        keep(tmp_path / "ops.jsonl", measure(program, "CRASH", wanted, 0.1))
    assert [row.case for row in load(tmp_path / "ops.jsonl")] == wanted[:2]


def test_a_program_that_ends_at_once_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "test-turbo-perf"
    path.write_text("#!/bin/sh\necho 'no device CUDA0; there are: CPU' >&2\nexit 1\n")
    path.chmod(0o755)
    with pytest.raises(ToolFailed, match="no device CUDA0; there are: CPU"):
        list(measure(path, "CUDA0", [decode("f16")], 0.1))
