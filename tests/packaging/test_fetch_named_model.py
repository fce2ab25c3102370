"""Models with a name, as the registry has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_gguf.inputs import models
from turbo_gguf.inputs.named import NAMED

pytestmark = pytest.mark.network


@pytest.mark.parametrize("name", NAMED)
def test_the_pinned_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    model = models.resolve(name)
    assert (model.sha256, model.size) == (NAMED[name].sha256, NAMED[name].size)
    assert model.n_layer > 0 and model.uniform
