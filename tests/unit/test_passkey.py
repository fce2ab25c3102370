"""scripts/bench/passkey.py: its arguments. What it asks is turbo_gguf.measure.retrieval's."""

from __future__ import annotations

import passkey
import pytest


@pytest.mark.parametrize(
    "arguments", [["--depths", "1.5"], ["--depths", "0.5", "0.5"], ["--ctx", "100"], ["--trials", "0"], ["--types", "turbo9"]]
)
def test_wrong_arguments_are_said_before_anything_is_built(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passkey, "ensure_build", lambda *_, **__: pytest.fail("it builds"))
    assert passkey.main(arguments) == 2
