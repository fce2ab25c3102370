"""The table of upstream tests that are not run, or that fail for a reason which is not ours: ``skips.toml``."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

TABLE = Path(__file__).with_name("skips.toml")


class Skip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tests with one reason."""

    tests: tuple[str, ...]  # patterns of pytest's names; [ and ] stand for themselves
    reason: str


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in the file."""

    skip: tuple[Skip, ...] = ()


def load(path: Path = TABLE) -> tuple[Skip, ...]:
    """Read the table."""
    return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Table).skip


def reason_of(test: str, table: tuple[Skip, ...]) -> str:
    """Why a test is skipped, "" when it is not."""
    return next((skip.reason for skip in table if any(matches(test, pattern) for pattern in skip.tests)), "")


def matches(test: str, pattern: str) -> bool:
    """Whether a pattern names a test, with or without its folder."""
    plain = pattern.replace("[", "[[]")
    return fnmatchcase(test, plain) or fnmatchcase(test.removeprefix("unit/"), plain)
