"""Pinned llama.cpp sources: fetch, verify, unpack, once per machine.

An upstream is named in ``ggml-patches/upstreams.toml``, or given as a package and version, a folder, a tarball, or a git URL
with a commit. Every kind ends as a pristine tree in ``home()/upstream/NAME-COMMIT`` (``NAME`` alone where the tag is the name),
reduced to what a build needs, that nothing writes to. Of a source distribution, its hash is checked before anything of it is used,
and only the files of llama.cpp are used.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import msgspec
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from turbo_gguf.assets import home
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.fetch import sdist
from turbo_gguf.files import disk_errors, lock, sha256_of
from turbo_gguf.make.archives import NOT_BUILT, OTHER_SOURCES, tree_root, unpack
from turbo_gguf.make.snapshots import Package, Snapshots, Upstream, default_name, snapshots, supported
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.patchset.worktree import tree_files
from turbo_gguf.tools import capture, run

__all__ = ["UNPACKED_BYTES", "Upstream", "default_name", "fetch", "is_fetched", "resolve", "supported"]

UNPACKED_BYTES = 150_000_000
"""Room that unpacking one snapshot needs: the tree and the archive while it is downloaded."""


class _Unpacked(msgspec.Struct, frozen=True):
    """What was unpacked, kept beside the tree to notice a damaged one."""

    source: str
    sha256: str
    files: int
    bytes: int


def resolve(spec: str | None = None) -> Upstream:
    """Return the upstream that a user means.

    Args:
        spec: a name in ``upstreams.toml`` (the default one when ``None``), ``PACKAGE==VERSION``, a folder, ``FILE.tar.gz``,
            ``FILE.tar.gz#sha256=HEX``, or ``GIT-URL@COMMIT``.

    Raises:
        UsageError: it is none of these, or the folder has uncommitted changes.
    """
    known = snapshots()
    spec = spec or known.default
    named = next((item for item in known.upstream if item.name == spec), None)
    if named is not None:
        return named
    file, _, sha256 = spec.partition("#sha256=")
    path = Path(file).expanduser()
    if path.is_dir():
        return _folder(path.resolve())
    if path.is_file():
        return _tarball(path.resolve(), sha256)
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==(\d[\w.+!-]*)", spec)
    if match:
        return _version(known, canonicalize_name(match[1]), match[2])
    match = re.fullmatch(r"(.+(?:://|:|/).+)@([0-9a-f]{7,40})", spec)
    if match:
        return Upstream(name=f"git-{match[2][:9]}", commit=match[2], kind="git", location=match[1])
    names = ", ".join(item.name for item in known.upstream)
    raise UsageError(f"no upstream {spec!r}", f"give one of {names}; {OTHER_SOURCES.removeprefix('or give --upstream ')}")


def _version(known: Snapshots, package: str, version: str) -> Upstream:
    """A version of a package: a pinned one, or one whose hash the registry states."""
    try:
        Version(version)
    except InvalidVersion as error:
        raise UsageError(f"{package}: {version!r} is no version") from error
    pinned = next((item for item in known.upstream if (item.package, item.version) == (package, version)), None)
    if pinned is not None:
        return pinned
    source = next((item for item in known.package if item.name == package), Package(package, ""))
    name, build = f"{package}-{version}", source.build_of(version)
    commit = f"b{build}" if build else name
    return Upstream(name=name, commit=commit, package=package, version=version, subfolder=source.subfolder, build=build)


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
        with disk_errors(f"unpacking llama.cpp {upstream.name}", UNPACKED_BYTES):
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
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return False
    return upstream.pristine.is_dir() and _measure(upstream.pristine) == (record.files, record.bytes)


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _measure(tree: Path) -> tuple[int, int]:
    sizes = [(tree / path).stat().st_size for path in tree_files(tree)]
    return len(sizes), sum(sizes)


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
    if upstream.kind == "sdist" and not upstream.sha256:
        print(f"{archive.name}: sha256 {sha256}", file=sys.stderr)
    unpack(archive, unpacked, upstream.subfolder)
    if downloaded and not keep_archive:
        archive.unlink()
    return sha256


def _download(upstream: Upstream, temporary: Path) -> None:
    """Fetch the archive of a source distribution, check its hash, and only then put it where archives are kept."""
    print(f"fetching {upstream.package} {upstream.version} (llama.cpp {upstream.commit}, 35 to 75 MB)", file=sys.stderr)
    elsewhere = f"put the archive at {upstream.archive}, {OTHER_SOURCES}"
    sdist.obtain(upstream.package, upstream.version, upstream.sha256, temporary, elsewhere=elsewhere)
    upstream.archive.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(upstream.archive)


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


def _folder(path: Path) -> Upstream:
    """A local folder: at its commit when it is a clean git work tree, else known by a hash of its content."""
    tree_root(list(tree_files(path)), path)
    if _is_git(path):
        changed = capture(["git", "-C", path, "status", "--porcelain", "--untracked-files=no"])
        if changed:
            raise UsageError(f"{path} has uncommitted changes:\n{changed}", "commit or stash them: a build is known by its commit")
        commit = capture(["git", "-C", path, "rev-parse", "--short=9", "HEAD"])
    else:
        commit = f"unknown-{_content_hash(path)[:12]}"
    mark = hashlib.sha256(str(path).encode()).hexdigest()[:6]
    return Upstream(name=f"folder-{mark}", commit=commit, kind="folder", location=str(path))


def _is_git(path: Path) -> bool:
    """Whether a folder is a git work tree; of a submodule that was packed, only a file that points to nothing is left."""
    if not (path / ".git").exists():
        return False
    try:
        return bool(capture(["git", "-C", path, "rev-parse", "--git-dir"]))
    except ToolFailed:
        return False


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
    for name in sorted(name for name in tree_files(path) if not NOT_BUILT.search(name)):
        total.update(f"{name} {sha256_of(path / name)}\n".encode())
    return total.hexdigest()


def _copy(source: Path, target: Path) -> None:
    """Copy a folder: the files that git tracks, or all files that a build may need."""
    tracked = _is_git(source)
    names = capture(["git", "-C", source, "ls-files", "-z"]).split("\0") if tracked else tree_files(source)
    for name in names:
        if name and not NOT_BUILT.search(name) and (source / name).is_file() and not (source / name).is_symlink():
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
    tree_root(list(tree_files(checkout)), upstream.location)
    _copy(checkout, target)
