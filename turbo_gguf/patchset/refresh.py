"""Writing hooks: again in their canonical form, or for the first time from edits of a work tree."""

from __future__ import annotations

import datetime
import re
import tempfile
from pathlib import Path

import msgspec

from turbo_gguf.errors import UsageError
from turbo_gguf.patchset.hook import CONTEXT, NEVER, FilePatch, Hook, parse_diff, render
from turbo_gguf.patchset.landing import land
from turbo_gguf.patchset.series import PatchSet, patch_or_fail
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.patchset.worktree import edited_files
from turbo_gguf.tools import run

AUTHOR = "turbo-gguf <turbo-gguf@localhost>"


def refresh(patches: PatchSet, onto: Tree) -> list[str]:
    """Write every hook in its canonical form, with the line numbers of ``onto``; return the names of changed hooks.

    The lines of a hunk stay as they are: a hunk that no longer lands is an error, to be mended in the work tree.

    Raises:
        UsageError: the patch set does not apply to ``onto``.
    """
    made = patch_or_fail(patches, onto.path, onto.upstream)
    changed = []
    for hook in patches.hooks:
        path = patches.root / "hooks" / hook.name
        text = render(hook, made.starts[hook.name])
        if text != path.read_text("utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(hook.name)
    return changed


def export(patches: PatchSet, pristine: Tree, work: Path, name: str, *, subject: str = "", why: str = "", obsolete_when: str = "") -> Path:
    """Write edits that were made to upstream files in a work tree as the hook ``name``, and list it in the series.

    A hook of that name keeps its place in the series and the parts of its header that are not given; its old lines are
    replaced by what the work tree has now.

    Raises:
        UsageError: there is no edit, a new hook has no subject or reason, or an edited file is not an upstream file.
    """
    file_name = name if name.endswith(".patch") else f"{name}.patch"
    if not re.fullmatch(r"[a-z][a-z0-9-]*\.patch", file_name) or re.search(r"\d{4}", file_name):
        raise UsageError(f"{file_name}: hooks have names such as cuda-set-rows: small letters and dashes, no order number")
    old = next((hook for hook in patches.hooks if hook.name == file_name), None)
    if old is None and not (subject and why):
        raise UsageError("a new hook needs a subject and a reason", "add: --subject 'module : what' --why 'reason'")
    others = msgspec.structs.replace(patches, hooks=tuple(hook for hook in patches.hooks if hook is not old), overlay={})
    base = patch_or_fail(others, pristine.path, pristine.upstream).files
    edited = [path for path in edited_files(work, pristine.path, base) if path not in patches.overlay]
    if not edited:
        raise UsageError(f"{work} has no edits of upstream files")
    new = [path for path in edited if not (pristine.path / path).is_file()]
    if new:
        raise UsageError(f"not upstream files: {', '.join(new)}", "put them into ggml-patches/overlay")
    before = {path: base.get(path) or (pristine.path / path).read_bytes() for path in edited}
    files = _diff(file_name, before, work)
    hook = Hook(
        name=file_name,
        author=old.author if old else AUTHOR,
        subject=subject or (old.subject if old else ""),
        why=why or (old.why if old else ""),
        trailers=_trailers(old, obsolete_when),
        files=files,
    )
    return _store(patches, hook, before)


def _trailers(old: Hook | None, obsolete_when: str) -> tuple[tuple[str, str], ...]:
    """Header lines of a new hook, or those of the old one with today's date and what was given."""
    kept = old.trailers if old else (("Forwarded", "no"), ("Obsolete-When", NEVER))
    replaced = {"Last-Update", "Obsolete-When"} if obsolete_when else {"Last-Update"}
    new = [("Last-Update", datetime.date.today().isoformat())]
    if obsolete_when:
        new.append(("Obsolete-When", obsolete_when))
    return (*(item for item in kept if item[0] not in replaced), *new)


def _store(patches: PatchSet, hook: Hook, before: dict[str, bytes]) -> Path:
    starts = {}
    for file in hook.files:
        landed = land(file, before[file.path].decode("utf-8"))
        if isinstance(landed, list):
            raise UsageError("\n  ".join(["the edit cannot be a hook, choose another line:", *landed]))
        starts[file.path] = landed.starts
    problems = hook.problems()
    if problems:
        raise UsageError("\n  ".join(["the edit cannot be a hook:", *problems]))
    path = patches.root / "hooks" / hook.name
    path.parent.mkdir(exist_ok=True)
    path.write_text(render(hook, starts), encoding="utf-8")
    if hook.name not in patches.entries:
        series = patches.root / "series"
        text = series.read_text("utf-8")
        series.write_text(text + ("" if not text or text.endswith("\n") else "\n") + f"{hook.name}\n", encoding="utf-8")
    return path


def _diff(name: str, before: dict[str, bytes], work: Path) -> tuple[FilePatch, ...]:
    """Differences between texts and the files of a work tree, by git with the context of a hook."""
    parts = []
    with tempfile.TemporaryDirectory(prefix="turbo-gguf-") as folder:
        for path, content in before.items():
            old = Path(folder) / "old"
            old.write_bytes(content)
            argv: list[str | Path] = [
                "git",
                "diff",
                "--no-index",
                "--no-color",
                "--no-ext-diff",
                "--minimal",
                f"-U{CONTEXT}",
                "--",
                old,
                work / path,
            ]
            done = run(argv, log=Path(folder) / "diff.log", check=False)
            lines = done.stdout.read_text("utf-8").splitlines(keepends=True)
            body = "".join(lines[next((i for i, line in enumerate(lines) if line.startswith("@@")), len(lines)) :])
            parts.append(f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n{body}")
    return parse_diff(name, "".join(parts))
