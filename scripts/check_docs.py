"""Compare the documents with the program: help pages, settings, the map, links, tests, and the list of upstreams in the changelog.

    python scripts/check_docs.py           # says what differs (make check)
    python scripts/check_docs.py --write   # writes docs/reference/cli.md and the changelog's list again

Exit codes: 0 all is well, 2 something differs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from turbo_gguf.cache.settings import SETTINGS
from turbo_gguf.cli import main as program
from turbo_gguf.errors import EXIT_USAGE

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = Path("docs/reference/cli.md")
CHANGELOG = Path("CHANGELOG.md")
UPSTREAMS = Path("ggml-patches/upstreams.toml")
MAP = Path("docs/README.md")
SPECIFICATIONS = Path("docs/reference/cache-spec.md")
REPORTS = Path("docs/reference/known-reports.md")
FAULTS = Path("docs/reference/gpu-faults.md")
HINT = "python scripts/check_docs.py --write"

HEAD = """# Commands

What `--help` prints, for every command. This page is written by `python scripts/check_docs.py --write`, and `make check` compares it
with the program. How commands end: [exit codes](exit-codes.md).
"""
WIDTH = 120


# --- help pages -----------------------------------------------------------------------------------------------------------


def commands(
    command: click.Command, names: tuple[str, ...] = ("turbo-gguf",), parent: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """Name and help text of a command and of all below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, info_name=names[-1], parent=parent, **settings)
    yield " ".join(names), command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from commands(below, (*names, name), context)


def page() -> str:
    """The page with the help of all commands."""
    return HEAD + "".join(f"\n## {name}\n\n```\n{text.rstrip()}\n```\n" for name, text in commands(program))


def bare(text: str) -> str:
    """A text without white space: line breaks and columns differ between versions of click."""
    return "".join(text.split())


def help_problems(root: Path) -> list[str]:
    """Compare the page with the program."""
    path = root / PAGE
    before, after = path.read_text("utf-8") if path.is_file() else "", page()
    if bare(before) == bare(after):
        return []
    there, here = before.split(), after.split()
    at = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    says, prints = (" ".join(text[max(at - 5, 0) : at + 6]) for text in (there, here))
    return [f"{PAGE} differs from the program: it says “{says}”, the program prints “{prints}”; {HINT}"]


# --- settings -------------------------------------------------------------------------------------------------------------


def setting_problems(root: Path) -> list[str]:
    """Look for words, options and variables of settings that the page on cache specifications lacks."""
    text = (root / SPECIFICATIONS).read_text("utf-8")
    names = [name for s in SETTINGS for name in (f"`{s.word}=", f"`{s.option}`", *(f"`{variable}`" for variable in s.variables))]
    return [
        f"{SPECIFICATIONS} lacks {name}`" if name.endswith("=") else f"{SPECIFICATIONS} lacks {name}" for name in names if name not in text
    ]


# --- map ------------------------------------------------------------------------------------------------------------------


def rooms(root: Path) -> Iterator[tuple[str, str]]:
    """Wing and room of each module of the driver and of each file below the overlay's src/turbo, as the map names them."""
    for path in sorted((root / "turbo_gguf").glob("[a-z]*/**/[a-z]*.py")):
        wing = path.relative_to(root / "turbo_gguf").parts[0]
        if wing not in ("cli", "data"):
            yield f"{wing}/", path.stem
    for path in sorted((root / "ggml-patches/overlay/src/turbo").iterdir()):
        if path.suffix in (".cpp", ".h"):
            yield "src/turbo/", path.stem if path.stem != "compat" else path.name


def map_problems(root: Path) -> list[str]:
    """Look for rooms that the map lacks."""
    lines = (root / MAP).read_text("utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    lost = [f"{wing}{room}" for wing, room in rooms(root) if f"`{room}`" not in rows.get(wing, "")]
    return [f"{MAP} lacks {room}" for room in dict.fromkeys(lost)]


# --- links ----------------------------------------------------------------------------------------------------------------

LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
CODE = re.compile(r"`[^`\n]*`")


def anchors(text: str) -> set[str]:
    """Names that headings get on the web."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*$", FENCE.sub("", text), re.M):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", bare.lower()).replace(" ", "-")
        count = found.get(name, 0)
        names.add(f"{name}-{count}" if count else name)
        found[name] = count + 1
    return names


def link_problems(root: Path, paths: Sequence[Path]) -> list[str]:
    """Look for links to files and headings that are not there. Addresses on the web are not asked."""
    problems = []
    for path in paths:
        text = (root / path).read_text("utf-8")
        for target in LINK.findall(CODE.sub("", FENCE.sub("", text))):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            found = (root / path.parent / file) if file else root / path
            if not found.exists():
                problems.append(f"{path}: {target} does not exist")
            elif anchor and found.suffix == ".md" and anchor not in anchors(found.read_text("utf-8")):
                problems.append(f"{path}: {target}: no such heading")
    return problems


def documents(root: Path) -> list[Path]:
    """All Markdown files that are committed or about to be."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.md"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(Path(name) for name in found if name and (root / name).is_file())


# --- tests ----------------------------------------------------------------------------------------------------------------

TEST = re.compile(r"`([\w/-]+\.py)(?:::(\w+))?(?:\[([^\]`]+)\])?`")
NO_TEST = "not covered: "


def test_problems(root: Path) -> list[str]:
    """Look for reports and faults without a test or a reason, and for tests that are not there. A case is a word of its file."""
    problems = []
    lines = [
        (page, line) for page in (REPORTS, FAULTS) if (root / page).is_file() for line in (root / page).read_text("utf-8").splitlines()
    ]
    for page, line in lines:
        tests = TEST.findall(line)
        if line.startswith("| ") and not line.startswith(("| report ", "| fault ")) and not tests and NO_TEST not in line:
            problems.append(f"{page}: neither a test nor “{NO_TEST}”: {line}")
        for file, name, case in tests:
            path = root / "tests" / file
            text = path.read_text("utf-8") if path.is_file() else None
            if text is None or (name and f"def {name}(" not in text) or (case and not re.search(rf"\b{re.escape(case)}\b", text)):
                problems.append(f"{page}: tests/{file}{name and f'::{name}'}{case and f'[{case}]'} does not exist")
    return problems


# --- upstreams ------------------------------------------------------------------------------------------------------------

SUPPORTED = re.compile(r"^Supported upstreams: .*$", re.M)


def supported(root: Path) -> str:
    """The sentence on upstreams that the changelog must have for the newest version."""
    table = tomllib.loads((root / UPSTREAMS).read_text("utf-8"))
    names = [entry["name"] for entry in table["upstream"]]
    return f"Supported upstreams: {', '.join(f'`{name}`' + (' (default)' if name == table['default'] else '') for name in names)}."


def changelog_problems(root: Path) -> list[str]:
    """Compare the first list of upstreams in the changelog with upstreams.toml."""
    found = SUPPORTED.search((root / CHANGELOG).read_text("utf-8"))
    wanted = supported(root)
    if found and found[0] == wanted:
        return []
    return [f"{CHANGELOG} says “{found[0] if found else 'nothing'}”, {UPSTREAMS} “{wanted}”; {HINT}"]


def write(root: Path) -> None:
    """Write what is generated."""
    (root / PAGE).write_text(page(), "utf-8")
    log = root / CHANGELOG
    log.write_text(SUPPORTED.sub(lambda _: supported(root), log.read_text("utf-8"), count=1), "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write what is generated")
    if parser.parse_args(argv).write:
        write(REPOSITORY)
    problems = [
        *help_problems(REPOSITORY),
        *setting_problems(REPOSITORY),
        *map_problems(REPOSITORY),
        *link_problems(REPOSITORY, documents(REPOSITORY)),
        *test_problems(REPOSITORY),
        *changelog_problems(REPOSITORY),
    ]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_USAGE if problems else 0


if __name__ == "__main__":
    sys.exit(main())
