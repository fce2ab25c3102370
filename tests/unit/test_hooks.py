"""Hooks and the series: a hook lands in one place or nowhere, and says why it exists."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from fake_upstream import ADD_CASE, SWITCH, default_patches, hook_text, write_patches
from hypothesis import given
from hypothesis import strategies as st

from turbo_gguf import patchset
from turbo_gguf.errors import UsageError
from turbo_gguf.patchset.hook import FilePatch, Hunk, Probe, parse
from turbo_gguf.patchset.landing import Landing, land


@pytest.fixture
def patches(tmp_path: Path) -> patchset.PatchSet:
    return patchset.load(default_patches(tmp_path / "patches"))


def landed(path: str, hunk: list[str], text: str) -> Landing | list[str]:
    return land(FilePatch(path, (Hunk(tuple(hunk)),)), text)


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


# The real one


def test_our_own_patch_set_is_sound_by_itself() -> None:
    assert patchset.load().problems() == []
