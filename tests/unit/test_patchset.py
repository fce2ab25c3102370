"""The patch set: hooks land in one place or nowhere, the pristine tree is never written, edits are never lost."""

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
from hypothesis import given
from hypothesis import strategies as st

from turbo_gguf import patchset
from turbo_gguf.errors import UsageError
from turbo_gguf.patchset import worktree
from turbo_gguf.patchset.hook import FilePatch, Hunk, Probe, parse
from turbo_gguf.patchset.landing import Landing, land
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


def landed(path: str, hunk: list[str], text: str) -> Landing | list[str]:
    return land(FilePatch(path, (Hunk(tuple(hunk)),)), text)


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in worktree.tree_files(root)}


# Landing


def test_a_hunk_lands_where_its_context_is_whatever_its_line_number() -> None:
    result = landed("a.c", ADD_CASE, SWITCH)
    assert isinstance(result, Landing)
    assert result.starts == (7,)
    assert result.text == SWITCH.replace("        default:\n", "        default:\n            if (is_turbo(type)) { return 3; }\n")


def test_an_ambiguous_pre_image_is_refused() -> None:
    result = landed("a.c", ["     x();", "+    y();"], "    x();\n    z();\n    x();\n")
    assert result == ["a.c hunk 1: its context occurs 2 times (lines 1, 3), it must occur once"]


def test_fuzz_is_refused() -> None:
    """One changed context line: `patch` would land it with fuzz 1."""
    result = landed("a.c", ADD_CASE, SWITCH.replace("default:", "default: // other"))
    assert result == [
        "a.c hunk 1: its context is not in the file; this line is not in the file: 'default:'; the nearest is line 7: 'default: // other'"
    ]


def test_the_nearest_line_is_one_beside_what_is_left_of_the_hunk() -> None:
    """The same words elsewhere in the file are not where the hunk belongs."""
    text = "if (rot_k) {\n    first;\n}\nif (n_rot_k) {\n    int nrot = 64;\n}\n"
    result = landed("a.c", [" if (a_rot_k) {", "+    ours;", "     int nrot = 64;"], text)
    assert isinstance(result, list)
    assert result[0].endswith("'if (a_rot_k) {'; the nearest is line 4: 'if (n_rot_k) {', then line 1: 'if (rot_k) {'")


def test_nothing_is_near_a_line_that_is_gone() -> None:
    result = landed("a.c", [" a_call_that_upstream_dropped(1, 2, 3);", "+ours;", " return 0;"], SWITCH)
    assert result == ["a.c hunk 1: its context is not in the file; this line is not in the file: 'a_call_that_upstream_dropped(1, 2, 3);'"]


def test_whitespace_counts() -> None:
    assert not isinstance(landed("a.c", ADD_CASE, SWITCH.replace("        default:", "\tdefault:")), Landing)


def test_context_that_was_torn_apart_is_refused() -> None:
    result = landed("a.c", ADD_CASE, SWITCH.replace("default:\n", "default:\n            // new upstream line\n"))
    assert result == [
        "a.c hunk 1: its context is not in the file; its lines no longer stand together: "
        "'default:' is line 7, 'return 0;' is line 9, 1 line between"
    ]


def test_a_patched_file_is_recognised() -> None:
    first = landed("a.c", ADD_CASE, SWITCH)
    assert isinstance(first, Landing)
    assert landed("a.c", ADD_CASE, first.text) == ["a.c hunk 1: the file already has the change"]


def test_hunks_may_come_in_another_order_in_the_file() -> None:
    hunks = (Hunk((" b", "+2", " c")), Hunk((" x", "+1", " a")))
    result = land(FilePatch("f", hunks), "x\na\nb\nc")
    assert isinstance(result, Landing)
    assert result.text == "x\n1\na\nb\n2\nc"


def test_hunks_that_share_a_line_are_refused() -> None:
    result = land(FilePatch("f", (Hunk((" a", "+1", " b")), Hunk((" b", "+2", " c")))), "a\nb\nc")
    assert result == ["f: two hunks share line 2, write them as one"]


@given(st.lists(st.sampled_from(["a", "b", "}", ""]), max_size=12), st.lists(st.sampled_from(["a", "b", "}", ""]), min_size=1, max_size=3))
def test_landing_is_unique_or_refused(lines: list[str], before: list[str]) -> None:
    """Against a count by hand: exactly one place or an error, and only the added line is new."""
    count = sum(lines[i : i + len(before)] == before for i in range(len(lines) - len(before) + 1))
    text = "\n".join(lines)
    count = count if lines else int(before == [""])  # "" is one empty line
    result = landed("f", [f" {before[0]}", "+NEW", *[f" {line}" for line in before[1:]]], text)
    assert isinstance(result, Landing) == (count == 1)
    if isinstance(result, Landing):
        assert sorted(result.text.split("\n")) == sorted([*text.split("\n"), "NEW"])


# Reading and judging hooks

NEW_FILE = "From: A <a@b.c>\n\ndiff --git a/n.c b/n.c\nnew file mode 100644\n--- /dev/null\n+++ b/n.c\n@@ -0,0 +1 @@\n+x\n"


def test_a_hook_is_parsed() -> None:
    text = hook_text(
        {"ggml/src/ggml.c": [ADD_CASE]}, trailers=["Forwarded: no", "Last-Update: 2026-11-21", "Obsolete-When: a/b.h: TYPE: X"]
    )
    hook = parse("x.patch", text)
    assert (hook.author, hook.subject, hook.why) == ("A <a@b.c>", "ggml : a hook", "Because upstream knows no turbo types.")
    assert hook.probes() == (Probe("a/b.h", "TYPE: X"),)
    assert hook.added == 1
    assert hook.problems() == []


def test_real_git_format_patch_output_is_read() -> None:
    text = hook_text({"f.c": [ADD_CASE]}, subject="ggml : a subject that git\n folds")
    text = text.replace("---\ndiff", " f.c | 1 +\n 1 file changed\n\ndiff").replace("--- a", "index 0123456..89abcde 100644\n--- a")
    hook = parse("x.patch", text.replace("Because", "---\nBecause") + "-- \n2.39.5\n\n")
    assert hook.subject == "ggml : a subject that git folds"
    assert hook.files[0].hunks == (Hunk(tuple(ADD_CASE)),)


@pytest.mark.parametrize(
    ("trailers", "problem"),
    [
        (["Last-Update: 2026-11-21", "Obsolete-When: never"], "'Forwarded:'"),
        (["Forwarded: maybe", "Last-Update: 2026-11-21", "Obsolete-When: never"], "'Forwarded:'"),
        (["Forwarded: no", "Obsolete-When: never"], "'Last-Update:'"),
        (["Forwarded: no", "Last-Update: 21.11.2026", "Obsolete-When: never"], "'Last-Update:'"),
        (["Forwarded: no", "Last-Update: 2026-11-21"], "'Obsolete-When:'"),
        (["Forwarded: no", "Last-Update: 2026-11-21", "Obsolete-When: some day"], "'Obsolete-When:'"),
    ],
)
def test_headers_are_judged(trailers: list[str], problem: str) -> None:
    problems = parse("x.patch", hook_text({"f.c": [ADD_CASE]}, trailers=trailers)).problems()
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_hook_without_a_reason_is_judged() -> None:
    assert parse("x.patch", hook_text({"f.c": [ADD_CASE]}, why="")).problems() == ["x.patch: no text says why the hook exists"]


def test_deleting_needs_a_reason() -> None:
    change = {"f.c": [[" a", "-b", "+c", " d"]]}
    assert parse("x.patch", hook_text(change)).problems() == ["x.patch: deletes upstream lines, but no 'Deletes:' header gives the reason"]
    reason = ["Forwarded: no", "Last-Update: 2026-11-21", "Obsolete-When: never", "Deletes: the assert knows 43 types only"]
    assert parse("x.patch", hook_text(change, trailers=reason)).problems() == []


def test_too_many_lines_in_a_hunk_are_judged() -> None:
    problems = parse("x.patch", hook_text({"f.c": [[" a", "+1", "+2", "+3", "+4", " b"]]})).problems()
    assert problems == ["x.patch: f.c hunk 1: adds 4 lines, at most 3 are allowed"]


def test_long_lines_are_judged() -> None:
    def problems(length: int) -> list[str]:
        return parse("x.patch", hook_text({"f.c": [[" a", "+" + "x" * length, " b"]]})).problems()

    assert problems(120) == []
    assert problems(121) == ["x.patch: f.c hunk 1: adds a line of 121 characters, at most 120 are allowed"]


@pytest.mark.parametrize("hunk", [[" a", " b", "+1", " c"], [" a", "+1", " b", " c"], [" a", "+1", " b", " c", " d", "+2", " e"]])
def test_much_context_is_judged(hunk: list[str]) -> None:
    assert "more than 1 line of context" in parse("x.patch", hook_text({"f.c": [hunk]})).problems()[0]


def test_a_hunk_without_context_is_judged() -> None:
    assert "no line of context" in parse("x.patch", hook_text({"f.c": [[" ", "+1"]]})).problems()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("From: a\nSubject: b\n\nno diff\n", "holds no change"),
        (hook_text({"f.c": [ADD_CASE]}).replace("900,2", "900,7"), "not a patch"),
        (NEW_FILE, "a hook only edits upstream files"),
        (hook_text({"../f.c": [ADD_CASE]}), "outside the tree"),
        (hook_text({"f.c": [ADD_CASE]}) + "\\ No newline at end of file\n", "without a last newline"),
    ],
)
def test_what_is_no_hook_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse("x.patch", text)


# Series


def test_series_is_complete_or_judged(tmp_path: Path) -> None:
    hook = hook_text({"ggml/src/ggml.c": [ADD_CASE]})
    series = "# order\na.patch\nmissing.patch  # why\n\na.patch\n"
    found = patchset.load(write_patches(tmp_path, {"a.patch": hook, "unused.patch": hook}, series=series)).problems()
    assert found == [
        "series: a.patch is listed 2 times",
        "series: hooks/missing.patch does not exist",
        "series: hooks/unused.patch is not listed",
    ]


def test_the_budget_of_hook_lines_is_judged(tmp_path: Path) -> None:
    hunks = [[f" before {i}", "+1", "+2", "+3", f" after {i}"] for i in range(27)]
    patches = patchset.load(write_patches(tmp_path, {"a.patch": hook_text({"f.c": hunks})}))
    assert patches.added == 81
    assert patches.problems() == ["the hooks add 81 lines to upstream files, the budget is 80"]


def test_editors_backups_are_no_overlay(tmp_path: Path) -> None:
    overlay = {"a.c": "", "a.c~": "", ".a.c.swp": "", ".vscode/x.json": ""}
    assert list(patchset.load(write_patches(tmp_path, {}, overlay)).overlay) == ["a.c"]


def test_digest_covers_what_reaches_the_tree_only(tmp_path: Path, patches: patchset.PatchSet) -> None:
    root, before = patches.root, patches.digest
    hook = root / "hooks" / "size.patch"
    hook.write_text(re.sub(r"@@ .* @@", "@@ -1,2 +1,3 @@", hook.read_text()).replace("Because", "Since"))
    assert patchset.load(root).digest == before
    hook.write_text(hook.read_text().replace("return 3", "return 4"))
    changed = patchset.load(root).digest
    assert changed != before
    (root / "overlay" / "new.h").write_text("")
    assert patchset.load(root).digest not in (before, changed)


def test_order_of_hooks_is_part_of_the_digest(patches: patchset.PatchSet) -> None:
    assert msgspec.structs.replace(patches, hooks=patches.hooks[::-1]).digest != patches.digest


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


# The real one


def test_our_own_patch_set_is_sound_by_itself() -> None:
    assert patchset.load().problems() == []
