"""The patch set as it lies on disk: ``series``, ``hooks/``, ``overlay/``, and what it makes of an upstream tree."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import msgspec

from turbo_gguf.assets import patches_dir
from turbo_gguf.errors import UsageError
from turbo_gguf.patchset.hook import MAX_ADDED_LINES, Hook, parse
from turbo_gguf.patchset.landing import land

CHECK_HINT = "turbo-gguf patch check --upstream NAME"


class PatchSet(msgspec.Struct, frozen=True):
    """Hooks in the order of the series, and the overlay."""

    root: Path
    entries: tuple[str, ...]  # names in series, as written
    hooks: tuple[Hook, ...]
    overlay: dict[str, bytes]  # path in the tree -> content

    @property
    def added(self) -> int:
        """Lines that all hooks together add to upstream files."""
        return sum(hook.added for hook in self.hooks)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that reaches a tree.

        Line numbers and headers of hooks do not, so a refresh onto another upstream keeps the digest.
        """
        total = hashlib.sha256()
        for hook in self.hooks:
            for file in hook.files:
                lines = [line for hunk in file.hunks for line in ("@@", *hunk.lines)]
                total.update("\n".join([f"hook {file.path}", *lines, ""]).encode())
        for path, content in sorted(self.overlay.items()):
            normal = content.replace(b"\r\n", b"\n")
            total.update(f"overlay {path} {hashlib.sha256(normal).hexdigest()}\n".encode())
        return total.hexdigest()

    def problems(self) -> list[str]:
        """What is wrong with the patch set itself, whatever the upstream."""
        found = [f"series: {name} is listed {count} times" for name, count in Counter(self.entries).items() if count > 1]
        on_disk = {path.name for path in (self.root / "hooks").glob("*.patch")}
        found += [f"series: hooks/{name} does not exist" for name in self.entries if name not in on_disk]
        found += [f"series: hooks/{name} is not listed" for name in sorted(on_disk - set(self.entries))]
        for hook in self.hooks:
            found += hook.problems()
            found += [f"{hook.name}: {file.path} is a file of the overlay" for file in hook.files if file.path in self.overlay]
        if self.added > MAX_ADDED_LINES:
            found.append(f"the hooks add {self.added} lines to upstream files, the budget is {MAX_ADDED_LINES}")
        return found


class Patched(msgspec.Struct, frozen=True):
    """What a patch set makes of one upstream tree."""

    files: dict[str, bytes]  # content of every file that is touched or added
    starts: dict[str, dict[str, tuple[int, ...]]]  # hook name -> file -> line (from 1) of each hunk
    problems: tuple[str, ...]


def load(root: Path | None = None) -> PatchSet:
    """Read the patch set (the one of this package when ``root`` is ``None``).

    A hook that the series names but that does not exist is left out here and reported by ``problems()``.

    Raises:
        UsageError: there is no series, or a hook is not a patch.
    """
    folder = root or patches_dir()
    series = folder / "series"
    if not series.is_file():
        raise UsageError(f"no patch set: {series} does not exist", "reinstall turbo-gguf, or work in a complete checkout")
    entries = tuple(line for line in (raw.partition("#")[0].strip() for raw in series.read_text("utf-8").splitlines()) if line)
    paths = [folder / "hooks" / name for name in dict.fromkeys(entries)]
    hooks = tuple(parse(path.name, path.read_text("utf-8")) for path in paths if path.is_file())
    return PatchSet(root=folder, entries=entries, hooks=hooks, overlay=_overlay(folder / "overlay"))


def patch(patches: PatchSet, tree: Path) -> Patched:
    """Compute what the patch set makes of the upstream tree at ``tree``; nothing is written."""
    files: dict[str, bytes] = {}
    starts: dict[str, dict[str, tuple[int, ...]]] = {}
    problems: list[str] = []
    for hook in patches.hooks:
        at = starts[hook.name] = {}
        for file in hook.files:
            before = files.get(file.path)
            if before is None and not (tree / file.path).is_file():
                problems.append(f"{hook.name}: {file.path} does not exist upstream")
                continue
            landed = land(file, (before if before is not None else (tree / file.path).read_bytes()).decode("utf-8"))
            if isinstance(landed, list):
                problems += [f"{hook.name}: {text}" for text in landed]
                continue
            files[file.path] = landed.text.encode("utf-8")
            at[file.path] = landed.starts
    problems += [f"overlay: {path} exists upstream too" for path in sorted(patches.overlay) if (tree / path).exists()]
    return Patched(files={**files, **patches.overlay}, starts=starts, problems=tuple(problems))


def patch_or_fail(patches: PatchSet, tree: Path, upstream: str) -> Patched:
    """As :func:`patch`.

    Raises:
        UsageError: the patch set is not sound or does not fit this upstream; the message lists every place.
    """
    made = patch(patches, tree)
    problems = [*patches.problems(), *made.problems]
    if problems:
        raise UsageError("\n  ".join([f"the patch set does not apply to {upstream}:", *problems]), CHECK_HINT.replace("NAME", upstream))
    return made


def _overlay(folder: Path) -> dict[str, bytes]:
    """Files of the overlay; hidden files and editors' backups are not part of it."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not path.name.endswith("~") and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = path.read_bytes()
    return found
