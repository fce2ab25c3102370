"""The examples of docs/reference/codec.md are run, in order. Risks: an example of a renamed function, numbers of an older version."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from turbo_gguf import codec

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/codec.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def failures(text: str) -> str:
    """What differs, "" if nothing does: all examples share their names."""
    source = "\n".join(FENCE.findall(text))
    test = doctest.DocTestParser().get_doctest(source, {}, PAGE.name, str(PAGE), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner()
    assert test.examples, "a page without examples"
    runner.run(test, out=said.append)
    return "".join(said)


def test_examples() -> None:
    found = failures(PAGE.read_text("utf-8"))
    assert not found, found


def test_a_wrong_example_is_noticed() -> None:
    assert "Expected:" in failures("```python\n>>> 1 + 1\n3\n```")


@pytest.mark.parametrize("name", codec.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    found = getattr(codec, name)
    assert name in ("ALL", "BY_NAME", "SCALES", "TurboType") or (found.__doc__ or "").strip()
