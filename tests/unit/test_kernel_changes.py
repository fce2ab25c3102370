"""What got worse in a kernel is seen against the report that is committed."""

from __future__ import annotations

from pathlib import Path

import kernel_changes as changes
import kernel_report
import pytest

BEFORE = """# Kernels

| kernel | instances | gfx1100 | sm_90 |
|---|---|---|---|
| turbo_quantize | 1 | 45 / 0 | 34 / 0 |

## All kernels

Words.

| kernel | gfx1100 | sm_90 |
|---|---|---|
| `turbo_decode<128, turbo3, 8>` | 150 / 40 / 1024; 2560, 10.0 | 160 / 1024; 2500, 9.8 |
| `turbo_gone<1>` | 9 / 9 / 0; 8 | 9 / 0; 8 |
| `turbo_quantize<turbo3>` | 45 / 10 / 0, **scalar spill 2**; 900 |  |
"""
AFTER = """## All kernels

| kernel | gfx1100 | sm_75 |
|---|---|---|
| `turbo_decode<128, turbo3, 8>` | 156 (4) / 40 / 2048, **spill 3**, **scratch 12**; 1024, 4.0 | 255 / 0; 9 |
| `turbo_new<1>` | 9 / 9 / 0; 8 |  |
| `turbo_new<2>` | 9 / 9 / 0; 8 |  |
| `turbo_quantize<turbo3>` | 45 / 10 / 0; 900 |  |
"""


def test_what_takes_more_comes_before_what_takes_less() -> None:
    assert list(changes.lines(changes.cells(BEFORE), changes.cells(AFTER))) == [
        "more: gfx1100: turbo_decode<128, turbo3, 8>: registers 150 -> 156, spill 0 -> 3, scratch 0 -> 12",
        "less: gfx1100: turbo_decode<128, turbo3, 8>: instructions 2560 -> 1024",
        "less: gfx1100: turbo_quantize<turbo3>: scalar spill 2 -> 0",
        "new: 2 of turbo_new",
        "gone: 1 of turbo_gone",
        "2 changed, 1 of them take more of something; 1 targets in both reports",
    ]


def test_the_same_report_has_no_changes() -> None:
    assert list(changes.lines(changes.cells(BEFORE), changes.cells(BEFORE))) == [
        "0 changed, 0 of them take more of something; 2 targets in both reports"
    ]


def test_a_report_without_instructions_is_compared_in_the_rest() -> None:
    older = BEFORE.replace("; 2560, 10.0", "")
    first, second, *_ = changes.lines(changes.cells(older), changes.cells(AFTER))
    assert first == "more: gfx1100: turbo_decode<128, turbo3, 8>: registers 150 -> 156, spill 0 -> 3, scratch 0 -> 12"
    assert second == "less: gfx1100: turbo_quantize<turbo3>: scalar spill 2 -> 0"


def test_the_committed_report_can_be_read() -> None:
    found = changes.cells(kernel_report.RESULT.read_text("utf-8"))
    assert len({kernel for kernel, _ in found}) > 400
    assert {"gfx1100", "sm_90"} <= {target for _, target in found}
    assert all("registers" in changes.numbers(cell) for cell in found.values())  # a kernel is empty where the GPU has no such instructions


def test_changes_are_printed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = tmp_path / "kernels.md"
    committed.write_text(BEFORE)
    monkeypatch.setattr(kernel_report, "RESULT", committed)
    kernel_report._show(AFTER, str(committed), changed_only=True)
    assert "registers 150 -> 156" in capsys.readouterr().out
    assert committed.read_text() == BEFORE
    kernel_report._show(AFTER, "-", changed_only=False)
    assert capsys.readouterr().out == AFTER
