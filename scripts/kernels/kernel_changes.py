"""What changed in our GPU kernels against an earlier report: sources, registers, spills, scratch, shared memory and instructions.

Cells of two reports are compared as they are written, so a report of any compiler and llama.cpp can be the earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

TITLE = "## All kernels"
SOURCES = "## Sources"
_EXCESS = re.compile(r"\*\*(?P<what>spill|scalar spill|scratch) (?P<number>\d+)\*\*")

Cells = Mapping[tuple[str, str], str]  # (kernel, target) -> cell


class Change(msgspec.Struct, frozen=True):
    """One kernel on one target, in both reports."""

    kernel: str
    target: str
    before: str
    after: str

    @property
    def worse(self) -> list[str]:
        """What it takes more of, in words."""
        return [f"{what} {old:g} -> {new:g}" for what, old, new in self._pairs() if new > old]

    @property
    def better(self) -> list[str]:
        """What it takes less of, in words."""
        return [f"{what} {old:g} -> {new:g}" for what, old, new in self._pairs() if new < old]

    def _pairs(self) -> Iterator[tuple[str, float, float]]:
        old, new = numbers(self.before), numbers(self.after)
        for what in dict.fromkeys([*old, *new]):
            if {what} <= old.keys() & new.keys() or what not in ("registers", "instructions"):  # older reports have no instructions
                yield what, old.get(what, 0), new.get(what, 0)


def numbers(cell: str) -> dict[str, float]:
    """Registers, spills and instructions of a cell; shared memory, which the code decides, is left out."""
    takes, _, count = cell.partition(";")
    registers = re.match(r"\d+", takes)
    found = {"registers": float(registers[0])} if registers else {}
    found |= {match["what"]: float(match["number"]) for match in _EXCESS.finditer(takes)}
    if count.strip():
        found["instructions"] = float(count.partition(",")[0])
    return found


def cells(report: str) -> dict[tuple[str, str], str]:
    """The table of all kernels of a report."""
    return _table(report, TITLE)


def digests(report: str) -> dict[tuple[str, str], str]:
    """(source, target) -> the digest of what was compiled for a report; nothing for reports that have none."""
    return _table(report, SOURCES)


def _table(report: str, title: str) -> dict[tuple[str, str], str]:
    targets: list[str] = []
    found: dict[tuple[str, str], str] = {}
    for line in report.partition(title)[2].splitlines():
        if line.startswith("## "):
            break
        if line.startswith(("| kernel |", "| file |")):
            targets = [part.strip() for part in line.strip("|").split("|")][1:]
        elif match := re.match(r"\| `(?P<name>[^`]+)` \|(?P<cells>.*)\|$", line):
            parts = (part.strip() for part in match["cells"].split("|"))
            found |= {(match["name"], target): part for target, part in zip(targets, parts, strict=False) if part}
    return found


def changes(before: Cells, after: Cells) -> list[Change]:
    """Kernels that both reports have on a target where they do not take the same."""
    both = [key for key in after if key in before and before[key] != after[key]]
    return [Change(*key, before[key], after[key]) for key in both]


def lines(before: Cells, after: Cells) -> Iterator[str]:
    """What to show of two reports: what got worse first, then what got better, then names that are new or gone."""
    found = changes(before, after)
    for title, chosen in (("more", [(c, c.worse) for c in found]), ("less", [(c, c.better) for c in found])):
        yield from (f"{title}: {change.target}: {change.kernel}: {', '.join(words)}" for change, words in chosen if words)
    targets = {target for _, target in before} & {target for _, target in after}
    yield from _names("new", _only(after, before, targets))
    yield from _names("gone", _only(before, after, targets))
    worse = sum(bool(change.worse) for change in found)
    yield f"{len(found)} changed, {worse} of them take more of something; {len(targets)} targets in both reports"


def _only(one: Cells, other: Cells, targets: set[str]) -> list[str]:
    """Kernels on common targets that only one report has."""
    others = {kernel for kernel, target in other if target in targets}
    return sorted({kernel for kernel, target in one if target in targets} - others)


def _names(title: str, kernels: Sequence[str]) -> Iterator[str]:
    """Counts by family: a new kernel often comes with a hundred instances."""
    families: dict[str, int] = {}
    for kernel in kernels:
        family = kernel.partition("<")[0]
        families[family] = families.get(family, 0) + 1
    yield from (f"{title}: {count} of {family}" for family, count in families.items())
