"""What several unit tests need."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of three layers, which nobody changes."""
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", head=64, n_layer=3, n_head=2, n_head_kv=1)
