"""One version of a package as a file, whose sha256 is known."""

from __future__ import annotations

from pathlib import Path

from packaging.version import Version

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.fetch import pip_settings, registry


def obtain(package: str, version: str, sha256: str, target: Path, *, elsewhere: str) -> None:
    """Write the source distribution of a version to ``target``; what is there at the end has the right sha256.

    Args:
        package: its name.
        version: the one that is wanted.
        sha256: of the file; "": the one that the registry states, if it states one.
        target: a temporary file. After an error it may be there, and is worthless.
        elsewhere: what else a user can do, for hints: "put the archive at …".

    Raises:
        EnvironmentMissing: no network, no such version, or another file under its name.
    """
    what = f"cannot fetch {package} {version}"
    try:
        using = pip_settings.settings()
        found = [item for item in registry.releases(package, using) if item.order == Version(version)]
    except EnvironmentMissing as error:
        raise EnvironmentMissing(f"{what}: {error.message}", f"{error.hint}, or {elsewhere}") from error
    if not found:
        raise EnvironmentMissing(
            f"{what}: the registry has no source distribution of this version", f"use another registry, or {elsewhere}"
        )
    wrong = EnvironmentMissing(
        f"{what}: the registry has another file under this name (sha256 differs)", f"use another registry, or {elsewhere}"
    )
    for release in found:
        wanted = sha256 or release.sha256
        if release.sha256 and release.sha256 != wanted:
            continue
        try:
            got = registry.download(release, target, using)
        except EnvironmentMissing as error:
            wrong = EnvironmentMissing(error.message, f"{error.hint}, or {elsewhere}")
            continue
        if not wanted or got == wanted:
            return
        target.unlink()
    raise wrong
