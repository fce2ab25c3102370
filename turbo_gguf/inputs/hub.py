"""Models from the hub, or from its cache on this machine.

Downloads go through huggingface_hub (``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` apply, an interrupted download resumes), and the sha256
of each file is compared with the one that the hub states. When the hub cannot be asked (no network, ``HF_HUB_OFFLINE=1``), what its cache
has is used.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from turbo_gguf.errors import EnvironmentMissing, TurboError, UsageError
from turbo_gguf.files import is_full, sha256_of
from turbo_gguf.inputs.gguf_file import Data, GgufFile, part_names

_HUB = re.compile(r"(?:hf://)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:[:/](?P<file>[^:]+\.gguf))?$")
FIRST_BYTES = 1 << 20
"""Of a file, that are asked for first: a header without a long vocabulary."""

RETRIES = 2
"""Of a range."""

PASSING = (HTTPStatus.TOO_MANY_REQUESTS, *(HTTPStatus(status) for status in (500, 502, 503, 504)))
"""Statuses after which a range is asked for again."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
"""Of the header of a hub whose limit is reached: the seconds until it is lifted."""

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def parse(spec: str) -> tuple[str, str | None] | None:
    """Repository and file that a hub id names; ``None``: it is none."""
    match = _HUB.fullmatch(spec)
    return (match["repo"], match["file"]) if match else None


def endpoint() -> str:
    """Address of the hub: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def download(repo: str, file: str | None = None) -> Path:
    """Download all files of a model, or find them in the hub's cache, and check them; returns the path of the first.

    Raises:
        UsageError: no such repository or file, several models to choose from, or another file than the first of a model in several.
        EnvironmentMissing: the hub cannot be reached or refuses access, and its cache lacks the model; the download broke off (run again
            to resume); or a file is not what the hub announced (it is removed).
    """
    import huggingface_hub as hub  # noqa: PLC0415 - slow to import

    _require_first(repo, file)
    try:
        announced = _ask(repo, file)
    except EnvironmentMissing as error:
        return _from_cache(repo, file, error)
    paths = []
    for name, metadata in announced:
        with _explaining(repo, name):
            path = Path(hub.hf_hub_download(repo, name, endpoint=endpoint()))
        _check(path, repo, metadata.etag, metadata.size)
        paths.append(path)
    return paths[0]


def header(repo: str, file: str | None = None) -> tuple[GgufFile, Path | None]:
    """Metadata and list of tensors of a model, and its path if it is here. Else no more than the header is asked for, by ranges of bytes.

    Raises:
        UsageError: as :func:`download`, or a file is no GGUF.
        EnvironmentMissing: the hub cannot be reached or refuses access, and its cache lacks the model.
    """
    import huggingface_hub as hub  # noqa: PLC0415 - slow to import

    _require_first(repo, file)
    try:
        sizes = {name: int(metadata.size or 0) for name, metadata in _ask(repo, file)}
    except EnvironmentMissing as error:
        path = _from_cache(repo, file, error)
        return GgufFile(path), path
    here = [hub.try_to_load_from_cache(repo, name) for name in sizes]
    if all(isinstance(path, str) for path in here):
        return GgufFile(Path(str(here[0]))), Path(str(here[0]))

    @contextmanager
    def opened(path: Path) -> Iterator[Data]:
        yield _Ranges(repo, path.as_posix(), sizes[path.as_posix()])

    return GgufFile(Path(next(iter(sizes))), what=f"hub model {repo}:", hint="take another file of the repository", opened=opened), None


class _Ranges:
    """The first bytes of a file on the hub: more of them are fetched when they are asked for."""

    def __init__(self, repo: str, name: str, size: int) -> None:
        self._repo, self._name, self._size = repo, name, size
        self._data = bytearray()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice, /) -> bytes:
        while len(self._data) < min(part.stop, self._size):
            self._fetch(min(max(part.stop, 2 * len(self._data), FIRST_BYTES), self._size))
        return bytes(self._data[part])

    def _fetch(self, stop: int) -> None:
        import huggingface_hub as hub  # noqa: PLC0415 - slow to import
        from huggingface_hub import constants  # noqa: PLC0415
        from huggingface_hub import utils as exported  # noqa: PLC0415

        utils: Any = exported  # it does not tell type checkers what it exports
        url = hub.hf_hub_url(self._repo, self._name, endpoint=endpoint())
        headers = utils.build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={len(self._data)}-{stop - 1}"}
        with _explaining(self._repo, self._name):  # the hub sends on to another host, which does not get the token
            answer = utils.http_backoff(
                "GET",
                url,
                max_retries=RETRIES,
                retry_on_status_codes=PASSING,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            utils.hf_raise_for_status(answer)
        if answer.status_code == HTTPStatus.OK:  # all of it: ranges mean nothing to this server
            self._data.clear()
        if not answer.content:
            raise _unreachable(self._repo, EOFError(f"{self._name}: nothing came of bytes {len(self._data)} to {stop}"))
        self._data += answer.content


def _require_first(repo: str, file: str | None) -> None:
    if file and part_names(file)[0] != file:
        raise UsageError(f"hub model {repo}: {file} is not the first of its files", f"name the first one: {repo}:{part_names(file)[0]}")


def _ask(repo: str, file: str | None) -> list[tuple[str, Any]]:
    """Names of a model's files, and what the hub says of each."""
    import huggingface_hub as hub  # noqa: PLC0415

    with _explaining(repo, file):
        names = part_names(file or _only_model(repo, _listed(repo)))
    found = []
    for name in names:
        with _explaining(repo, name):
            found.append((name, hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, endpoint=endpoint()))))
    return found


def _listed(repo: str) -> list[str]:
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    info = HfApi(endpoint=endpoint()).model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [sibling.rfilename for sibling in info.siblings or ()]


@contextmanager
def _explaining(repo: str, name: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into ours; a full disk stays what it is."""
    try:
        yield
    except TurboError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            raise
        raise _explained(repo, name, error) from error


def _explained(repo: str, name: str | None, error: Exception) -> TurboError:
    """What an error of huggingface_hub is for a user."""
    import huggingface_hub as hub  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    has_token = hub.get_token() is not None
    if isinstance(error, errors.GatedRepoError):
        ask = f"ask for access at {endpoint()}/{repo}"
        hint = f"{ask} with the account of your token" if has_token else f"{ask}, then {_LOG_IN}"
        return EnvironmentMissing(f"hub model {repo}: its owner grants access to those who ask for it", hint)
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        hint = "check the name, and what your token may read" if has_token else f"check the name; for a private one {_LOG_IN}"
        return UsageError(f"hub model {repo}: no such public repository at {endpoint()}", hint)
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return UsageError(
            f"hub model {repo}: no file {name} at {endpoint()}", f"name {repo} alone: if it has several models, they are listed"
        )
    return _refused(repo, error, has_token=has_token) if isinstance(error, errors.HfHubHTTPError) else _unreachable(repo, error)


def _refused(repo: str, error: Any, *, has_token: bool) -> EnvironmentMissing:
    """What a status of the hub says; that of a fault of its own is one to try again."""
    status, words = error.response.status_code, " ".join(str(error.server_message or error).split())
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        found = _LIMIT.search(error.response.headers.get("ratelimit", ""))
        seconds = found[1] if found else error.response.headers.get("Retry-After", "")
        wait = f"wait {seconds} seconds" if seconds.isdecimal() else "wait a few minutes"
        return EnvironmentMissing(
            f"hub model {repo}: too many requests to {endpoint()}", f"{wait}, and run the same command again; a token raises the limit"
        )
    if status == HTTPStatus.UNAUTHORIZED:
        says, hint = ("does not know the token", f"{_LOG_IN}, or do without a token") if has_token else ("asks for a token", _LOG_IN)
        return EnvironmentMissing(f"hub model {repo}: {endpoint()} {says}: {words}", hint)
    if status == HTTPStatus.FORBIDDEN:
        return EnvironmentMissing(f"hub model {repo}: {endpoint()} forbids access: {words}", "check what your token may read")
    return _unreachable(repo, error)


def _unreachable(repo: str, error: Exception) -> EnvironmentMissing:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return EnvironmentMissing(
        f"hub model {repo}: download from {endpoint()} failed: {first[0]}",
        "run the same command again: the download resumes; or download the file yourself and give its path",
    )


def _only_model(repo: str, names: Sequence[str]) -> str:
    """The GGUF file among the files of a repository; of a model in several, the first one."""
    files = sorted({part_names(name)[0] for name in names if name.endswith(".gguf")})
    if len(files) == 1:
        return files[0]
    if not files:
        raise UsageError(f"hub model {repo}: no GGUF file in it", "look for a repository with GGUF files")
    raise UsageError(f"hub model {repo}: {len(files)} GGUF files", "choose one: " + ", ".join(f"{repo}:{f}" for f in files))


def _check(path: Path, repo: str, etag: str | None, size: int | None) -> None:
    """Compare a download with what the hub announced; remove it when it differs."""
    announced = etag if etag and _SHA256.fullmatch(etag) else None
    real_size = path.stat().st_size
    wrong = ""
    if size is not None and size != real_size:
        wrong = f"{real_size} bytes, announced were {size}"
    elif announced and (found := sha256_of(path)) != announced:
        wrong = f"sha256 {found}, announced was {announced}"
    if wrong:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise EnvironmentMissing(f"hub model {repo}: {path.name} is not what the hub announced: {wrong}; removed", "run it again")


# --- cache ----------------------------------------------------------------------------------------------------------------


def _from_cache(repo: str, file: str | None, error: EnvironmentMissing) -> Path:
    """The first file of a model in the hub's cache.

    Raises:
        UsageError: the cache has several models to choose from.
        EnvironmentMissing: it has none, or not all its files.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    lacks = file or "a GGUF file"
    for snapshot in _snapshots(folder):
        there = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file()]
        if not there and not file:
            continue
        names = part_names(file or _only_model(repo, there))
        missing = [name for name in names if name not in there]
        if not missing:
            if not constants.HF_HUB_OFFLINE:
                print(f"{error.message}; taken from the hub's cache: {snapshot / names[0]}", file=sys.stderr)
            return snapshot / names[0]
        lacks = missing[0]
    offline = "unset HF_HUB_OFFLINE, and " if constants.HF_HUB_OFFLINE else ""
    raise EnvironmentMissing(f"{error.message}; the hub's cache {folder} lacks {lacks}", f"{offline}{error.hint}") from error


def _snapshots(folder: Path) -> Iterator[Path]:
    """States of a repository in the cache: that of the main branch, then the others, the newest first."""
    try:
        main = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        main = None
    others = sorted(
        (path for path in (folder / "snapshots").glob("*") if path != main), key=lambda path: path.stat().st_mtime, reverse=True
    )
    yield from filter(Path.is_dir, [*([main] if main else []), *others])
