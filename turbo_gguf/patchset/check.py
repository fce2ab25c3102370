"""Whether the patch set is sound and fits every upstream that we call supported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import msgspec

from turbo_gguf.patchset.hook import Hook, render
from turbo_gguf.patchset.series import PatchSet, patch
from turbo_gguf.patchset.tree import Tree

_INCLUDE = re.compile(r'^\+\s*#\s*include\s+"([^"]+)"')


class Report(msgspec.Struct, frozen=True):
    """The result of a check against some upstreams."""

    problems: tuple[str, ...]
    obsolete: tuple[str, ...]  # hooks that an upstream made unnecessary: news, not an error
    upstreams: tuple[str, ...]  # names that were looked at


def check(patches: PatchSet, trees: Sequence[Tree], reference: str) -> Report:
    """Check the patch set by itself and against pristine trees.

    On each tree every hunk has to land in exactly one place without fuzz, every included file has to exist, and no file of
    the overlay may exist upstream. On the tree of the upstream named ``reference``, writing the hooks again has to give the
    same bytes.
    """
    problems = patches.problems()
    obsolete: list[str] = []
    for tree in trees:
        made = patch(patches, tree.path)
        found = [*made.problems, *_missing_includes(patches, tree.path)]
        if tree.upstream == reference and not made.problems:
            found += _changed_by_export(patches, made.starts)
        problems += [f"{tree.upstream}: {text}" for text in found]
        obsolete += [f"{tree.upstream}: {text}" for text in obsolete_hooks(patches, tree.path)]
    return Report(tuple(problems), tuple(obsolete), tuple(tree.upstream for tree in trees))


def obsolete_hooks(patches: PatchSet, tree: Path) -> list[str]:
    """Hooks whose ``Obsolete-When`` text is found in the tree."""
    return [
        f"{hook.name} is obsolete: {probe.path} has {probe.text!r}"
        for hook in patches.hooks
        for probe in hook.probes()
        if (tree / probe.path).is_file() and probe.text in (tree / probe.path).read_text("utf-8", errors="replace")
    ]


def _missing_includes(patches: PatchSet, tree: Path) -> list[str]:
    """Files that a hook includes but that neither the overlay nor upstream has."""
    names = {PurePosixPath(path).name for path in patches.overlay}
    return [
        f'{hook.name}: {path} includes "{target}", which neither the overlay nor upstream has'
        for hook in patches.hooks
        for path, target in _includes(hook)
        if PurePosixPath(target).name not in names and not (tree / PurePosixPath(path).parent / target).is_file()
    ]


def _includes(hook: Hook) -> list[tuple[str, str]]:
    """Pairs of file and included name, for each include that the hook adds."""
    return [(file.path, match[1]) for file in hook.files for hunk in file.hunks for line in hunk.lines if (match := _INCLUDE.match(line))]


def _changed_by_export(patches: PatchSet, starts: dict[str, dict[str, tuple[int, ...]]]) -> list[str]:
    return [
        f"{hook.name}: differs from its canonical form, run: turbo-gguf patch refresh"
        for hook in patches.hooks
        if render(hook, starts[hook.name]) != (patches.root / "hooks" / hook.name).read_text("utf-8")
    ]
