"""The program that times single ops runs on the CPU, and says what it does not understand."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from bench_ops import TYPES, Case, measure

from turbo_gguf.errors import ToolFailed
from turbo_gguf.make.build import ensure_build

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def program() -> Path:
    given = os.environ.get("TURBO_GGUF_NATIVE_BIN")
    path = Path(given) / "test-turbo-perf" if given else ensure_build("cpu", targets=("test-turbo-perf",)).tool("test-turbo-perf")
    if not path.exists():
        pytest.skip(f"{path} was not built")
    return path


def test_cases_of_all_types_are_measured(program: Path) -> None:
    wanted = [Case("fattn", types, 64, 2, queries, 1024) for queries in (1, 16) for types in TYPES]
    wanted += [Case("set_rows", types, 64, 2, 16, 256) for types in TYPES if "/" not in types]
    rows = list(measure(program, "CPU", wanted, 0.001))
    assert [row.case for row in rows] == wanted
    assert all(row.ok and 0 < row.us_min <= row.us <= row.us_max for row in rows)
    by_types = {row.case.types: row for row in rows if row.case.op == "fattn"}
    ratio = by_types["f16"].bytes / by_types["turbo3"].bytes
    assert ratio == pytest.approx(16 / 3.5), "bytes are those of the cache type"


def test_the_last_keys_can_be_exact_tokens(program: Path) -> None:
    cases = "fattn turbo3t turbo3t 64 2 4 1 512 1 96\nfattn f16 f16 128 2 1 3 256 1 32\nfattn turbo3 turbo3 64 2 4 1 512\n"
    rows = [json.loads(line) for line in run(program, cases).stdout.splitlines() if line.startswith("{")]
    assert [(row["status"], row["exact"], row["us"] > 0) for row in rows] == [("ok", 96, True), ("ok", 32, True), ("ok", 0, True)]
    for exact in ("512", "-1"):
        done = run(program, f"fattn turbo3 turbo3 64 2 4 1 512 1 {exact}\n")
        assert done.returncode == 2 and "not a case" in done.stderr, "all keys, or less than none"


def run(program: Path, cases: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, "CPU", "0.001"], input=cases, capture_output=True, text=True, check=False)


def test_what_is_no_case_is_said(program: Path) -> None:
    with pytest.raises(ToolFailed, match="not a case: fattn turbo9"):
        list(measure(program, "CPU", [Case("fattn", "turbo9", 64, 2, 1, 256)], 0.001))


def test_an_unknown_device_is_said(program: Path) -> None:
    with pytest.raises(ToolFailed, match="no device GPU7; there are: CPU"):
        list(measure(program, "GPU7", [Case("fattn", "turbo3", 64, 2, 1, 256)], 0.001))
