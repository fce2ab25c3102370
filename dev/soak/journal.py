"""The log of a soak: JSON lines that are there as soon as they happen, and the summary of what is there."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


class Journal:
    """Events in order. An old file is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.monotonic()
        self.events: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, event: str, **facts: Any) -> None:
        """Keep an event, with the seconds since the beginning."""
        line = {"seconds": round(time.monotonic() - self.began, 1), "event": event, **facts}
        self.events.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def failed(self, types: str, phase: str, why: str) -> None:
        """A check that failed."""
        print(f"error: {types}, {phase}: {why}", file=sys.stderr)
        self.write("failed", types=types, phase=phase, why=why)

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "failed"]

    def summary(self) -> str:
        """A table: what each cache went through, and the largest noise and the growth that were seen."""
        head = ("cache, server", "minutes", "requests", "kills", "full disks", "starts without room", "noise", "against f16", "memory")
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for begin in (event for event in self.events if event["event"] == "begin"):
            lines.append("| " + " | ".join(self._row(begin["types"])) + " |")
        lines += ["", *self._outcomes(), *(f"- failed: {event['types']}, {event['phase']}: {event['why']}" for event in self.failures)]
        return "\n".join(lines)

    def _row(self, types: str) -> tuple[str, ...]:
        mine = [event for event in self.events if event.get("types") == types]

        def values(event: str, name: str) -> list[Any]:
            return [one[name] for one in mine if one["event"] == event and one.get(name) is not None]

        minutes = (mine[-1]["seconds"] - mine[0]["seconds"]) / 60
        requests = sum(sum(counts.values()) for counts in values("traffic", "counts"))
        noise, exact, growth = values("probes", "noise"), values("probes", "against_f16"), values("memory", "growth")
        return (
            *(types, f"{minutes:.1f}", str(requests)),
            *(str(len(values(event, "seconds"))) for event in ("kill", "full disk", "starved")),
            f"{max(noise):.4f}" if noise else "",
            f"{max(exact):.4f}" if exact else "",
            f"{growth[-1]:+.2%}" if growth else "",
        )

    def _outcomes(self) -> list[str]:
        """How often each kind of request was answered how."""
        total: Counter[str] = Counter()
        for event in self.events:
            total.update(event.get("counts", {}))
        return [f"- {name}: {number}" for name, number in sorted(total.items())]
