"""Models with unpacked weights. Risks: a disk that is filled, and prices that are of the file itself on one day and not on the other."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_gguf

from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.measure import unpacked

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFile:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return models.read(tiny_gguf.write(tmp_path / "tiny.gguf"))


def test_a_disk_without_room(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not unpacked.why_not(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 10**6, 10**6))
    assert "the disk 0.0 GB free" in unpacked.why_not(model)
    path = unpacked.folder() / f"tiny-{model.sha256[:12]}.gguf"
    path.write_bytes(b"GGUF")
    assert not unpacked.why_not(model), "what is there already takes no more room"


def test_a_large_model_is_left_as_it_is(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "MOST_BYTES", unpacked.size_of(model) - 1)
    assert "unpacked it has" in unpacked.why_not(model)
