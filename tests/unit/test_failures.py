"""What exceptions are for a user. Risks: a traceback, a code that says that a gate failed, a message without a path."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from turbo_gguf import failures
from turbo_gguf.errors import EnvironmentMissing, UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(failures.DEBUG, raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EPERM])
@pytest.mark.parametrize("path", ["home", "home/locks/x.lock", "."])
def test_what_is_refused_in_our_home(home: Path, number: int, path: str) -> None:
    where = home.parent / path
    found = failures.explained(OSError(number, os.strerror(number), str(where)))
    assert (found.exit_code, found.message) == (3, f"{where}: {os.strerror(number)}")
    assert found.hint == f"set TURBO_GGUF_HOME to a folder that you can write to (now it is {home})"


def test_what_is_refused_elsewhere(tmp_path: Path) -> None:
    found = failures.explained(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "other/file")))
    assert (found.exit_code, found.message) == (3, f"{tmp_path}/other/file: Permission denied")
    assert found.hint.startswith("check that it exists")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), OSError("odd"), OSError(errno.EMFILE, "Too many open files", 7)])
def test_what_is_refused_without_a_path(error: OSError) -> None:
    found = failures.explained(error)
    assert found.exit_code == 3 and (error.strerror or "odd") in found.message and found.hint


def test_a_full_disk(home: Path) -> None:
    found = failures.explained(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert found.exit_code == 3 and str(home) in found.hint


def test_a_package_that_cannot_be_used() -> None:
    found = failures.explained(ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"))
    assert found.exit_code == 3 and found.hint.endswith("-m pip install matplotlib")
    assert failures.explained(ImportError("cannot import", name="turbo_gguf.cli.x")).exit_code == 4


def test_no_memory() -> None:
    assert failures.explained(MemoryError()).exit_code == 3


def test_our_own_errors_stay_what_they_are() -> None:
    error = UsageError("x", "y")
    assert failures.explained(error) is error


def test_an_internal_error_has_a_log_where_one_can_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failures.explained(ValueError("odd\nmore"))
    assert (found.exit_code, found.message) == (4, f"internal error: ValueError: odd; log: {home}/logs/internal-error.log")
    home.with_name("file").write_text("x")
    monkeypatch.setenv("TURBO_GGUF_HOME", str(home.with_name("file") / "home"))
    found = failures.explained(ValueError("odd"))
    assert found.message == "internal error: ValueError: odd" and "TURBO_GGUF_DEBUG=1" in found.hint


def test_tracebacks_are_printed_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failures.explained(UsageError("x"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(failures.DEBUG, "1")
    failures.explained(UsageError("x"))
    assert "UsageError: x" in capsys.readouterr().err


def test_scripts_end_with_the_same_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def act(error: Exception) -> int:
        raise error

    assert failures.exit_code(lambda: 7) == 7
    assert failures.exit_code(lambda: act(EnvironmentMissing("no", "do"))) == 3
    assert failures.exit_code(lambda: act(IndexError("list"))) == 4
    assert capsys.readouterr().err.startswith("error: no\nhint: do\nerror: internal error: IndexError: list; log: ")
