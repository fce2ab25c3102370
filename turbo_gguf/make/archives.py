"""Archives that hold a llama.cpp tree: what of them is unpacked, and where."""

from __future__ import annotations

import re
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from turbo_gguf.errors import EnvironmentMissing, UsageError

NOT_BUILT = re.compile(
    r"^(\.git|\.github|\.devops|benches|build[^/]*|ci|docs|media)/"  # three quarters of the bytes, no part of the build
    r"|^models/[^/]*\.gguf|(^|/)__pycache__/|^\.git$"
)
"""Files of a llama.cpp tree that no build needs."""

OTHER_SOURCES = "or give --upstream a llama.cpp folder, tarball, or git URL@COMMIT"

_MARKS = ("include/llama.h", "ggml/CMakeLists.txt")


def unpack(archive: Path, target: Path, subfolder: str = "") -> None:
    """Unpack the llama.cpp tree that an archive holds, and nothing else of it.

    Only regular files with paths inside of the tree are written, so no member can reach another place. (The filters of
    tarfile are missing in Python 3.11.2.)

    Args:
        archive: a tar file, compressed or not.
        target: folder that is made.
        subfolder: where the tree lies below the one folder at the top of a source distribution; "": at any depth.

    Raises:
        EnvironmentMissing: truncated, or no archive.
        UsageError: no llama.cpp in it (there), or a path that leaves the tree.
    """
    try:
        with tarfile.open(archive) as tar:
            files = [member for member in tar.getmembers() if member.isfile()]
            root = tree_root([member.name for member in files], archive, subfolder)
            for member in files:
                path = member.name.removeprefix(root)
                if not member.name.startswith(root) or NOT_BUILT.search(path):
                    continue
                if ".." in PurePosixPath(path).parts or path.startswith("/"):
                    raise UsageError(f"{archive}: unsafe path in the archive: {member.name}")
                _extract(tar, member, target / path)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise EnvironmentMissing(f"{archive}: truncated or not an archive: {error}", f"fetch it again, {OTHER_SOURCES}") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one file with its time and its execute bit."""
    source = tar.extractfile(member)
    assert source is not None  # a regular file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file)
    tar.utime(member, path)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)


def tree_root(names: list[str], source: Path | str, subfolder: str = "") -> str:
    """Prefix ("" or "…/") of the llama.cpp tree among file names; the shallowest when there are several and none is named.

    Raises:
        UsageError: there is no such tree.
    """
    known = set(names)
    roots = [name.removesuffix(_MARKS[0]) for name in names if name.endswith(_MARKS[0])]
    roots = [root for root in roots if (not root or root.endswith("/")) and root + _MARKS[1] in known]
    if subfolder:
        roots = [root for root in roots if root.partition("/")[2] == f"{subfolder}/"]
    if not roots:
        where = f" in {subfolder}" if subfolder else ""
        raise UsageError(f"{source} holds no llama.cpp tree{where} ({_MARKS[0]}, {_MARKS[1]})")
    return min(roots, key=len)
