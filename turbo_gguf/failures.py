"""From any exception to a message, a hint and an exit code: none may reach a user as a traceback, or end a program with 1."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from turbo_gguf import files
from turbo_gguf.assets import home
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, TurboError, report

DEBUG = "TURBO_GGUF_DEBUG"
"""Variable with which tracebacks are printed."""

SHOW = f"{DEBUG}=1 shows where"


def explained(error: Exception) -> TurboError:
    """What an exception is for a user.

    A full disk, a folder without the right to write, and a missing package are the environment's; what nobody expected is a fault of ours,
    and its traceback goes to a file.
    """
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, TurboError):
        return error
    if isinstance(error, OSError):
        return _refused(error)
    if isinstance(error, MemoryError):
        return EnvironmentMissing("out of memory", f"use a smaller model or a shorter context; {SHOW}")
    if isinstance(error, ImportError) and not str(error.name or "turbo_gguf").startswith("turbo_gguf"):
        return EnvironmentMissing(
            f"the Python package {error.name} cannot be used: {error}", f"{sys.executable} -m pip install {error.name}"
        )
    first = (str(error).strip().splitlines() or [""])[0]
    log = _log(error)
    where = f"; log: {log}" if log else ""
    hint = f"this is a fault of turbo-gguf; report it with {'the log' if log else f'what {DEBUG}=1 prints'}"
    return ToolFailed(f"internal error: {type(error).__name__}: {first}{where}", hint)


def exit_code(act: Callable[[], int]) -> int:
    """Do what a program does, and return its exit code: what ``act`` returns, or that of the error it ends with, which is reported."""
    try:
        return act()
    except Exception as error:
        found = explained(error)
        report(found.message, found.hint)
        return found.exit_code


def _refused(error: OSError) -> TurboError:
    """What the system refused: with the path, and whether it is one of ours."""
    try:
        ours = home()
    except TurboError as unknown:
        return unknown
    if files.is_full(error):
        return EnvironmentMissing(f"the disk is full: {error}", f"{files.MORE_SPACE} (now it is {ours})")
    reason = error.strerror or str(error) or type(error).__name__
    if not isinstance(error.filename, (str, bytes)):
        return EnvironmentMissing(f"the system refused something: {reason}", SHOW)
    path = Path(os.fsdecode(error.filename)).absolute()
    if path.is_relative_to(ours) or ours.is_relative_to(path):
        return EnvironmentMissing(f"{path}: {reason}", f"{files.OTHER_HOME} (now it is {ours})")
    return EnvironmentMissing(f"{path}: {reason}", f"check that it exists and that you may use it; {SHOW}")


def _log(error: Exception) -> Path | None:
    """Keep the traceback of the last fault."""
    try:
        return files.write_text(home() / "logs" / "internal-error.log", "".join(traceback.format_exception(error)))
    except (OSError, TurboError):
        return None
