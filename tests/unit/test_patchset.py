"""The patch set on a tree: the pristine tree is never written, edits are never lost, hooks are written in one form."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from fake_upstream import (
    ADD_CASE,
    ADD_NAME,
    FILES,
    SWITCH,
    canonical,
    default_patches,
    hook_text,
    pristine,
    write_patches,
)

from turbo_gguf import patchset
from turbo_gguf.errors import UsageError
from turbo_gguf.patchset import worktree
from turbo_gguf.patchset.hook import Hunk
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.tools import run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return pristine(tmp_path / "pristine")


@pytest.fixture
def patches(tmp_path: Path) -> patchset.PatchSet:
    return patchset.load(default_patches(tmp_path / "patches"))


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in worktree.tree_files(root)}


# Applying


def test_apply_patches_a_copy(tree: Tree, patches: patchset.PatchSet, home: Path) -> None:
    before = contents(tree.path)
    made = patchset.apply(tree, patches)
    assert made == Tree(path=home / "trees" / "fake", upstream="fake", commit="abcdef123", digest=patches.digest)
    after = contents(made.path)
    assert b"is_turbo(type)" in after["ggml/src/ggml.c"]
    assert b'"f32"' in after["ggml/src/names.c"]
    assert after["ggml/src/names-turbo.inc"] == b'    "turbo3",\n'
    assert contents(tree.path) == before
    assert {path for path in after if after[path] != before.get(path)} == {
        "ggml/src/ggml.c",
        "ggml/src/names.c",
        "ggml/src/names-turbo.inc",
    }


def test_apply_keeps_times_of_unchanged_files(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    assert (made.path / "include/llama.h").stat().st_mtime == 1_600_000_000
    assert (made.path / "ggml/src/ggml.c").stat().st_mtime > 1_600_000_000


def test_apply_again_writes_nothing(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    before = {path: path.stat().st_mtime_ns for path in made.path.rglob("*")}
    assert patchset.apply(tree, patches) == made
    assert {path: path.stat().st_mtime_ns for path in made.path.rglob("*")} == before


def test_a_changed_patch_set_rewrites_only_what_changes(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    before = {path: (made.path / path).stat().st_mtime_ns for path in contents(made.path)}
    (patches.root / "overlay/ggml/src/names-turbo.inc").write_text('    "turbo4",\n')
    again = patchset.apply(tree, patchset.load(patches.root))
    assert again.path == made.path
    assert again.digest != made.digest
    changed = {path for path, time in before.items() if (made.path / path).stat().st_mtime_ns != time}
    assert changed == {"ggml/src/names-turbo.inc"}


def test_a_dropped_hook_is_undone_with_a_new_time(tree: Tree, patches: patchset.PatchSet) -> None:
    """An old time would hide the change from make and ninja."""
    made = patchset.apply(tree, patches)
    built = (made.path / "ggml/src/ggml.c").stat().st_mtime_ns
    (patches.root / "hooks/size.patch").unlink()
    (patches.root / "overlay/ggml/src/names-turbo.inc").unlink()
    (patches.root / "series").write_text("names.patch\n")
    patchset.apply(tree, patchset.load(patches.root))
    assert (made.path / "ggml/src/ggml.c").read_text() == SWITCH
    assert (made.path / "ggml/src/ggml.c").stat().st_mtime_ns > built
    assert not (made.path / "ggml/src/names-turbo.inc").exists()


def test_a_patched_file_is_not_linked_to_the_pristine_one(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    for path in contents(tree.path):
        assert not (made.path / path).samefile(tree.path / path)


@pytest.mark.parametrize("path", ["ggml/src/ggml.c", "ggml/src/names-turbo.inc", "include/llama.h", "new.c"])
def test_edits_in_the_work_tree_are_refused_by_name(tree: Tree, patches: patchset.PatchSet, path: str) -> None:
    made = patchset.apply(tree, patches)
    (made.path / path).write_text("precious work\n")
    with pytest.raises(UsageError, match=rf"has edits that the patch set does not explain:\n  {re.escape(path)}$") as caught:
        patchset.apply(tree, patches)
    assert "turbo-gguf patch export" in caught.value.hint
    assert (made.path / path).read_text() == "precious work\n"
    assert patchset.state(tree).dirty == (path,)


def test_an_edit_of_the_same_size_is_noticed(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    edit(made.path / "include/llama.h", "(void)", "(long)")
    with pytest.raises(UsageError, match=r"\n  include/llama\.h$"):
        patchset.apply(tree, patches)


def test_force_drops_edits(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    whole = contents(made.path)
    for path in ("ggml/src/ggml.c", "include/llama.h", "new.c"):
        (made.path / path).write_text("edit\n")
    (made.path / "tests/run.sh").unlink()
    patchset.apply(tree, patches, force=True)
    assert contents(made.path) == whole


def test_an_interrupted_apply_is_completed(tree: Tree, patches: patchset.PatchSet, monkeypatch: pytest.MonkeyPatch) -> None:
    write = worktree._write

    def fail_on_second(work: Path, path: str, content: bytes, like: Path) -> None:
        if path == "ggml/src/names.c":
            raise KeyboardInterrupt
        write(work, path, content, like)

    with monkeypatch.context() as patched:
        patched.setattr(worktree, "_write", fail_on_second)
        with pytest.raises(KeyboardInterrupt):
            patchset.apply(tree, patches)
    assert patchset.state(tree).digest == ""
    made = patchset.apply(tree, patches)
    assert b"names-turbo.inc" in (made.path / "ggml/src/names.c").read_bytes()


def test_an_interrupted_apply_of_other_patches_is_no_edit(
    tree: Tree, patches: patchset.PatchSet, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    patchset.apply(tree, patches)
    first = patches.root / "overlay/ggml/src/names-turbo.inc"
    first.write_text("second\n")
    with monkeypatch.context() as patched:
        patched.setattr(worktree, "_write_stamp", _only_once(worktree._write_stamp))
        with pytest.raises(KeyboardInterrupt):
            patchset.apply(tree, patchset.load(patches.root))
    assert (home / "trees/fake/ggml/src/names-turbo.inc").read_text() == "second\n"
    first.write_text("third\n")
    patchset.apply(tree, patchset.load(patches.root))
    assert (home / "trees/fake/ggml/src/names-turbo.inc").read_text() == "third\n"


def _only_once(function: object) -> object:
    calls: list[int] = []

    def wrapped(*args: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        function(*args)  # type: ignore[operator]

    return wrapped


def test_a_folder_that_is_not_ours_is_refused(tree: Tree, patches: patchset.PatchSet, home: Path) -> None:
    (home / "trees/fake").mkdir(parents=True)
    (home / "trees/fake/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="turbo-gguf did not make it"):
        patchset.apply(tree, patches, force=True)
    assert (home / "trees/fake/thesis.txt").exists()


def test_a_new_commit_of_the_same_upstream_is_followed(tree: Tree, patches: patchset.PatchSet, tmp_path: Path) -> None:
    made = patchset.apply(tree, patches)
    newer = pristine(tmp_path / "newer", {**FILES, "include/llama.h": "int llama(int);\n", "added.c": "\n"})
    newer = msgspec.structs.replace(newer, commit="fedcba987")
    patchset.apply(newer, patches)
    assert (made.path / "include/llama.h").read_text() == "int llama(int);\n"
    assert (made.path / "include/llama.h").stat().st_mtime > 1_600_000_000
    assert (made.path / "added.c").exists()


def test_a_tree_that_holds_our_patches_already_is_refused(tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    patched = Tree(path=made.path, upstream="again", commit="x", digest="")
    with pytest.raises(UsageError) as caught:
        patchset.apply(patched, patches)
    assert "size.patch: ggml/src/ggml.c hunk 1: the file already has the change" in caught.value.message
    assert "overlay: ggml/src/names-turbo.inc exists upstream too" in caught.value.message


def test_hooks_stack_in_the_order_of_the_series(tmp_path: Path, tree: Tree) -> None:
    second = ["+            // and another", "             if (is_turbo(type)) { return 3; }"]
    hooks = {"b.patch": hook_text({"ggml/src/ggml.c": [ADD_CASE]}), "a.patch": hook_text({"ggml/src/ggml.c": [second]})}
    made = patchset.apply(tree, patchset.load(write_patches(tmp_path / "p", hooks)))
    assert "default:\n            // and another\n            if (is_turbo" in (made.path / "ggml/src/ggml.c").read_text()


# Checking and writing


def test_check_is_content_with_a_sound_set(tree: Tree, patches: patchset.PatchSet) -> None:
    assert patchset.check(patches, [tree], reference="fake") == patchset.Report((), (), ("fake",))


def test_check_wants_the_canonical_form_on_the_reference_only(tmp_path: Path, tree: Tree) -> None:
    patches = patchset.load(write_patches(tmp_path / "p", {"a.patch": hook_text({"ggml/src/ggml.c": [ADD_CASE]})}))
    found = patchset.check(patches, [tree], reference="fake").problems
    assert found == ("fake: a.patch: differs from its canonical form, run: turbo-gguf patch refresh",)
    assert patchset.check(patches, [tree], reference="other").problems == ()


def test_check_names_the_upstream_that_moved(tmp_path: Path, tree: Tree, patches: patchset.PatchSet) -> None:
    moved = {**FILES, "ggml/src/ggml.c": SWITCH.replace("default:", "case 3:"), "ggml/src/names-turbo.inc": ""}
    other = pristine(tmp_path / "other", moved, name="next")
    found = patchset.check(patches, [tree, other], reference="fake").problems
    assert len(found) == 2
    assert found[0].startswith("next: size.patch: ggml/src/ggml.c hunk 1: its context is not in the file")
    assert found[1] == "next: overlay: ggml/src/names-turbo.inc exists upstream too"


def test_check_names_a_missing_file(tmp_path: Path, patches: patchset.PatchSet) -> None:
    files = {path: text for path, text in FILES.items() if path != "ggml/src/names.c"}
    found = patchset.check(patches, [pristine(tmp_path / "o", files)], reference="").problems
    assert found == ("fake: names.patch: ggml/src/names.c does not exist upstream",)


def test_check_looks_for_included_files(tmp_path: Path, tree: Tree) -> None:
    text = canonical(hook_text({"ggml/src/names.c": [ADD_NAME]}))
    patches = patchset.load(write_patches(tmp_path / "p", {"names.patch": text}))
    found = patchset.check(patches, [tree], reference="fake").problems
    assert found == ('fake: names.patch: ggml/src/names.c includes "names-turbo.inc", which neither the overlay nor upstream has',)


def test_check_reports_an_obsolete_hook_as_news(tmp_path: Path, tree: Tree) -> None:
    trailers = ["Forwarded: no", "Last-Update: 2026-11-21", "Obsolete-When: include/llama.h: int llama(void)"]
    text = canonical(hook_text({"ggml/src/ggml.c": [ADD_CASE]}, trailers=trailers))
    report = patchset.check(patchset.load(write_patches(tmp_path / "p", {"a.patch": text})), [tree], reference="fake")
    assert report.problems == ()
    assert report.obsolete == ("fake: a.patch is obsolete: include/llama.h has 'int llama(void)'",)


def test_refresh_is_deterministic_and_changes_line_numbers_only(tmp_path: Path, tree: Tree, patches: patchset.PatchSet) -> None:
    root = patches.root
    first = {path.name: path.read_bytes() for path in (root / "hooks").iterdir()}
    assert patchset.refresh(patches, tree) == []
    longer = {**FILES, "ggml/src/ggml.c": "// new\n// lines\n" + SWITCH}
    moved = pristine(tmp_path / "moved", longer, name="next")
    assert patchset.refresh(patchset.load(root), moved) == ["size.patch"]
    old, new = first["size.patch"].decode().splitlines(), (root / "hooks/size.patch").read_text().splitlines()
    assert [(a, b) for a, b in zip(old, new, strict=True) if a != b] == [("@@ -7,2 +7,3 @@", "@@ -9,2 +9,3 @@")]
    assert patchset.load(root).digest == patches.digest
    assert patchset.refresh(patchset.load(root), tree) == ["size.patch"]
    assert {path.name: path.read_bytes() for path in (root / "hooks").iterdir()} == first


def test_refresh_drops_git_noise_and_keeps_the_words(tmp_path: Path, tree: Tree) -> None:
    text = hook_text({"ggml/src/ggml.c": [ADD_CASE]}).replace("--- a", "index 01..89 100644\n--- a") + "-- \n2.39.5\n\n"
    root = write_patches(tmp_path / "p", {"a.patch": text})
    assert patchset.refresh(patchset.load(root), tree) == ["a.patch"]
    written = (root / "hooks/a.patch").read_text()
    assert written == canonical(hook_text({"ggml/src/ggml.c": [ADD_CASE]}))
    assert "index" not in written
    assert "Because upstream knows no turbo types." in written


def test_line_numbers_count_earlier_hooks_of_the_series(tmp_path: Path, tree: Tree) -> None:
    early = hook_text({"ggml/src/ggml.c": [[" int size(int type) {", "+    // hook", "     switch (type) {"]]})
    root = write_patches(tmp_path / "p", {"a.patch": early, "b.patch": hook_text({"ggml/src/ggml.c": [ADD_CASE]})})
    patchset.refresh(patchset.load(root), tree)
    assert "@@ -8,2 +8,3 @@" in (root / "hooks/b.patch").read_text()


def test_line_numbers_count_earlier_hunks_of_the_file() -> None:
    early = [" int size(int type) {", "+    // one", "+    // two", "     switch (type) {"]
    text = canonical(hook_text({"ggml/src/ggml.c": [early, ADD_CASE]}))
    assert re.findall(r"@@ .* @@", text) == ["@@ -1,2 +1,4 @@", "@@ -7,2 +9,3 @@"]


def test_canonical_hooks_are_patches_for_git_too(tmp_path: Path, tree: Tree, patches: patchset.PatchSet) -> None:
    made = patchset.apply(tree, patches)
    copy = pristine(tmp_path / "copy").path
    run(["git", "init", "-q", copy], log=tmp_path / "git.log")
    for hook in patches.hooks:
        run(["git", "-C", copy, "apply", patches.root / "hooks" / hook.name], log=tmp_path / "git.log")
    for path in ("ggml/src/ggml.c", "ggml/src/names.c"):
        assert (copy / path).read_bytes() == (made.path / path).read_bytes()


# Export


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_export_makes_a_new_hook_from_an_edit(tree: Tree, patches: patchset.PatchSet) -> None:
    work = patchset.apply(tree, patches).path
    edit(work / "ggml/src/names.c", "static int count", "// more names\nstatic int count")
    path = patchset.export(patches, tree, work, "count", subject="ggml : count", why="Because.")
    again = patchset.load(patches.root)
    assert [hook.name for hook in again.hooks] == ["size.patch", "names.patch", "count.patch"]
    assert again.hooks[2].hunks == (Hunk((" ", "+// more names", " static int count = 2;")),)
    assert patchset.check(again, [tree], reference="fake").problems == ()
    assert "Forwarded: no\nLast-Update: " in path.read_text()
    assert patchset.apply(tree, again).path == work


def test_export_replaces_the_lines_of_an_old_hook(tree: Tree, patches: patchset.PatchSet) -> None:
    work = patchset.apply(tree, patches).path
    edit(work / "ggml/src/ggml.c", "return 3;", "return 5;")
    patchset.export(patches, tree, work, "size")
    again = patchset.load(patches.root)
    assert [hook.name for hook in again.hooks] == ["size.patch", "names.patch"]
    assert "return 5;" in again.hooks[0].hunks[0].lines[1]
    assert again.hooks[0].why == patches.hooks[0].why
    assert patchset.check(again, [tree], reference="fake").problems == ()


def test_export_refuses_what_cannot_be_a_hook(tree: Tree, patches: patchset.PatchSet) -> None:
    work = patchset.apply(tree, patches).path
    with pytest.raises(UsageError, match="has no edits"):
        patchset.export(patches, tree, work, "none", subject="s", why="w")
    edit(work / "ggml/src/ggml.c", "        case 2:\n", "")
    with pytest.raises(UsageError, match="deletes upstream lines"):
        patchset.export(patches, tree, work, "gone", subject="s", why="w")
    (work / "new.c").write_text("\n")
    with pytest.raises(UsageError, match=r"not upstream files: new\.c"):
        patchset.export(patches, tree, work, "new", subject="s", why="w")
    with pytest.raises(UsageError, match="needs a subject and a reason"):
        patchset.export(patches, tree, work, "new")
    with pytest.raises(UsageError, match="no order number"):
        patchset.export(patches, tree, work, "0001-new", subject="s", why="w")
    assert {path.name for path in (patches.root / "hooks").iterdir()} == {"size.patch", "names.patch"}
