"""The program that times single ops runs on the CPU, and the benchmark that drives it writes its table."""

from __future__ import annotations

import os
from pathlib import Path

import bench_gpu
import pytest

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


def test_all_small_cases_are_measured(program: Path, tmp_path: Path) -> None:
    assert bench_gpu.main(["--program", str(program), "--device", "CPU", "--small", "--seconds", "0.001", "--out", str(tmp_path)]) == 0
    rows = bench_gpu.load(tmp_path / "ops.jsonl")
    assert [row.case for row in rows] == list(bench_gpu.cases(small=True))
    assert all(row.ok and 0 < row.us_min <= row.us <= row.us_max for row in rows)
    by_types = {row.case.types: row for row in rows if row.case.op == "fattn" and row.case.keys == 1024}
    ratio = by_types["f16"].bytes / by_types["turbo3"].bytes
    assert ratio == pytest.approx(16 / 3.5), "bytes are those of the cache type"


def test_what_is_no_case_is_said(program: Path) -> None:
    wanted = [bench_gpu.Case("fattn", "turbo9", 64, 2, 1, 256)]
    with pytest.raises(ToolFailed, match="not a case: fattn turbo9"):
        list(bench_gpu.measure(program, "CPU", wanted, 0.001))


def test_an_unknown_device_is_said(program: Path) -> None:
    with pytest.raises(ToolFailed, match="no device GPU7; there are: CPU"):
        list(bench_gpu.measure(program, "GPU7", list(bench_gpu.cases(small=True)), 0.001))
