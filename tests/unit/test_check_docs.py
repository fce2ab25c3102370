"""Documents that can drift from the program: help pages, links, the list of upstreams."""

from __future__ import annotations

from pathlib import Path

import check_docs
import pytest
from click.testing import CliRunner

from turbo_gguf.cli import COMMANDS, main

ROOT = check_docs.REPOSITORY


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_the_page_of_commands_is_what_the_program_prints() -> None:
    assert check_docs.help_problems(ROOT) == []


def test_every_command_is_on_the_page_as_help_prints_it() -> None:
    page = check_docs.bare(check_docs.page())
    for name in COMMANDS:
        done = CliRunner().invoke(main, [name, "--help"], prog_name="turbo-gguf", terminal_width=check_docs.WIDTH)
        assert done.exit_code == 0 and check_docs.bare(done.output) in page, name


def test_another_help_text_is_shown_where_it_begins(tmp_path: Path) -> None:
    text = check_docs.page().replace("Measure prefill and decode speed", "Measure speed", 1)
    write(tmp_path, {str(check_docs.PAGE): text})
    [problem] = check_docs.help_problems(tmp_path)
    assert "Measure speed" in problem and "Measure prefill" in problem and "--write" in problem


def test_line_breaks_are_no_difference(tmp_path: Path) -> None:
    write(tmp_path, {str(check_docs.PAGE): check_docs.page().replace(" Measure ", "\n      Measure ")})
    assert check_docs.help_problems(tmp_path) == []


def test_every_setting_is_in_its_reference() -> None:
    assert check_docs.setting_problems(ROOT) == []


def test_a_setting_that_its_reference_lacks(tmp_path: Path) -> None:
    text = (ROOT / check_docs.SPECIFICATIONS).read_text("utf-8").replace("--cache-tail", "--cache-last")
    write(tmp_path, {str(check_docs.SPECIFICATIONS): text})
    assert check_docs.setting_problems(tmp_path) == [f"{check_docs.SPECIFICATIONS} lacks `--cache-tail`"]


def test_every_room_is_on_the_map() -> None:
    assert check_docs.map_problems(ROOT) == []


def test_a_room_that_the_map_lacks(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            str(check_docs.MAP): "| `judge/` | `gate` | verdicts |\n| `src/turbo/` | `decay`, `compat.h` |\n",
            "turbo_gguf/judge/__init__.py": "",
            "turbo_gguf/judge/gate.py": "",
            "turbo_gguf/judge/report.py": "",
            "turbo_gguf/tools.py": "",
            "ggml-patches/overlay/src/turbo/decay.cpp": "",
            "ggml-patches/overlay/src/turbo/decay.h": "",
            "ggml-patches/overlay/src/turbo/compat.h": "",
            "ggml-patches/overlay/src/turbo/state.cpp": "",
        },
    )
    assert check_docs.map_problems(tmp_path) == [f"{check_docs.MAP} lacks judge/report", f"{check_docs.MAP} lacks src/turbo/state"]


def test_links_of_all_documents_resolve() -> None:
    assert check_docs.link_problems(ROOT, check_docs.documents(ROOT)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[b](b.md)", None),
        ("[b](b.md#a-heading-with-code)", None),
        ("[b](b.md#a-heading-with-code-1)", None),
        ("[here](#here)\n\n# Here", None),
        ("[web](https://example.org/x)", None),
        ("`[b](none.md)` and\n```\n[c](none.md)\n```", None),
        ("[b](none.md)", "a.md: none.md does not exist"),
        ("![plot](none.png)", "a.md: none.png does not exist"),
        ("[b](b.md#none)", "a.md: b.md#none: no such heading"),
        ("[here](#none)", "a.md: #none: no such heading"),
    ],
)
def test_links(tmp_path: Path, text: str, problem: str | None) -> None:
    write(tmp_path, {"a.md": text, "b.md": "# A heading, with `code`\n\n## A heading: with code\n"})
    assert check_docs.link_problems(tmp_path, [Path("a.md")]) == ([problem] if problem else [])


def test_every_report_has_a_test_or_a_reason() -> None:
    assert check_docs.test_problems(ROOT) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("| #1 | `a/test_b.py` |", ""),
        ("| #1 | `a/test_b.py::test_c[two]`, not covered: a GPU |", ""),
        ("| #1 | not covered: a GPU |", ""),
        ("| #1 | nothing |", "neither a test nor"),
        ("| #1 | `a/test_c.py` |", "tests/a/test_c.py does not exist"),
        ("| #1 | `a/test_b.py::test_c`, `a/test_b.py::test_` |", "tests/a/test_b.py::test_ does not exist"),
        ("| #1 | `a/test_b.py::test_c[three]` |", "tests/a/test_b.py::test_c[three] does not exist"),
    ],
)
@pytest.mark.parametrize(("path", "what"), [(check_docs.REPORTS, "report"), (check_docs.FAULTS, "fault")], ids=["reports", "faults"])
def test_reports(tmp_path: Path, path: Path, what: str, row: str, problem: str) -> None:
    page = f"| {what} | test |\n|---|---|\n{row}\n"
    write(tmp_path, {str(path): page, "tests/a/test_b.py": 'CASES = ["two"]\n\n\ndef test_c() -> None: ...\n'})
    found = check_docs.test_problems(tmp_path)
    assert len(found) == bool(problem) and all(problem in said for said in found)


def test_the_changelog_lists_the_supported_upstreams() -> None:
    assert check_docs.changelog_problems(ROOT) == []


def test_a_changelog_that_lags(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "ggml-patches/upstreams.toml": 'default = "b2"\n[[upstream]]\nname = "b2"\n[[upstream]]\nname = "b1"\n',
            "CHANGELOG.md": "# Changelog\n\nSupported upstreams: `b1` (default).\n\nSupported upstreams: `b0` (default).\n",
        },
    )
    [problem] = check_docs.changelog_problems(tmp_path)
    assert "Supported upstreams: `b2` (default), `b1`." in problem
    (tmp_path / "docs/reference").mkdir(parents=True)
    check_docs.write(tmp_path)
    assert check_docs.changelog_problems(tmp_path) == [] and "`b0`" in (tmp_path / "CHANGELOG.md").read_text("utf-8")
