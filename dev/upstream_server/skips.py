"""The table of upstream tests that are not run, or that may fail with our types for a reason that is known: ``skips.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

TABLE = Path(__file__).with_name("skips.toml")


class Skip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tests with one reason."""

    tests: tuple[str, ...]  # patterns of pytest's names; [ and ] stand for themselves
    reason: str


class Known(Skip, frozen=True, forbid_unknown_fields=True):
    """Tests that run, and may fail with some types."""

    types: tuple[str, ...]  # patterns


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in the file."""

    skip: tuple[Skip, ...] = ()
    known: tuple[Known, ...] = ()


def load(path: Path = TABLE) -> Table:
    """Read the table."""
    return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Table)


def reason_of(test: str, table: Table) -> str:
    """Why a test is skipped, "" when it is not."""
    return _reason(test, table.skip)


def known_reason_of(test: str, cache_type: str, table: Table) -> str:
    """Why a test may fail with a type, "" when it must not."""
    return _reason(test, [known for known in table.known if any(fnmatchcase(cache_type, pattern) for pattern in known.types)])


def _reason(test: str, entries: Sequence[Skip]) -> str:
    return next((entry.reason for entry in entries if any(matches(test, pattern) for pattern in entry.tests)), "")


def matches(test: str, pattern: str) -> bool:
    """Whether a pattern names a test, with or without its folder."""
    plain = pattern.replace("[", "[[]")
    return fnmatchcase(test, plain) or fnmatchcase(test.removeprefix("unit/"), plain)
