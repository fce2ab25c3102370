"""Where a hunk belongs: the one place whose lines are its pre-image. Never a guess, so never fuzz."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from turbo_gguf.patchset.hook import FilePatch, Hunk


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
    detail = f"; this line is not in the file: {missing[0].strip()!r}" if missing else "; its lines no longer stand together"
    return f"{path} hunk {number}: its context is not in the file{detail}"


def _overlaps(path: str, found: Sequence[tuple[int, Hunk]]) -> list[str]:
    ordered = sorted(found, key=lambda item: item[0])
    return [
        f"{path}: two hunks share line {after + 1}, write them as one"
        for (start, hunk), (after, _) in itertools.pairwise(ordered)
        if start + len(hunk.before) > after
    ]
