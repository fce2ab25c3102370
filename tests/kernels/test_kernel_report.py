"""Our kernels compile without warnings and decode's neither spill nor use scratch: for one AMD and one NVIDIA target here; all targets
are `make kernel-report`, with its result in eval/results/kernels.md.
"""

from __future__ import annotations

from pathlib import Path

import kernel_report
import kernel_toolchains as toolchains
import pytest

from turbo_gguf.errors import EnvironmentMissing


@pytest.mark.parametrize("target", ["gfx1100", "sm_90"])
def test_all_kernels_compile_without_warnings_and_spills(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        toolchains.toolchain(target)
    except EnvironmentMissing as error:
        pytest.skip(f"{error.message}; {error.hint}")
    table = tmp_path / "kernels.md"
    assert kernel_report.main(["--targets", target, "--out", str(table)]) == 0, capsys.readouterr().err
    assert "turbo" in table.read_text(), "no kernel of ours was found"
