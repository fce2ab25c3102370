"""Errors that a user can act on: what failed, where the log is, and what to type next.

Exit codes (documented in ``docs/reference/exit-codes.md``):

====  ==========================================================
0     pass
1     the gate failed: the measurement is sound, the type is not
2     usage: the command line or an input file is wrong
3     environment: a tool, a library, disk space, a right or network is missing
4     a tool crashed, its log was not understood, or we did
====  ==========================================================

A crash is never a verdict on quality, so codes 1 and 4 are never mixed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

EXIT_GATE_FAILED = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_TOOL = 4


class TurboError(Exception):
    """Base of all errors that reach the user as ``error: message`` and ``hint: hint``.

    ``message`` says what failed (and where the log is); ``hint`` is what to type next, or "".
    """

    exit_code: ClassVar[int] = EXIT_TOOL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TurboError):
    """The command line, a TOML file or an input file is wrong."""

    exit_code = EXIT_USAGE


class EnvironmentMissing(TurboError):
    """A compiler, tool, library, disk space or the network is missing."""

    exit_code = EXIT_ENVIRONMENT


class ToolFailed(TurboError):
    """A tool that we ran crashed, timed out or was killed."""

    exit_code = EXIT_TOOL


class LogNotUnderstood(ToolFailed):
    """A tool ended with 0, but its log lacks what a complete run prints."""


class SilentFallback(ToolFailed):
    """The tool ran something else than what was asked for; nothing is stored."""


class LogCut(LogNotUnderstood):
    """Exit code 0, but the end of the log is missing: queued lines were lost when the tool ended. Worth one retry."""


def report(message: str, hint: str = "") -> None:
    """Print an error, and what to type next, on standard error."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def with_log(error: ToolFailed, log: Path) -> ToolFailed:
    """The same error, which also says where the log is."""
    return type(error)(f"{error.message}; log: {log}", error.hint)
