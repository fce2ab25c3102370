"""One hook patch: a mail-shaped header that says why, and a few lines added to upstream files.

The file has the form of ``git format-patch``, reduced to what a person reads, so that writing it again gives the same bytes::

    From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
    From: Name <mail>
    Subject: [PATCH] module : what

    Why the hook exists.

    Forwarded: no
    Last-Update: 2026-11-21
    Obsolete-When: ggml/include/ggml.h: text that makes the hook unnecessary
    ---
    diff --git a/path b/path
    --- a/path
    +++ b/path
    @@ -10,2 +10,3 @@
     line before
    +our line
     line after

Line numbers help a reader only: a hunk lands where its context is found (see :mod:`turbo_gguf.patchset.landing`).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import msgspec
import unidiff.patch
from unidiff.errors import UnidiffParseError

from turbo_gguf.errors import UsageError

MAX_ADDED_LINES = 80
"""Lines that all hooks together may add to upstream files."""

MAX_ADDED_PER_HUNK = 3
"""Lines that one hunk may add: a hook is a call or an include, the code itself is in the overlay."""

MAX_LINE_LENGTH = 120
"""Characters of an added line: what does not fit is code that belongs into the overlay."""

CONTEXT = 1
"""Unchanged lines before and after a change: little enough that upstream's other edits do not touch them."""

NEVER = "never"
"""Value of ``Obsolete-When`` for a hook that upstream cannot make unnecessary."""

_FIRST_LINE = "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001"
_TRAILERS = ("Forwarded", "Last-Update", "Obsolete-When", "Deletes")
_TRAILER = re.compile(r"^(" + "|".join(_TRAILERS) + r"): *(.*)$")


class Hunk(msgspec.Struct, frozen=True):
    """One change: lines with their prefix (space, ``+`` or ``-``), without line ends."""

    lines: tuple[str, ...]

    @property
    def before(self) -> tuple[str, ...]:
        """The pre-image: what upstream has."""
        return tuple(line[1:] for line in self.lines if line[0] != "+")

    @property
    def after(self) -> tuple[str, ...]:
        """The post-image: what the patched file has."""
        return tuple(line[1:] for line in self.lines if line[0] != "-")

    @property
    def added(self) -> int:
        """Number of added lines."""
        return sum(line[0] == "+" for line in self.lines)

    @property
    def removed(self) -> int:
        """Number of removed lines."""
        return sum(line[0] == "-" for line in self.lines)


class FilePatch(msgspec.Struct, frozen=True):
    """The hunks of one upstream file; ``path`` is relative to the tree, with slashes."""

    path: str
    hunks: tuple[Hunk, ...]


class Probe(msgspec.Struct, frozen=True):
    """An ``Obsolete-When`` header: ``text`` found in ``path`` means that upstream made the hook unnecessary."""

    path: str
    text: str


class Hook(msgspec.Struct, frozen=True):
    """A parsed hook patch."""

    name: str  # file name, "x.patch"
    author: str
    subject: str  # without "[PATCH] "
    why: str
    trailers: tuple[tuple[str, str], ...]
    files: tuple[FilePatch, ...]

    @property
    def hunks(self) -> tuple[Hunk, ...]:
        """All hunks of all files."""
        return tuple(hunk for file in self.files for hunk in file.hunks)

    @property
    def added(self) -> int:
        """Lines that the hook adds to upstream files."""
        return sum(hunk.added for hunk in self.hunks)

    def trailer(self, key: str) -> str:
        """Value of the first trailer of that name, "" when there is none."""
        return next((value for name, value in self.trailers if name == key), "")

    def probes(self) -> tuple[Probe, ...]:
        """The ``Obsolete-When`` probes, none for ``never``."""
        values = [value for name, value in self.trailers if name == "Obsolete-When" and value != NEVER]
        return tuple(Probe(path.strip(), text.strip()) for path, _, text in (value.partition(":") for value in values))

    def problems(self) -> list[str]:
        """What is wrong with the header and the shape of the hunks, one sentence each."""
        return [f"{self.name}: {text}" for text in (*self._header_problems(), *self._hunk_problems())]

    def _header_problems(self) -> list[str]:
        found = []
        if not re.fullmatch(r"[^<>]+ <[^<>]+>", self.author):
            found.append("no 'From: Name <mail>' header")
        if not self.subject:
            found.append("no 'Subject:' header")
        if not self.why:
            found.append("no text says why the hook exists")
        forwarded = self.trailer("Forwarded")
        if forwarded not in ("no", "not-needed") and not forwarded.startswith("https://"):
            found.append("'Forwarded:' is neither no, not-needed nor an https address")
        try:
            datetime.date.fromisoformat(self.trailer("Last-Update"))
        except ValueError:
            found.append("'Last-Update:' is not a date such as 2026-11-21")
        if not self.trailer("Obsolete-When") or any(not (probe.path and probe.text) for probe in self.probes()):
            found.append("'Obsolete-When:' is neither 'path/in/tree: text' nor 'never'")
        return found

    def _hunk_problems(self) -> list[str]:
        found = []
        if any(hunk.removed for hunk in self.hunks) and not self.trailer("Deletes"):
            found.append("deletes upstream lines, but no 'Deletes:' header gives the reason")
        for file in self.files:
            for number, hunk in enumerate(file.hunks, 1):
                where = f"{file.path} hunk {number}"
                if hunk.added > MAX_ADDED_PER_HUNK:
                    found.append(f"{where}: adds {hunk.added} lines, at most {MAX_ADDED_PER_HUNK} are allowed")
                longest = max((len(line) - 1 for line in hunk.lines if line.startswith("+")), default=0)
                if longest > MAX_LINE_LENGTH:
                    found.append(f"{where}: adds a line of {longest} characters, at most {MAX_LINE_LENGTH} are allowed")
                if not any(line.strip() for line in hunk.before):
                    found.append(f"{where}: no line of context says where it belongs")
                if not _context_is_short(hunk):
                    found.append(f"{where}: more than {CONTEXT} line of context (write it with -U{CONTEXT})")
        return found


def parse(name: str, text: str) -> Hook:
    """Parse a hook file.

    Raises:
        UsageError: it is not a patch, or does what a hook must not: create, delete, rename or end files without a newline.
    """
    message, diff = _split(text)
    headers, body = _headers(message)
    why, trailers = _trailers(body)
    subject = re.sub(r"^\[PATCH[^\]]*\] *", "", headers.get("Subject", ""))
    return Hook(name=name, author=headers.get("From", ""), subject=subject, why=why, trailers=trailers, files=parse_diff(name, diff))


def parse_diff(name: str, diff: str) -> tuple[FilePatch, ...]:
    """Parse the diff of the hook ``name``; see :func:`parse`."""
    try:
        patches = unidiff.patch.PatchSet(diff)
    except UnidiffParseError as error:
        raise UsageError(
            f"{name}: not a patch: {error}", f"edit the file in the work tree, then: turbo-gguf patch export {name}"
        ) from error
    files = []
    for patch in patches:
        if patch.is_added_file or patch.is_removed_file or patch.is_rename:
            raise UsageError(f"{name}: {patch.path}: a hook only edits upstream files", "new files belong into ggml-patches/overlay")
        files.append(FilePatch(_clean_path(name, patch.path), tuple(_hunk(name, patch.path, hunk) for hunk in patch)))
    if not files or any(not file.hunks for file in files):
        raise UsageError(f"{name}: holds no change")
    if len({file.path for file in files}) < len(files):
        raise UsageError(f"{name}: names a file twice")
    return tuple(files)


def render(hook: Hook, starts: Mapping[str, Sequence[int]]) -> str:
    """Write a hook in its canonical form.

    Args:
        hook: what to write.
        starts: for each file, the line number (from 1) in the unpatched file where each hunk begins.
    """
    order = sorted(hook.trailers, key=lambda item: _TRAILERS.index(item[0]))
    parts = [_FIRST_LINE, f"From: {hook.author}", f"Subject: [PATCH] {hook.subject}", "", hook.why, ""]
    parts += [f"{key}: {value}" for key, value in order]
    parts.append("---")
    for file in hook.files:
        parts += [f"diff --git a/{file.path} b/{file.path}", f"--- a/{file.path}", f"+++ b/{file.path}"]
        shift = 0
        for start, hunk in sorted(zip(starts[file.path], file.hunks, strict=True), key=lambda item: item[0]):
            parts.append(f"@@ -{_range(start, len(hunk.before))} +{_range(start + shift, len(hunk.after))} @@")
            parts += hunk.lines
            shift += hunk.added - hunk.removed
    return "\n".join(parts) + "\n"


def _range(start: int, count: int) -> str:
    return str(start) if count == 1 else f"{start},{count}"


def _split(text: str) -> tuple[str, str]:
    """Message and diff: the diff starts at its first ``diff --git`` or ``---`` file line; a signature at the end is dropped."""
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(("diff --git ", "--- a/"))), len(lines))
    end = next((i for i in range(start, len(lines)) if lines[i] == "-- \n"), len(lines))
    return "".join(lines[:start]), "".join(lines[start:end])


def _headers(message: str) -> tuple[dict[str, str], str]:
    """Mail headers (folded lines joined) and the body."""
    head, _, body = message.partition("\n\n")
    found: dict[str, str] = {}
    key = ""
    for line in head.splitlines():
        if line.startswith((" ", "\t")) and key:
            found[key] += " " + line.strip()
        elif not line.startswith("From ") and ":" in line:
            key, _, value = line.partition(":")
            found[key] = value.strip()
    return found, body


def _trailers(body: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The reason and the trailers below it."""
    why: list[str] = []
    trailers: list[tuple[str, str]] = []
    for line in body.splitlines():
        if line.strip() == "---":
            break
        match = _TRAILER.match(line)
        if match:
            trailers.append((match[1], match[2].strip()))
        else:
            why.append(line.rstrip())
    return "\n".join(why).strip(), tuple(trailers)


def _clean_path(name: str, path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise UsageError(f"{name}: {path}: a path outside the tree")
    return str(pure)


def _hunk(name: str, path: str, hunk: unidiff.patch.Hunk) -> Hunk:
    lines = []
    for line in hunk:
        if line.line_type not in (" ", "+", "-", ""):
            raise UsageError(f"{name}: {path}: a hunk at the end of a file without a last newline cannot be used")
        lines.append((line.line_type or " ") + line.value.rstrip("\n"))
    return Hunk(tuple(lines))


def _context_is_short(hunk: Hunk) -> bool:
    """No run of context is longer than ``-U1`` writes: one line at the ends, two between changes."""
    runs = "".join(" " if line[0] == " " else "x" for line in hunk.lines)
    head, tail = len(runs) - len(runs.lstrip(" ")), len(runs) - len(runs.rstrip(" "))
    return head <= CONTEXT and tail <= CONTEXT and " " * (2 * CONTEXT + 1) not in runs
