"""The C header is what the tables say, and the check notices when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_gguf.assets import patches_dir
from turbo_gguf.codec import codegen


def test_the_committed_header_is_current() -> None:
    assert codegen.main(["--check"]) == 0


def test_a_changed_header_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = tmp_path / "tables.h"
    text = (patches_dir() / codegen.HEADER).read_text(encoding="utf-8")
    header.write_text(text.replace("104", "105", 1), encoding="utf-8")
    assert codegen.main(["--check", "--output", str(header)]) == 1
    assert "python -m turbo_gguf.codec.codegen" in capsys.readouterr().err
    assert header.read_text(encoding="utf-8") != text  # --check writes nothing


def test_a_missing_header_is_reported(tmp_path: Path) -> None:
    assert codegen.main(["--check", "--output", str(tmp_path / "tables.h")]) == 1


def test_writing_makes_it_current(tmp_path: Path) -> None:
    header = tmp_path / "tables.h"
    assert codegen.main(["--output", str(header)]) == 0
    assert codegen.is_current(header)
    assert header.read_text(encoding="utf-8") == (patches_dir() / codegen.HEADER).read_text(encoding="utf-8")
