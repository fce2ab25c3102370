"""Files of ``eval/results``: each says which patches and which files it speaks for.

The line reads ``Made with patches `DIGEST`; depends on files `DIGEST`.`` The first digest is that of the patch set. The second
one is of the files that the result depends on, as ``eval/results/depends.toml`` lists them: it needs no history, so a shallow
clone can compare it, and it stays when something else changes.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from turbo_gguf import assets, patchset
from turbo_gguf.errors import UsageError

TABLE = "depends.toml"
UNKNOWN = "unknown"
"""Stands for a digest that was not written down when the result was made. Such a result is always old."""

SUFFIXES = (".html", ".md", ".txt")
"""Of results. Other files are pictures and data beside them."""

DOCTYPE = "<!DOCTYPE html>\n"
DIGITS = 12
LINE = re.compile(
    rf"^(?:# )?Made with patches `([0-9a-f]{{{DIGITS}}}|{UNKNOWN}|none)`(?:; depends on files `([0-9a-f]{{{DIGITS}}}|{UNKNOWN})`)?\.$",
    re.M,
)


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one result, or a group of them, depends on."""

    results: tuple[str, ...]  # patterns of names below eval/results
    made: str  # the command that makes them
    files: tuple[str, ...]  # patterns of paths in the repository; those with ! in front are left out


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``depends.toml``: names of lists of files, and rules. ``@NAME`` in a rule stands for a list."""

    lists: dict[str, tuple[str, ...]]
    rule: tuple[Rule, ...]


class State(msgspec.Struct, frozen=True):
    """What was found out about one result."""

    name: str
    problem: str  # "": speaks for the tree as it is
    wrong: bool = False  # not only old: the file or the table must be mended
    hint: str = ""


def folder() -> Path:
    """``eval/results`` of the checkout."""
    return assets.eval_dir() / "results"


def load(path: Path | None = None) -> tuple[Rule, ...]:
    """Read the table, with its lists put in.

    Raises:
        UsageError: the table is not TOML, or not of this form.
    """
    file = path or folder() / TABLE
    try:
        table = msgspec.convert(tomllib.loads(file.read_text("utf-8")), Table)
        return tuple(
            msgspec.structs.replace(
                rule, files=tuple(p for name in rule.files for p in (table.lists[name[1:]] if name.startswith("@") else (name,)))
            )
            for rule in table.rule
        )
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, KeyError) as error:
        raise UsageError(f"{file}: {error}") from None


def rule_of(name: str, rules: tuple[Rule, ...]) -> Rule | None:
    """Return the first rule that names a result."""
    return next((rule for rule in rules if any(fnmatchcase(name, pattern) for pattern in rule.results)), None)


def files_of(rule: Rule, root: Path) -> list[Path]:
    """Return the files that a rule names.

    Raises:
        UsageError: a pattern matches nothing, as after a move.
    """
    chosen: set[Path] = set()
    for pattern in rule.files:
        leaves_out = pattern.startswith("!")
        found = {path for path in root.glob(pattern.removeprefix("!")) if path.is_file() and "__pycache__" not in path.parts}
        if not found:
            raise UsageError(f"{pattern} matches no file", f"mend eval/results/{TABLE}")
        chosen = chosen - found if leaves_out else chosen | found
    return sorted(chosen)


def digest(rule: Rule, root: Path) -> str:
    """Hash the content of what a rule names. Names do not count, so a move keeps it; of a hook only its added lines count."""
    contents = (_content(path) for path in files_of(rule, root))
    return hashlib.sha256("".join(sorted(hashlib.sha256(content).hexdigest() for content in contents)).encode()).hexdigest()[:DIGITS]


def _content(path: Path) -> bytes:
    content = path.read_bytes().replace(b"\r\n", b"\n")
    if path.suffix == ".patch":
        return b"\n".join(line for line in content.split(b"\n") if line.startswith(b"+") and not line.startswith(b"+++ "))
    return content


def header(name: str, *, patches: str | None = None, rules: tuple[Rule, ...] | None = None) -> str:
    """Return the line for a result called ``name`` below ``eval/results``, made from the tree as it is now.

    ``patches`` is the digest of the build that was measured, "" for one without patches, ``None`` for the patch set here.
    Without a checkout, or for a name that no rule has, the line tells the patches only.
    """
    made_with = f"Made with patches `{(patchset.load().digest if patches is None else patches or 'none')[:DIGITS]}`"
    if not assets.is_checkout() or not (folder() / TABLE).is_file():
        return made_with + "."
    rule = rule_of(name, load() if rules is None else rules)
    return f"{made_with}; depends on files `{digest(rule, assets.eval_dir().parent)}`." if rule else made_with + "."


def with_header(text: str, line: str, *, comment: bool = False) -> str:
    """Put the line under the title, or on top where there is none; an older one is replaced. ``comment``: behind ``# ``.

    In a page of HTML it is a comment below the document type.
    """
    if LINE.search(text):
        return LINE.sub(lambda _: f"# {line}" if comment else line, text, count=1)
    if text.startswith(DOCTYPE):
        return text.replace("\n", f"\n<!--\n{line}\n-->\n", 1)
    if comment:
        return f"# {line}\n{text}"
    title, newline, rest = text.partition("\n")
    return f"{title}{newline}\n{line}\n{rest}" if title.startswith("# ") else f"{line}\n\n{text}"


def write(path: Path, text: str, *, patches: str | None = None) -> Path:
    """Write a result with its line, and the folders above it.

    Its name is that below ``eval/results``, or below ``report/`` in the folder of everything that we make: a file may be
    written there first and copied when it is good.
    """
    full = path.resolve()
    bases = [base for base in (folder().resolve(), assets.home() / "report") if full.is_relative_to(base)]
    name = full.relative_to(bases[0]).as_posix() if bases else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(with_header(text, header(name, patches=patches), comment=path.suffix == ".txt"), encoding="utf-8")
    return path


def check(root: Path | None = None) -> list[State]:
    """Look at every result, in the order of their names."""
    top = root or assets.eval_dir().parent
    base = top / "eval" / "results"
    rules = load(base / TABLE)
    names = sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.suffix in SUFFIXES)
    states = [_state(name, base, rules, top) for name in names]
    used = {pattern for rule in rules for pattern in rule.results if any(fnmatchcase(name, pattern) for name in names)}
    lost = [pattern for rule in rules for pattern in rule.results if pattern not in used]
    return [*states, *(State(pattern, f"no result has this name, but {TABLE} does", wrong=True) for pattern in lost)]


def _state(name: str, base: Path, rules: tuple[Rule, ...], top: Path) -> State:
    rule = rule_of(name, rules)
    if rule is None:
        return State(name, f"{TABLE} does not say what it depends on", wrong=True)
    line = LINE.search((base / name).read_text("utf-8"))
    if line is None or line[2] is None:
        return State(name, "no line says which patches and files it was made with", wrong=True, hint=rule.made)
    try:
        now = digest(rule, top)
    except UsageError as error:
        return State(name, error.message, wrong=True)
    return State(name, "" if line[2] == now else f"older than what it depends on (made with files {line[2]}, now {now})", hint=rule.made)
