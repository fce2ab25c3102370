"""Our kernels compile without warnings, and neither spill nor use scratch: for one AMD and one NVIDIA target here; all targets
are `make kernel-report`, with its result in eval/results/kernels.md. What this result speaks for is not compiled again, since that takes
half an hour of two cores where nothing is remembered.
"""

from __future__ import annotations

from pathlib import Path

import kernel_changes
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
    assert kernel_report.main(["--targets", target, "--new", "--out", str(table)]) == 0, capsys.readouterr().err
    if table.exists():
        assert "turbo" in table.read_text(), "no kernel of ours was found"


def test_the_committed_report_has_no_problem() -> None:
    """It stands for what the test above did not compile."""
    report = kernel_report.RESULT.read_text("utf-8")
    assert "spill or use scratch: **none**." in report
    cells = kernel_changes.cells(report)
    assert {target for _, target in cells} >= {"gfx1100", "sm_90"}
    assert not [place for place, cell in cells.items() if "**" in cell]
