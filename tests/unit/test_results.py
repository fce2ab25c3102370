"""Which patches and files a result speaks for, and whether they are still those of the tree."""

from __future__ import annotations

from pathlib import Path

import check_results
import pytest

from turbo_gguf import assets
from turbo_gguf.errors import UsageError
from turbo_gguf.judge import results

TABLE = """
[lists]
code = ["src/**/*.c", "!src/lab/*"]

[[rule]]
results = ["speed/table.md", "list.txt"]
made = "make speed"
files = ["@code", "hooks/*.patch"]
"""
PATCH = 'Why: {why}\n\n--- a/x.c\n+++ b/x.c\n@@ -{line},2 +{line},3 @@\n int a;\n+#include "{name}"\n int b;\n'


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {"src/a.c": "int a;\n", "src/b/c.c": "int c;\n", "src/lab/d.c": "int d;\n", "eval/results/depends.toml": TABLE}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "hooks").mkdir()
    hook(tmp_path)
    monkeypatch.setattr(assets, "eval_dir", lambda: tmp_path / "eval")
    monkeypatch.setattr(assets, "is_checkout", lambda: True)
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "build"))
    return tmp_path


def hook(root: Path, line: int = 7, why: str = "x", name: str = "ours.h") -> None:
    (root / "hooks" / "a.patch").write_text(PATCH.format(line=line, why=why, name=name), encoding="utf-8")


def problems(root: Path) -> dict[str, str]:
    return {state.name: state.problem for state in results.check(root) if state.problem}


def test_a_fresh_result_speaks_for_the_tree(tree: Path) -> None:
    table = results.write(tree / "eval/results/speed/table.md", "# Speed\n\n| a |\n")
    text = results.write(tree / "eval/results/list.txt", "# about\n1 2 3\n", patches="0123456789abcdef")
    assert problems(tree) == {}
    assert table.read_text("utf-8").startswith("# Speed\n\nMade with patches `") and table.read_text("utf-8").endswith("`.\n\n| a |\n")
    assert text.read_text("utf-8").startswith("# Made with patches `0123456789ab`; depends on files `")


def test_a_page_has_its_line_in_a_comment(tree: Path) -> None:
    """In front of the document type it would be text on the page, and another way of drawing it."""
    table = tree / "eval/results/depends.toml"
    table.write_text(table.read_text().replace('"list.txt"', '"list.txt", "page.html"'))
    page = results.write(tree / "eval/results/page.html", f"{results.DOCTYPE}<html>a</html>\n", patches="0123456789abcdef")
    top, opened, line, closed, *rest = page.read_text().splitlines()
    assert (top, opened, closed, rest) == ("<!DOCTYPE html>", "<!--", "-->", ["<html>a</html>"])
    assert line.startswith("Made with patches `0123456789ab`; depends on files `")
    assert "page.html" not in problems(tree)
    (tree / "src/a.c").write_text("int b;\n")
    assert "older than" in problems(tree)["page.html"]
    results.write(page, page.read_text())
    assert page.read_text().count("Made with") == 1 and "page.html" not in problems(tree)


@pytest.mark.parametrize("base", ["eval/results", "build/report"])
def test_writing_twice_gives_one_line(tree: Path, base: str) -> None:
    path = results.write(tree / base / "speed/table.md", "### no title\n")
    once = path.read_text("utf-8")
    assert "depends on files" in once.partition("\n")[0]
    assert results.write(path, once).read_text("utf-8") == once


def test_a_file_of_another_place_tells_its_patches_only(tree: Path) -> None:
    assert "depends on" not in results.write(tree / "elsewhere/table.md", "x\n").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "old"),
    [
        (lambda root: (root / "src/b/c.c").write_text("int c2;\n"), True),
        (lambda root: (root / "src/e.c").write_text("int e;\n"), True),
        (lambda root: (root / "src/b/c.c").unlink(), True),
        (lambda root: hook(root, name="theirs.h"), True),
        (lambda root: hook(root, line=9, why="refreshed"), False),
        (lambda root: (root / "src/b/c.c").rename(root / "src/moved.c"), False),
        (lambda root: (root / "src/a.c").write_bytes(b"int a;\r\n"), False),
        (lambda root: (root / "src/lab/d.c").write_text("int d2;\n"), False),
    ],
)
def test_what_makes_a_result_old(tree: Path, change: object, old: bool) -> None:
    for name in ("speed/table.md", "list.txt"):
        results.write(tree / "eval/results" / name, "x\n")
    assert callable(change)
    change(tree)
    assert set(problems(tree)) == ({"speed/table.md", "list.txt"} if old else set())


def test_a_result_without_its_line_or_rule_is_wrong(tree: Path) -> None:
    folder = tree / "eval/results"
    (folder / "speed").mkdir()
    (folder / "speed/table.md").write_text("# Speed\n")
    (folder / "other.md").write_text("x\n")
    found = {state.name: state for state in results.check(tree)}
    assert "no line" in found["speed/table.md"].problem and found["speed/table.md"].hint == "make speed"
    assert "depends.toml does not say" in found["other.md"].problem
    assert "no result has this name" in found["list.txt"].problem
    assert all(state.wrong for state in found.values())


def test_an_unknown_digest_is_always_old(tree: Path) -> None:
    text = results.with_header("# Speed\n", "Made with patches `unknown`; depends on files `unknown`.")
    (tree / "eval/results/list.txt").write_text(text)
    [state] = [state for state in results.check(tree) if state.name == "list.txt"]
    assert "older" in state.problem and not state.wrong


def test_a_pattern_that_matches_nothing_is_an_error(tree: Path) -> None:
    (tree / "src/lab/d.c").unlink()
    with pytest.raises(UsageError, match=r"!src/lab/\* matches no file"):
        results.header("list.txt")


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 1)])
def test_exit_codes(tree: Path, capsys: pytest.CaptureFixture[str], strict: list[str], code: int) -> None:
    for name in ("speed/table.md", "list.txt"):
        results.write(tree / "eval/results" / name, "x\n")
    assert check_results.main(strict) == 0
    (tree / "src/a.c").write_text("int other;\n")
    assert check_results.main(strict) == code
    assert ("error" if code else "warning") + ": eval/results/list.txt: older than" in capsys.readouterr().err
    assert check_results.main(["--strict", "--stamp", *(str(tree / "eval/results" / name) for name in ("speed/table.md", "list.txt"))]) == 0
    (tree / "eval/results/other.md").write_text("x\n")
    assert check_results.main([]) == 2


def test_the_results_of_this_repository_have_their_line() -> None:
    assert [state for state in results.check() if state.wrong] == []
