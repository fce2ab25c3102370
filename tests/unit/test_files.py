"""Files on disk. Risks: half a file that looks finished, two writers of one name, a full disk without a word of help."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from turbo_gguf import files
from turbo_gguf.errors import EnvironmentMissing


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/a.txt"
    assert files.write_text(path, "one") == path and path.read_text() == "one"
    with pytest.raises(KeyboardInterrupt), files.whole(path) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_the_error_of_a_missing_folder_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.whole(tmp_path / "no/a.txt") as temporary:
        temporary.write_text("x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do(number: int) -> None:
    with (
        pytest.raises(EnvironmentMissing, match=r"unpacking: no space left .*needs 150 MB") as caught,
        files.disk_errors("unpacking", 150_000_000),
    ):
        raise OSError(number, "full")
    assert caught.value.hint == files.MORE_SPACE


def test_other_errors_of_the_disk_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="broken"), files.disk_errors("unpacking"):
        raise OSError(errno.EIO, "broken")


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 100_000).hexdigest()


def test_a_lock_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    for _ in range(2):
        with files.lock("a"):
            pass
    assert (tmp_path / "locks/a.lock").exists() and "waiting" not in capsys.readouterr().err
