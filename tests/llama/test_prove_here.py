"""The proof for GPUs, packed from the CPU build and run on the CPU by a Python without packages; its patterns find cases."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import prove_pack
import prove_stages
import pytest

from turbo_gguf.make.build import Build, ensure_build

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def build() -> Build:
    if os.environ.get("TURBO_GGUF_NATIVE_BIN"):
        pytest.skip("packs a build of its own")
    return ensure_build("cpu", targets=prove_pack.TARGETS)


def test_the_packed_proof_runs_somewhere_else(build: Build, tmp_path: Path) -> None:
    prove_pack.pack(build, tmp_path / "proof")
    argv = [sys.executable, "-S", "-E", tmp_path / "proof/prove_run.py", "--out", tmp_path / "out", "--seconds", "300"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/summary.md").read_text()
    for stage in ("ops", "slices", "perf", "variants", "bench", "order"):
        assert f"| {stage} | pass |" in text
    for stage in ("sanitizers", "counters"):
        assert f"| {stage} | skip |" in text
    assert str(tmp_path) not in text


def test_every_pattern_finds_cases_and_every_family_has_one(build: Build) -> None:
    argv = [build.tool("test-backend-ops"), "support", "-b", "CPU", "-p", "turbo", "--output", "csv"]
    listed = list(csv.DictReader(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()))

    def found(ops: str, pattern: str) -> int:
        return sum(row["op_name"] in ops.split(",") and re.search(pattern, row["op_params"]) is not None for row in listed)

    for part in (*prove_stages.OPS, *prove_stages.SLICES):
        assert found(part.ops, part.pattern) > 50, part.name
    for part in (*prove_stages.SMALL_OPS, *prove_stages.SMALL_SLICES):
        assert 0 < found(part.ops, part.pattern) < 20, part.name
    for name, pattern in prove_stages.FAMILIES.items():
        assert found(prove_stages.SANITIZED.ops, f"^({pattern})$") == 1, name
    assert found(prove_stages.SANITIZED.ops, prove_stages.SANITIZED.pattern) == len(prove_stages.FAMILIES)
