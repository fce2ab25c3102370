"""The patched tree: a copy of the pristine one that is brought up to date in place.

There is one work tree per upstream. When the patch set changes, only the files whose content changes are written, so that
an incremental build compiles only what they reach. The pristine tree is never written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from turbo_gguf.assets import home
from turbo_gguf.errors import UsageError
from turbo_gguf.patchset.series import PatchSet, load, patch_or_fail
from turbo_gguf.patchset.tree import Tree

STAMP = ".turbo-gguf.json"
_TEMPORARY = ".turbo-gguf.tmp"
_SHOWN = 10


class Stamp(msgspec.Struct, frozen=True):
    """What we know of a work tree: where it comes from and what we wrote into it."""

    upstream: str
    commit: str
    digest: str  # "" while files are being written
    files: dict[str, tuple[str, ...]]  # path -> sha256 of the contents that are ours (two while being written)


class State(msgspec.Struct, frozen=True):
    """How a work tree stands, for ``doctor`` and messages."""

    path: Path
    exists: bool
    digest: str  # of the patch set that was applied last
    dirty: tuple[str, ...]  # files that neither upstream nor the patch set explains


def work_tree(upstream: str) -> Path:
    """Folder of the patched tree of an upstream name."""
    return home() / "trees" / upstream


def tree_files(root: Path) -> Iterator[str]:
    """Relative paths of all files of a tree, without our own files and Python's caches."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in ("__pycache__", ".git")]
        base = os.path.relpath(folder, root)
        for name in files:
            path = name if base == "." else f"{base}/{name}"
            if path not in (STAMP, _TEMPORARY) and not name.endswith(".pyc"):
                yield path


def apply(pristine: Tree, patches: PatchSet | None = None, *, force: bool = False) -> Tree:
    """Bring the work tree of an upstream to the state that the patch set describes.

    Doing it again changes nothing. The caller holds the lock of the tree when several processes may be at work.

    Args:
        pristine: the fetched upstream.
        patches: the patch set; the one of this package when ``None``.
        force: overwrite files that were edited in the work tree.

    Raises:
        UsageError: the patch set does not fit, or the work tree was edited (the message names the files).
    """
    patches = patches or load()
    digest = patches.digest
    target = patch_or_fail(patches, pristine.path, pristine.upstream).files
    work = work_tree(pristine.upstream)
    stamp = _read_stamp(work)
    if stamp is None:
        if work.exists():
            raise UsageError(f"{work} exists, but turbo-gguf did not make it", f"remove it: rm -r {work}")
        stamp = _create(pristine, work)
    elif not force and stamp.commit == pristine.commit:
        _refuse_dirty(work, _dirty(work, pristine.path, stamp, target))
    names: dict[str, tuple[str, ...]] = {path: (_sha(content),) for path, content in target.items()}
    goal = Stamp(pristine.upstream, pristine.commit, digest, names)
    if stamp != goal:  # until the end of the update, both states are ours
        both = {path: (*names.get(path, ()), *stamp.files.get(path, ())) for path in {*names, *stamp.files}}
        _write_stamp(work, Stamp(pristine.upstream, pristine.commit, "", both))
    _update(work, pristine.path, target)
    if stamp != goal:
        _write_stamp(work, goal)
    return Tree(path=work, upstream=pristine.upstream, commit=pristine.commit, digest=digest)


def state(pristine: Tree) -> State:
    """Look at the work tree of an upstream; nothing is written."""
    work = work_tree(pristine.upstream)
    stamp = _read_stamp(work)
    if stamp is None:
        return State(work, exists=False, digest="", dirty=())
    dirty = tuple(_dirty(work, pristine.path, stamp, {})) if stamp.commit == pristine.commit else ()
    return State(work, exists=True, digest=stamp.digest, dirty=dirty)


def edited_files(work: Path, pristine: Path, target: Mapping[str, bytes]) -> list[str]:
    """Files of a work tree whose content is neither that of ``target`` nor, outside of it, upstream's."""
    return [path for path in sorted({*tree_files(work), *tree_files(pristine), *target}) if not _is_as(work, pristine, target, path)]


def _is_as(work: Path, pristine: Path, target: Mapping[str, bytes], path: str) -> bool:
    """Whether a file of the work tree has the content it should have."""
    mine, theirs = work / path, pristine / path
    if path in target:
        return mine.is_file() and mine.read_bytes() == target[path]
    return mine.is_file() and theirs.is_file() and _same(mine, theirs)


def _dirty(work: Path, pristine: Path, stamp: Stamp, target: Mapping[str, bytes]) -> list[str]:
    """Files whose content is not ours, not upstream's, and not the new content either; a missing file is no loss."""

    def explained(path: str) -> bool:
        mine, theirs = work / path, pristine / path
        if path in stamp.files or path in target:
            content = mine.read_bytes()
            if _sha(content) in stamp.files.get(path, ()) or content == target.get(path):
                return True
        return theirs.is_file() and _same(mine, theirs)

    return [path for path in sorted(tree_files(work)) if not explained(path)]


def _refuse_dirty(work: Path, dirty: list[str]) -> None:
    if not dirty:
        return
    names = [*dirty[:_SHOWN], f"and {len(dirty) - _SHOWN} more"] if len(dirty) > _SHOWN else dirty
    raise UsageError(
        "\n  ".join([f"{work} has edits that the patch set does not explain:", *names]),
        "keep edits of upstream files: turbo-gguf patch export NAME; drop all edits: turbo-gguf patch apply --force",
    )


def _create(pristine: Tree, work: Path) -> Stamp:
    """Copy the pristine tree, with its modification times, and move it into place when it is complete."""
    work.parent.mkdir(parents=True, exist_ok=True)
    stamp = Stamp(pristine.upstream, pristine.commit, "", {})
    with tempfile.TemporaryDirectory(dir=work.parent, prefix=".new-") as temporary:
        copy = Path(temporary) / "tree"
        shutil.copytree(pristine.path, copy)
        _write_stamp(copy, stamp)
        copy.rename(work)
    return stamp


def _update(work: Path, pristine: Path, target: Mapping[str, bytes]) -> None:
    """Write the files that differ, all others keep their times; remove what belongs to neither side."""
    for path in edited_files(work, pristine, target):
        source = pristine / path
        if path in target:
            _write(work, path, target[path], source)
        elif source.is_file():
            _write(work, path, source.read_bytes(), source)
        else:
            (work / path).unlink()


def _write(work: Path, path: str, content: bytes, like: Path) -> None:
    """Write one file whole or not at all, as a new file: a reader or a link never sees half of it."""
    temporary = work / _TEMPORARY
    temporary.write_bytes(content)
    if like.is_file():
        shutil.copymode(like, temporary)
    (work / path).parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(work / path)


def _same(one: Path, other: Path) -> bool:
    """Equal by size and time (copies keep the time), else by content."""
    a, b = one.stat(), other.stat()
    if a.st_size != b.st_size:
        return False
    return a.st_mtime_ns == b.st_mtime_ns or one.read_bytes() == other.read_bytes()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_stamp(work: Path) -> Stamp | None:
    try:
        return msgspec.json.decode((work / STAMP).read_bytes(), type=Stamp)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def _write_stamp(work: Path, stamp: Stamp) -> None:
    temporary = work / _TEMPORARY
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(stamp), indent=1) + b"\n")
    temporary.replace(work / STAMP)
