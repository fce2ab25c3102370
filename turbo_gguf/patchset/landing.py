"""Where a hunk belongs: the one place whose lines are its pre-image. Never a guess, so never fuzz."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence

import msgspec

from turbo_gguf.patchset.hook import FilePatch, Hunk

ALIKE = 0.7
"""Least similarity (difflib's ratio) of a line that is named as the nearest to a missing one."""

BESIDE = 0.3
"""What a line gains by standing beside another line of the hunk."""


class Landing(msgspec.Struct, frozen=True):
    """A file with the hunks of one hook applied."""

    text: str
    starts: tuple[int, ...]  # line number (from 1) in the text before, for each hunk


def places(lines: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Every index at which the lines ``wanted`` stand in ``lines``."""
    size = len(wanted)
    return [i for i in range(len(lines) - size + 1) if lines[i] == wanted[0] and tuple(lines[i : i + size]) == tuple(wanted)]


def land(file: FilePatch, text: str) -> Landing | list[str]:
    """Apply the hunks of one file to its text, or return why that is not possible.

    Each hunk is looked for in ``text`` as it is before this hook; its pre-image must occur exactly once.
    """
    lines = text.split("\n")
    found: list[tuple[int, Hunk]] = []
    problems: list[str] = []
    for number, hunk in enumerate(file.hunks, 1):
        where = places(lines, hunk.before)
        if len(where) == 1:
            found.append((where[0], hunk))
        else:
            problems.append(_explain(file.path, number, hunk, lines, where))
    problems += _overlaps(file.path, found)
    if problems:
        return problems
    for start, hunk in sorted(found, key=lambda item: item[0], reverse=True):
        lines[start : start + len(hunk.before)] = hunk.after
    return Landing("\n".join(lines), tuple(start + 1 for start, _ in found))


def _explain(path: str, number: int, hunk: Hunk, lines: Sequence[str], where: Sequence[int]) -> str:
    if where:
        numbers = ", ".join(str(i + 1) for i in where)
        return f"{path} hunk {number}: its context occurs {len(where)} times (lines {numbers}), it must occur once"
    if places(lines, hunk.after):
        return f"{path} hunk {number}: the file already has the change"
    missing = [line for line in hunk.before if line not in lines]
    if missing:
        detail = f"this line is not in the file: {missing[0].strip()!r}{_nearest(missing[0], hunk, lines)}"
    else:
        detail = f"its lines no longer stand together{_apart(hunk, lines)}"
    return f"{path} hunk {number}: its context is not in the file; {detail}"


def _nearest(missing: str, hunk: Hunk, lines: Sequence[str]) -> str:
    """The two lines that are most like a missing one, those beside another line of the hunk first; "" when none is alike."""
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(missing)
    around = {i + step for i, line in enumerate(lines) if line in hunk.before and re.search(r"\w", line) for step in (-1, 1)}
    found = []
    for i, line in enumerate(lines):
        matcher.set_seq1(line)
        if line.strip() and matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE:
            found.append((-matcher.ratio() - (BESIDE if i in around else 0.0), i))
    shown = [f"line {i + 1}: {lines[i].strip()!r}" for _, i in sorted(found)[:2]]
    return f"; the nearest is {', then '.join(shown)}" if shown else ""


def _apart(hunk: Hunk, lines: Sequence[str]) -> str:
    """Where the lines of a hunk are, as near to each other as they come."""
    first, last = hunk.before[0], hunk.before[-1]
    pairs = [(j - i, i, j) for i, line in enumerate(lines) if line == first for j in range(i + 1, len(lines)) if lines[j] == last]
    if not pairs or first == last:
        return ""
    gap, i, j = min(pairs)
    shown = [repr(line.strip()) if line.strip() else "an empty line" for line in (first, last)]
    return f": {shown[0]} is line {i + 1}, {shown[1]} is line {j + 1}, {gap - 1} {'line' if gap == 2 else 'lines'} between"


def _overlaps(path: str, found: Sequence[tuple[int, Hunk]]) -> list[str]:
    ordered = sorted(found, key=lambda item: item[0])
    return [
        f"{path}: two hunks share line {after + 1}, write them as one"
        for (start, hunk), (after, _) in itertools.pairwise(ordered)
        if start + len(hunk.before) > after
    ]
