"""How a test ended, as a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """The end of one test."""

    test: str  # pytest's name of it
    ended: str  # passed, failed or skipped
    seconds: float
    detail: str  # reason of a skip, or the last line of an error

    def line(self) -> str:
        """The line."""
        return json.dumps(asdict(self)) + "\n"


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes by test. Of a test that both failed and could not be cleaned up after, the first counts."""
    found: dict[str, Outcome] = {}
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            outcome = Outcome(**json.loads(line))
            found.setdefault(outcome.test, outcome)
    return found


def last_line(text: str) -> str:
    """The line of an error report that says what was wrong."""
    marked = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    return marked[0][:200] if marked else ""
